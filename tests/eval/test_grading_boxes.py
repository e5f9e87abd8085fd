r"""The last \boxed{...} of a text, integers graded exactly, and answers that are no answer."""

import time

import pytest

from eval import grading
from eval.grading import final_answer, grade_integer, grade_math
from tests.support.boxes import in_box

MALFORMED = [
    *(
        "?",
        "nan",
        "None",
        "(((((",
        r"\frac{1}{0}",
        r"\frac00",
        "0/0",
        r"\infty",
        r"\sqrt",
        r"\frac",
    ),
    *(r"\begin{pmatrix}1", r"\begin{pmatrix}1&2\\3\end{pmatrix}", r"5\\6", r"\left(5", "5)", " "),
    *(
        "x" * 300,
        "1" * 1500,
        r"\frac" * 300,
        "{" * 200 + "}" * 200,
        "a" * 1999,
        "(" * 500 + ")" * 500,
    ),
    *(
        r"\undefined{5}",
        r"\text{",
        "\\",
        "#",
        "%",
        "&",
        "=",
        "==",
        "5=",
        "=6",
        "<",
        ",",
        ",,,",
        "-",
    ),
    *(r"\{", r"\cup", "_", "^", "^^^", "1e999", "+-+", r"\int", r"\lim_{x\to}", "999999999!"),
    *(
        "\x00",
        "\u202e6\u202c",
        "\ud800",
        "\U0001f600",
        "e\u0301" * 50,
        "\u06f5",
        "\u4e94",
        "\ufeff",
    ),
    "__import__('os').system('true')",
    r"\sum_{k=1}^{10^{9}} \frac1k",
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"$\boxed{ 5 }$", "5"),
        (r"\boxed {5}", "5"),
        (r"\\boxed{5}", "5"),  # escaped once too often
        ("\\\\\n\\boxed{5}", "5"),  # after a line break of LaTeX
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{5} and once more \boxed{6", "5"),  # cut off: the last complete one
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{1}{\sqrt{2}}}} and {more}", r"\sqrt{\frac{1}{\sqrt{2}}}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),  # escaped braces need no partner
        (r"} } \boxed{5} {", "5"),
        (r"{\boxed{5}", "5"),
        (r"\boxed{1}{2}", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{ }", ""),
        ("\\boxed{a\nb}", "a\nb"),
        (r"<think>\boxed{3}</think> \boxed{4}", "4"),
        ("", None),
        ("5", None),
        ("the answer is 5", None),
        (r"\boxed", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        (r"\boxed{", None),
        (r"\boxed{5", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{5\}", None),
        (r"\fbox{5}", None),
    ],
)
def test_final_answer_is_the_last_complete_box(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "correct", "note"),
    [
        ("The answer is 5.", False, "no box"),
        ("", False, "no box"),
        (r"\boxed{5", False, "no box"),
        (r"\boxed{}", False, "empty box"),
        (r"\boxed{4}", False, ""),
        (r"\boxed{5} \boxed{4}", False, ""),  # the last one counts, wrong or right
        (r"\boxed{4} \boxed{5}", True, ""),
        (r"\boxed{4} and \boxed{5", False, ""),
        (r"\boxed{5\text{ or }4}", False, ""),
        (r"\boxed{" + "5" * 3000 + "}", False, "too long"),
    ],
)
def test_grade_notes_say_why_a_box_is_ungraded(text, correct, note):
    grade = grade_math(text, "5")
    assert (grade.correct, grade.note) == (correct, note)


def test_unreadable_box_is_noted():
    assert grade_math(in_box(r"\begin{pmatrix}"), r"\frac12").note == "unreadable"


@pytest.mark.parametrize("answer", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_wrong_without_an_error(answer, monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1.0)  # some of them never end
    assert not grade_math(in_box(answer), r"\frac{5}{7}").correct
    assert not grade_math(in_box(answer), r"\text{five}").correct
    assert not grade_integer(in_box(answer), "7").correct
    grade_integer(answer, "7", last_number=True)


def test_very_long_text_is_read_in_linear_time():
    begin = time.perf_counter()
    for text in ("\\" * 200_000, r"\boxed{" * 50_000, "{" * 200_000, "}" * 200_000, "1," * 100_000):
        assert not grade_math(text, "5").correct
        assert not grade_integer(text, "5", last_number=True).correct
    assert not grade_integer(in_box("5" + " m" * 900 + "!"), "5").correct
    assert time.perf_counter() - begin < 60  # quadratic time would be hours


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        (r"\boxed{25}", "025", True),
        (r"\boxed{025}", "25", True),
        (r"\boxed{25}", "25", True),
        (r"\boxed{25.0}", "25", True),
        (r"\boxed{25.}", "25", True),
        (r"\boxed{1,450,000}", "1450000", True),
        (r"\boxed{1450000}", "1,450,000", True),
        (r"\boxed{1{,}450{,}000}", "1,450,000", True),
        (r"\boxed{1\,450\,000}", "1,450,000", True),
        (r"\boxed{\$25}", "25", True),
        (r"\boxed{$25.00}", "25", True),
        (r"\boxed{-10}", "-10", True),
        ("\\boxed{\N{MINUS SIGN}10}", "-10", True),
        (r"\boxed{25\text{ dollars}}", "25", True),
        (r"\boxed{25 dollars}", "25", True),
        (r"\boxed{25\%}", "25", True),
        (r"\boxed{25^\circ}", "25", True),
        (r"\boxed{25 \text{ cm}^2}", "25", True),
        (r"\boxed{m+n = 25}", "25", True),
        (r"\boxed{\textbf{(025)}}", "25", True),
        (r"\boxed{\mathbf{25}}", "25", True),
        (r"\boxed{26}", "25", False),
        (r"\boxed{2.5}", "25", False),
        (r"\boxed{250}", "25", False),
        (r"\boxed{-25}", "25", False),
        (r"\boxed{25.5}", "25", False),
        (r"\boxed{25.0001}", "25", False),
        (r"\boxed{25x}", "25", False),
        (r"\boxed{25\pi}", "25", False),
        (r"\boxed{25, 26}", "25", False),
        (r"\boxed{25 or 26}", "25", False),
        (r"\boxed{25\text{ or }26}", "25", False),
        (r"\boxed{\frac{50}{2}}", "25", False),  # AIME asks for the integer itself
        (r"\boxed{5^2}", "25", True),
        (r"\boxed{5^2}", "5", False),
        (r"\boxed{10^{2}}", "100", True),
        (r"\boxed{2^3}", "2", False),
        (r"\boxed{-2^2}", "-4", True),
        (r"\boxed{3 pi}", "3", False),
        (r"\boxed{3\text{ pi}}", "3", False),
        (r"\boxed{2 million}", "2000000", True),
        (r"\boxed{2\text{ million dollars}}", "2,000,000", True),
        (r"\boxed{2 million}", "2", False),
        (r"\boxed{1.5 thousand}", "1500", True),
        (r"\boxed{5 \text{ dozen}}", "5", True),  # asked for in dozens
        (r"\boxed{25 squared}", "25", False),
        (r"\boxed{25\text{ or more}}", "25", False),
        (r"\boxed{25 and a half}", "25", False),
        (r"\boxed{25 hundredths}", "25", False),
        (r"\boxed{25 feet 6 inches}", "25", False),
        (r"\boxed{25¢}", "25", True),
        (r"\boxed{25\text{ cm}^{2}}", "25", True),
        (r"\boxed{25°C}", "25", True),
        (r"\boxed{24} \boxed{25}", "25", True),
        (r"\boxed{25} \boxed{24}", "25", False),
        (r"\boxed{}", "25", False),
        ("25", "25", False),
        ("", "25", False),
    ],
)
def test_integers_are_graded_exactly(text, gold, correct):
    grade = grade_integer(text, gold)
    assert grade.correct is correct
    assert not (grade.correct and grade.note)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 25.", "25"),
        ("He pays $25, not $26... no: $25", "$25"),
        ("**25**", "25"),
        ("10 + 15 = 25 apples", "25"),
        ("- 25", "25"),  # a list, not a sign
        ("40-25", "25"),
        ("x=-25", "-25"),
        ("it costs $1,450,000.00!", "$1,450,000.00"),
        ("25 or 26", "26"),
        ("5^2", "5^2"),
        ("25 million", "25 million"),
        ("a rate of 1/25", "1/25"),
        (r"26 \boxed{25} 27", "25"),  # a box comes first
        (r"25 \boxed{}", ""),
        ("none", None),
    ],
)
def test_last_number_replaces_a_box_with_last_number(text, answer):
    grade = grade_integer(text, "25", last_number=True)
    assert grade.answer == answer
    assert grade.correct is (answer in ("25", "$25", "5^2"))


def test_gold_answer_that_is_no_integer_raises():
    for gold in ("", "2.5", "five", r"\frac12"):
        with pytest.raises(ValueError, match="integer"):
            grade_integer(r"\boxed{5}", gold)
