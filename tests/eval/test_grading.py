"""The same answer or another: several hundred pairs written by hand, and the real gold answers."""

import gzip
import itertools
import json
import re

import pytest

from eval import grading, notation
from eval.grading import Grade, grade_integer, grade_math
from tests.support import expression_answers, number_answers
from tests.support.boxes import in_box
from tests.support.expression_answers import KNOWN
from tests.support.paths import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
# Gold answers of MATH-500 and others of them that are right too, beyond units: two numbers are a
# set, in parentheses too, and an equation counts as its right side.
EQUAL = [
    ("(-2,1)", "-2,1"),
    ("-2,1", "(-2,1)"),
    ("-2,1", "1,-2"),
    ("0", "5x - 7y + 11z + 4 = 0"),
    ("1,-2", "(-2,1)"),
    ("1,-2", "-2,1"),
]
PAIRS = [*number_answers.PAIRS, *expression_answers.PAIRS]


def flat(right: bool) -> list[tuple[str, str]]:
    return [(gold, answer) for gold, *answers in PAIRS for answer in answers[not right]]


def test_table_is_large_and_has_no_duplicates():
    rows = flat(True) + flat(False) + [(gold, answer) for gold, answer, _ in KNOWN]
    assert len(rows) == len(set(rows)) >= 400


@pytest.mark.parametrize(("gold", "answer"), flat(True))
def test_right_answers_are_graded_right(gold, answer):
    assert grade_math(in_box(answer), gold) == Grade(True, answer.strip())


@pytest.mark.parametrize(("gold", "answer"), flat(False))
def test_wrong_answers_are_graded_wrong(gold, answer):
    grade = grade_math(in_box(answer), gold)
    assert not grade.correct
    assert grade.answer == answer


@pytest.mark.parametrize(("gold", "answer", "graded"), KNOWN)
def test_known_misgradings_stay_as_they_are(gold, answer, graded):
    assert grade_math(in_box(answer), gold).correct is graded


@pytest.mark.parametrize("gold", sorted({gold for gold, _, _ in PAIRS}))
def test_gold_answer_is_right_and_another_is_wrong(gold):
    assert grade_math(in_box(gold), gold).correct
    assert not grade_math(in_box("98765"), gold).correct


def lines(name: str) -> list[dict]:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@needs_data
def test_every_gold_answer_of_math_500_is_right():
    for problem in lines("math500_test.jsonl"):
        gold = problem["answer"]
        assert grade_math(in_box(gold), gold).correct, gold
        assert grade_math(problem["solution"], gold).correct, gold  # as its author boxed it
        # And to math-verify alone, though equal spellings never get that far.
        tidy = notation.tidy(gold)
        assert grading._worker.compare(tidy, tidy) == "yes", gold


@needs_data
def test_every_gold_answer_of_aime_and_gsm8k_is_right():
    for name in ("aime24.jsonl", "aime25.jsonl"):
        for problem in lines(name):
            gold = problem["answer"]
            for answer in (gold, gold.lstrip("0"), gold.zfill(3), f"{gold}.0"):
                assert grade_integer(in_box(answer), gold).correct, gold
            assert not grade_integer(in_box(f"1{gold}"), gold).correct, gold
    for name in ("gsm8k_test_first1000.jsonl", "gsm8k_train.jsonl.gz"):
        for problem in lines(name):
            gold = problem["answer"].split("#### ")[1]
            assert grade_integer(in_box(gold), gold).correct, gold
            assert grade_integer(problem["answer"], gold, last_number=True).correct, gold
            assert not grade_integer(in_box(gold + "1"), gold).correct, gold


def spellings(gold: str) -> set[str]:
    """A gold answer in the typography of other authors."""
    return {
        f"${gold}$",
        rf"\({gold}\)",
        f"{gold}.",
        gold.replace(r"\frac", r"\dfrac"),
        gold.replace(r"\dfrac", r"\tfrac"),
        re.sub(r"\s*([-+=,])\s*", r"\1", gold),
        re.sub(r"(?<=[\d})a-z])([-+=])(?=[\d\\(a-z])", r" \1 ", gold),
        gold.replace(r"^\circ", "°"),
        gold.replace(r"^\circ", r"\degree"),
        gold.replace(r"\pi", "π"),
        gold.replace(r"\infty", "∞"),
        gold.replace(r"\cup", "\N{UNION}"),
        gold.replace("-", "\N{MINUS SIGN}"),
        gold.replace("pmatrix", "bmatrix"),
        gold.replace(r"\mbox", r"\text"),
        re.sub(r"\\left\s*|\\right\s*", "", gold),
        re.sub(r"^(-?\d{1,3})(\d{3})$", r"\1,\2", gold),
        re.sub(r"^(-?\d{1,3})(\d{3})$", r"\1\\,\2", gold),
        re.sub(r"^(-?\d+)$", r"\1.0", gold),
        re.sub(r"^(-?\d+)$", r"\1\\text{ units}", gold),
        re.sub(r"^\\frac\{(\d+)\}\{(\d+)\}$", r"\1/\2", gold),
        re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold),
        re.sub(r"_\{?(\d)\}?", r"_{\1}", gold),
    }


@needs_data
def test_gold_answers_of_math_500_are_right_in_other_typography():
    golds = sorted({problem["answer"] for problem in lines("math500_test.jsonl")})
    wrong = [
        (gold, spelling)
        for gold in golds
        for spelling in sorted(spellings(gold))
        if not grade_math(in_box(spelling), gold).correct
    ]
    assert wrong == []


def unit_free(gold: str) -> str:
    """What remains of a gold answer of MATH-500 once units and typography are gone."""
    bare = re.sub(r"\\(?:mbox|text)\{ .*\}.*|\^\\circ|\\\$|\\!|\s|[{}]|^x=", "", gold)
    return re.sub(r"^(\d+)_\d$", r"\1", re.sub(r"(?<=\d),(?=\d{3})", "", bare))


@pytest.mark.slow
@needs_data
def test_other_gold_answers_of_math_500_are_wrong():
    """All pairs: a unit, a base and the order of two numbers in a list alone may differ."""
    golds = sorted({problem["answer"] for problem in lines("math500_test.jsonl")})
    alike = [
        (gold, other)
        for gold, other in itertools.permutations(golds, 2)
        if unit_free(gold) != unit_free(other) and grade_math(in_box(other), gold).correct
    ]
    assert alike == EQUAL
