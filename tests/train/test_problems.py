"""Properties of every word problem: true arithmetic, answers that follow from the question,
splits that share no question, and varied texts. Draws a few thousand, seeded."""

import dataclasses
import itertools
import random
import re
from collections import Counter

import pytest

from train import problems as wp

EQUATION = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+)")
SLOT = re.compile(r"\{(\w+)\}")
COMPUTED = {
    "eq",
    "mul",
    "s",
    "him",
    "name",
    "box",
}  # need not occur in the question; {name}: see below
SLOT_WORDS = {word for story in wp.STORIES for values in story.slots.values() for word in values}


@pytest.fixture(scope="module")
def drawn() -> list[wp.WordProblem]:
    rng = random.Random(7)
    return [wp.make_problem(rng) for _ in range(6000)]


def skeleton(question: str) -> str:
    """The question with its numbers, names and slot words blanked."""
    words = sorted(SLOT_WORDS | set(wp.PRONOUNS), key=len, reverse=True)
    blanked = re.sub(rf"\b({'|'.join(words)})\b", "_", question, flags=re.IGNORECASE)
    return re.sub(r"\d+", "#", re.sub(r"\b(he|she|him|her)\b", "_", blanked, flags=re.IGNORECASE))


def slots_of_texts(record: wp.Part) -> list[set[str]]:
    return [set(SLOT.findall(text)) for text in record.texts]


def test_equations_are_true_and_in_range(drawn: list[wp.WordProblem]) -> None:
    for problem in drawn:
        equations = EQUATION.findall(problem.answer)
        assert len(equations) == problem.answer.count("=")
        assert 2 <= len(equations) <= 4, problem
        for left, sign, right, result in equations:
            a, b, c = int(left), int(right), int(result)
            assert c * b == a if sign == "/" else c == {"+": a + b, "-": a - b, "x": a * b}[sign]
            assert all(2 <= number <= 150 for number in (a, b, c)), problem


def test_box_ends_the_answer_with_the_last_value(drawn: list[wp.WordProblem]) -> None:
    for problem in drawn:
        last = EQUATION.findall(problem.answer)[-1][3]
        assert last == str(problem.result) == wp.boxed(problem.answer)
        assert problem.answer.count(r"\boxed{") == 1
        assert wp.is_correct(problem.answer, problem)
        assert r"\boxed{" in problem.answer.split("\n\n")[-1]


def test_computed_numbers_mostly_have_two_digits(drawn: list[wp.WordProblem]) -> None:
    digits = Counter(len(e[3]) for p in drawn for e in EQUATION.findall(p.answer))
    assert digits[2] > 0.75 * digits.total()
    assert max(Counter(p.result for p in drawn).values()) < 0.05 * len(drawn)


def test_operations_and_step_counts_are_all_common(drawn: list[wp.WordProblem]) -> None:
    signs = Counter(e[1] for p in drawn for e in EQUATION.findall(p.answer))
    steps = Counter(len(EQUATION.findall(p.answer)) for p in drawn)
    assert min(signs[sign] for sign in "+-x/") > 0.08 * signs.total(), signs
    assert set(steps) == {2, 3, 4}
    assert min(steps.values()) > 0.12 * len(drawn), steps


def test_operands_occur_in_the_question(drawn: list[wp.WordProblem]) -> None:
    number_words = re.compile(r"half|doubl|tripl|as many again|twice|the whole way", re.IGNORECASE)
    for problem in drawn:
        given = Counter(re.findall(r"\d+", problem.question))
        equations = EQUATION.findall(problem.answer)
        used = Counter(number for e in equations for number in (e[0], e[2]))
        computed = Counter(e[3] for e in equations)
        unexplained = used - given - computed
        spoken = 2 * len(number_words.findall(problem.question))
        assert unexplained.total() <= spoken, problem
        assert set(unexplained) <= {"2", "3"}, problem


def test_text_is_plain_filled_and_well_formed(drawn: list[wp.WordProblem]) -> None:
    for problem in drawn:
        for text in (problem.question, problem.answer.replace(r"\boxed{", "").replace("}", "")):
            assert text.isascii()
            assert not re.search(r"[{}~&|>]|  |\.\.|\?\.| for s?he\b|^[a-z]|[.?] [a-z]", text), text
            assert text[-1] in ".?"


def test_question_skeletons_vary(drawn: list[wp.WordProblem]) -> None:
    skeletons = Counter(skeleton(problem.question) for problem in drawn)
    assert len(skeletons) > 0.7 * len(drawn), len(skeletons)
    assert skeletons.most_common(1)[0][1] < 0.005 * len(drawn), skeletons.most_common(3)
    assert len(wp.STORIES) >= 7


@pytest.mark.parametrize("story", wp.STORIES, ids=lambda story: str(story.slots)[:40])
def test_worked_texts_use_only_slots_of_the_question(story: wp.Story) -> None:
    in_every_start = set.intersection(*itertools.chain(*map(slots_of_texts, story.starts)))
    for part in (*story.starts, *story.steps, *story.ends):
        needed = set(SLOT.findall(part.worked + part.final)) - COMPUTED - in_every_start
        for slots in slots_of_texts(part):
            assert needed <= slots, part
    for parts in (story.starts, story.steps, story.ends):
        texts = [text for part in parts for text in part.texts]
        assert len(texts) == len(set(texts))


def test_names_in_the_answer_occur_in_the_question(drawn: list[wp.WordProblem]) -> None:
    for problem in drawn:
        names = {w for w in re.findall(r"\w+", problem.answer) if w in wp.PRONOUNS}
        assert names <= set(re.findall(r"\w+", problem.question)), problem


def test_equal_questions_have_equal_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Few values to draw from, so that questions repeat while their hidden draws may differ.
    monkeypatch.setattr(wp, "PRONOUNS", {"Mia": ("she", "her"), "Ben": ("he", "him")})
    monkeypatch.setattr(wp, "FIRST", dict.fromkeys(wp.FIRST, (8, 8)) | {"-": (40, 40)})
    for joins in ("JOINS", "LAST_JOINS"):
        monkeypatch.setattr(wp, joins, (". ",))
    short = [{slot: words[:2] for slot, words in story.slots.items()} for story in wp.STORIES]
    stories = [dataclasses.replace(s, slots=w) for s, w in zip(wp.STORIES, short, strict=True)]
    monkeypatch.setattr(wp, "STORIES", stories)
    rng = random.Random(3)
    answers: dict[str, str] = {}
    again = 0
    for _ in range(12000):
        problem = wp.make_problem(rng)
        again += problem.question in answers
        assert answers.setdefault(problem.question, problem.answer) == problem.answer
    assert again > 100


def test_seeds_reproduce_and_differ() -> None:
    for split in wp.SPLITS:
        first = list(wp.problems(split, 5, 60))
        assert first == list(itertools.islice(wp.problems(split, 5), 60))
        assert first != list(wp.problems(split, 6, 60))


def test_splits_are_disjoint_and_distinct() -> None:
    held_out = [p.question for p in wp.problems("held-out", 1, 300)]
    train = [p.question for p in wp.problems("train", 1, 3000)]
    assert len(set(held_out)) == 300
    assert len(set(train)) == 3000
    assert {wp.split_of(question) for question in held_out} == {"held-out"}
    assert {wp.split_of(question) for question in train} == {"train"}


def test_repeated_question_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        wp, "make_problem", lambda rng: wp.WordProblem(f"question {rng.randrange(54)}", "", 0)
    )
    held_out = [p.question for p in wp.problems("held-out", 0, 6)]
    assert sorted(held_out) == sorted(f"question {n}" for n in (3, 21, 36, 42, 49, 53))


def test_split_of_a_question_never_changes() -> None:
    # Pinned: a changed hash would put trained questions into the held-out split.
    assert [wp.split_of(f"question {n}") for n in (3, 21, 36)] == ["held-out"] * 3
    assert wp.split_of("question 0") == "train"


def test_held_out_split_has_one_question_in_sixteen(drawn: list[wp.WordProblem]) -> None:
    share = Counter(wp.split_of(p.question) for p in drawn)["held-out"] / len(drawn)
    assert 1 / 20 < share < 1 / 12


def test_bad_arguments_raise_at_the_call() -> None:
    with pytest.raises(ValueError, match="train, held-out"):
        wp.problems("test", 0, 1)
    with pytest.raises(ValueError, match="-1"):
        wp.problems("train", 0, -1)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{}", ""),
        ("no box, 12", None),
        ("", None),
        (r"\boxed{12", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{a{b}", None),
    ],
)
def test_boxed_returns_the_last_closed_box(text: str, content: str | None) -> None:
    assert wp.boxed(text) == content


def test_is_correct_requires_the_exact_number_in_the_last_box() -> None:
    problem = wp.WordProblem("?", r"\boxed{12}", 12)
    assert wp.is_correct(r"It is \boxed{ 12 }.", problem)
    for wrong in (r"\boxed{13}", r"\boxed{012}", r"\boxed{12} no, \boxed{3}", "12", r"\boxed{12"):
        assert not wp.is_correct(wrong, problem)
