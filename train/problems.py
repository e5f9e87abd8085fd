r"""Arithmetic word problems with worked answers, for training and grading the tiny demo model.

Decides the text of a problem, the steps of its answer, and the split of a question. Every word of
an answer follows from its question. Knows no tokens, chats or models.
"""

import contextlib
import hashlib
import itertools
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

SPLITS = ("train", "held-out")
HELD_OUT_ONE_IN = 16
SMALLEST, LARGEST = 2, 150  # range of all values; from 2 up, so that plurals are correct
OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "x": operator.mul,
    "/": operator.floordiv,  # drawn only where the division is exact
}
FIRST = {"=": (8, 60), "x": (2, 9), "+": (5, 40), "-": (20, 90)}  # first operands, inclusive
GIRLS = "Mia Anna Lena Zoe Ruth Ella Nora Ivy Clara Sara Alice Emma Rosa Lucy Maya Tara Hana Jane"
BOYS = "Ben Tom Leo Sam Max Omar Paul Jack Noah Adam Carl Luis Finn Hugo Ivan Dan Mark Ali Peter"
PRONOUNS = dict.fromkeys(GIRLS.split(), ("she", "her")) | dict.fromkeys(BOYS.split(), ("he", "him"))
JOINS = (". ", ". Then ", ". After that, ", ". Next, ", ". Later, ", ", and then ")
LAST_JOINS = (". ", ". Finally, ", ". In the end, ")
WRAPS = ("Can you work out {}?", "Find out {}.", "Tell me {}.", "Do you know {}?", "Work out {}.")

# A story is a block of records; an indented line continues the record above it.
#   slot: value, value, ...           a word drawn once per problem; {t} names the counted things
#   start OP: text | text -> worked   the first value; a text that begins with "~" follows the steps
#   step OP: text | text -> worked    a change of the running value
#   end OP: text. ask | ... -> worked => final     the question; an ask from "&" on is wrapped
# OP is = (given), . (nothing), + - x /, < (n minus the value), x2 x3 /2 (spelt out in words), or
# +x -x (a product {m} x {k} = {mul}, then added or subtracted). {a} and {n} are the operands,
# {eq} the equation, {f} a friend, {s} and {him} the subject: by {name} once, then by pronoun.
# The slots of a worked or final text occur in every text of its record, or in every start.
STORIES_TEXT = """
t: shells, stickers, marbles, buttons, stamps, beads, acorns, cards
boxes: boxes, bags, jars, tins
start =: {s} has {a} {t} | {s} owns {a} {t} | ~at first {s} had {a} {t} -> {s} starts with {a} {t}.
start x: {s} keeps {a} {boxes} with {n} {t} in each | ~at first {s} had {a} {boxes} with {n} {t} in
  each -> The {a} {boxes} hold {eq} {t}.
start +: {s} collects {a} {t} at dawn and {n} at noon -> In all {s} collects {eq} {t}.
step +: {s} finds {n} more {t} | {s} finds another {n} {t} -> Finding {n} more makes {eq} {t}.
step +: {s} gets {n} {t} from {f} -> With the {n} from {f}, {s} has {eq} {t}.
step -: {s} gives {n} {t} to {f} | {s} hands {n} {t} to {f} -> Giving {n} to {f} leaves {eq} {t}.
step +x: {s} buys {m} packs of {k} {t} -> The {m} packs hold {mul} {t}. That makes {eq} {t}.
step /2: {s} swaps half of the {t} for a toy -> Half of them go, so {s} keeps {eq} {t}.
end .: How many {t} does {s} have now? | &how many {t} {s} has now => {name} now has {box} {t}.
end /: {s} shares all the {t} equally among {n} friends. How many does each friend get? -> The {n}
  friends get {eq} {t} each. => Each friend gets {box} {t}.
end <: {s} wants to have {n} {t}. How many more {t} does {s} need? | {s} hopes to get to {n} {t}.
  How many does {s} need? -> To reach {n}, {s} needs {eq} more. => {name} needs {box} more {t}.
---
name: the red bus, the school bus, the city tram, the night bus, the ferry, the slow train
t: people, passengers, children, tourists, students
place: market, museum, park, bridge
stop: harbor, church, school, stadium
start =: {s} leaves with {a} {t} on board | ~first {s} had {a} {t} -> At first {s} has {a} {t}.
start +: {s} leaves with {a} {t} in the front and {n} in the back -> Front and back carry {eq} {t}.
step +: {n} more {t} get on at the {place} | at the {place} {n} more {t} get on -> When {n} get on
  at the {place}, there are {eq} {t}.
step -: {n} {t} get off at the {stop} | at the {stop} {n} of the {t} get off -> At the {stop} {n}
  get off and {eq} {t} stay.
step +x: {m} groups of {k} {t} climb in -> The {m} groups bring {mul} {t}. Now {eq} {t} ride.
step -x: {m} groups of {k} {t} step out -> The {m} groups are {mul} {t}. So {eq} {t} ride on.
step /2: half of the {t} leave at the old tower -> When half of them leave, {eq} {t} are on board.
end .: How many {t} does {s} carry now? | &how many {t} {s} carries now => {name} carries {box} {t}.
end x: each of the {t} on board pays {n} coins. How many coins do they pay? -> At {n} coins each
  they pay {eq} coins. => All of them pay {box} coins.
end <: {s} has room for {n} {t}. How many more {t} can get on? -> There is room for {n}, so {eq}
  places are free. => There is room for {box} more {t}.
---
t: muffins, rolls, cookies, pies, buns, pretzels, waffles
trays: trays, plates, baskets
start x: {s} bakes {a} {trays} of {n} {t} | {s} fills {a} {trays} with {n} {t} each -> This is {eq}.
start =: {s} bakes {a} {t} | ~before dawn {s} had baked {a} {t} -> {s} begins with {a} {t}.
start -: {s} bakes {a} {t} but burns {n} of them -> Without the burnt ones {s} has {eq} {t}.
step -: {s} sells {n} {t} before noon -> After selling {n}, {s} has {eq} {t}.
step -: {s} sends {n} {t} to a cafe | a cafe takes {n} {t} -> The cafe gets {n} and leaves {eq} {t}.
step +: {s} bakes {n} extra {t} -> Baking {n} extra gives {him} {eq} {t}.
step -x: {s} packs {m} bags of {k} {t} for {f} -> The bags for {f} hold {mul} {t}. So {eq} are left.
step /2: {s} sells half of the {t} to {f} -> {f} buys half, so {eq} {t} are left.
end .: How many {t} does {s} still have? | &how many {t} {s} still has => {name} has {box} {t} left.
end x: {s} sells all the remaining {t} for {n} cents each. How many cents does {s} earn? -> At {n}
  cents each they bring {eq} cents. => {name} earns {box} cents.
end /: {s} spreads the {t} evenly over {n} shelves. How many {t} lie on each shelf? -> Over {n}
  shelves that is {eq} {t}. => Each shelf holds {box} {t}.
---
t: dollars, euros, coins, pounds, tokens
ware: a book, a kite, a hat, a game, a ball, a lamp
job: washing cars, walking dogs, cutting grass, selling lemonade
start =: {s} owns {a} {t} | {s} saves {a} {t} | ~first {s} had {a} {t} -> {s} starts with {a} {t}.
start x: {s} works {a} days for {n} {t} a day -> For {a} days of work {s} gets {eq} {t}.
start -: {s} has {a} {t} and owes {n} of them to {f} -> After paying {f}, {s} has {eq} {t}.
step +: {s} earns {n} {t} by {job} -> By {job} {s} gets to {eq} {t}.
step +: {s} gets {n} {t} as a gift -> The gift of {n} makes it {eq} {t}.
step -: {s} spends {n} {t} on {ware} | {s} buys {ware} for {n} {t} -> Buying {ware} leaves {eq} {t}.
step -: {s} lends {n} {t} to {f} -> Lending {n} to {f} leaves {eq} {t}.
step -x: {s} buys {m} tickets for {k} {t} each -> They cost {mul} {t}. That leaves {eq} {t}.
step x2: {s} doubles the money at a fair -> Doubling the money gives {eq} {t}.
end .: How much money does {s} have now? | &how much money {s} has left => {name} has {box} {t}.
end /: {s} spends it all on pens that cost {n} {t} each. How many pens does {s} get? -> At {n} {t}
  each, {s} gets {eq} pens. => {name} buys {box} pens.
end <: {s} wants a bike for {n} {t}. How much money is missing? -> For the bike {s} needs {eq} {t}.
  => {name} needs {box} more {t}.
---
t: eggs, pears, carrots, melons, onions, pumpkins, lemons
crates: crates, sacks, carts, pails
start =: {s} gathers {a} {t} on the farm | ~at dawn {s} had {a} {t} -> {s} starts with {a} {t}.
start x: {s} fills {a} {crates} with {n} {t} each -> In {a} {crates} there are {eq} {t}.
start +: {s} gathers {a} {t} and {f} gathers {n} for {him} -> With {f} {s} gathers {eq} {t}.
step -: {n} of the {t} go bad -> Once {n} go bad, {eq} {t} are good.
step -: {s} feeds {n} {t} to the goats | goats eat {n} of the {t} -> The goats leave {eq} {t}.
step -: {s} takes {n} {t} to the market -> With {n} at the market, {s} keeps {eq} {t}.
step +: {s} picks {n} {t} in the far field -> The far field makes it {eq} {t}.
step +x: {s} trades milk for {m} sacks of {k} {t} -> The milk brings {mul} {t}. This makes {eq}.
step x3: {s} triples the {t} by dusk -> By dusk there are three times as many: {eq} {t}.
end .: How many {t} does {s} have at dusk? | &how many {t} {s} has at dusk => {name} has {box} {t}.
end /: {s} packs the {t} into {n} equal {crates}. How many {t} are in one of them? -> Each of the
  {n} {crates} takes {eq} {t}. => One holds {box} {t}.
end -: {f} has only {n} {t}. How many more than {f} does {name} have? -> {s} is ahead of {f} by {eq}
  {t}. => {name} has {box} more than {f}.
---
name: the tank, the barrel, the vat, the tub, the old drum
t: liters of water, liters of juice, gallons of oil, gallons of paint, pints of milk
start =: {s} holds {a} {t} | ~at first {s} held {a} {t} -> At first {s} holds {a} {t}.
start +: {f} pours {a} and then {n} {t} into {s} -> {f} pours in {eq} {t}.
start -: {s} should hold {a} {t} but lacks {n} of them -> Lacking {n}, it holds {eq} {t}.
step -: {n} {t} leak out | a leak wastes {n} {t} -> The leak leaves {eq} {t}.
step -: {f} drains {n} {t} -> When {f} drains {n}, {eq} {t} remain.
step +: {f} pumps in {n} {t} | a pump adds {n} {t} -> Pumping in {n} makes {eq} {t}.
step +x: a hose adds {k} {t} a minute for {m} minutes -> It adds {mul}. This makes {eq} {t}.
step -x: {m} buckets of {k} {t} are taken out -> The buckets take {mul}. This leaves {eq} {t}.
step /2: half of it is used up -> Using half leaves {eq} {t}.
end .: How full is {s} now? | &how much is left in {s} => There are {box} {t} in it.
end /: it all goes into {n} equal cans. How much is in each? -> Each gets {eq} {t}. => It is {box}
  {t}.
end <: {s} can hold {n} {t}. How much more fits in? -> Now {eq} {t} fit. => It takes {box} more {t}.
---
task: homework, piano, painting, training, cooking, cleaning
pause: a nap, lunch, a call, a film
start =: {s} plans {a} minutes of {task} | ~the plan was {a} minutes of {task} -> It is {a} minutes.
start +: {s} spends {a} minutes on {task} and {n} on {pause} -> With {pause} it takes {eq} minutes.
start x: {s} does {a} rounds of {task}, {n} minutes each -> The {a} rounds take {eq} minutes.
step +: {s} waits {n} minutes for {f} -> Waiting for {f} makes it {eq} minutes.
step +: {s} rests for {n} minutes | {s} naps for {n} minutes -> The rest makes it {eq} minutes.
step -: {f} helps and saves {him} {n} minutes -> The help cuts it to {eq} minutes.
step -: {s} stops {n} minutes early -> Stopping {n} early leaves {eq} minutes.
step +x: {s} sings {m} songs of {k} minutes -> They last {mul} minutes. This makes {eq} minutes.
step x2: {s} does it all twice -> Doing it all twice takes {eq} minutes.
end .: How many minutes does {s} need? | &how many minutes {s} needs => {name} needs {box} minutes.
end /: {s} splits the time over {n} equal days. How many is that a day? -> Over {n} days it is {eq}
  minutes a day. => {name} needs {box} minutes a day.
end <: {s} has {n} minutes. How many are left over? -> Out of {n}, {s} keeps {eq} minutes. => {name}
  has {box} minutes left over.
"""


@dataclass(frozen=True)
class WordProblem:
    """A word problem, its worked answer ending in a boxed number, and that number."""

    question: str
    answer: str
    result: int


@dataclass(frozen=True)
class Part:
    """One record of a story: the texts of a fact in the question, and its step in the answer."""

    op: str
    texts: tuple[str, ...]
    worked: str
    final: str

    @property
    def cost(self) -> int:
        """Number of equations in the worked text."""
        return self.worked.count("{eq}") + self.worked.count("{mul}")


@dataclass(frozen=True)
class Story:
    """The words and the parts of one kind of story."""

    slots: Mapping[str, Sequence[str]]
    starts: Sequence[Part]
    steps: Sequence[Part]
    ends: Sequence[Part]


class _NoFitError(Exception):
    """The drawn numbers leave the range or do not divide; draw again."""


def _parse_story(text: str) -> Story:
    slots: dict[str, Sequence[str]] = {}
    parts: dict[str, list[Part]] = {"start": [], "step": [], "end": []}
    for record in re.split(r"\n(?!\s)", text.strip()):
        head, body = " ".join(record.split()).split(": ", 1)
        role, *op = head.split()
        if not op:
            slots[role] = body.split(", ")
            continue
        body, _, final = body.partition(" => ")
        texts, _, worked = body.partition(" -> ")
        parts[role].append(Part(op[0], tuple(texts.split(" | ")), worked, final))
    return Story(slots, parts["start"], parts["step"], parts["end"])


STORIES = tuple(_parse_story(text) for text in STORIES_TEXT.split("---"))


def _draw_parts(story: Story, rng: random.Random) -> list[Part]:
    """A start, steps and an end with 2 to 4 equations in total; no part occurs twice."""
    start, end = rng.choice(story.starts), rng.choice(story.ends)
    room = rng.choices((2, 3, 4), (35, 40, 25))[0] - start.cost - end.cost
    steps = []
    for step in rng.sample(story.steps, len(story.steps)):
        if step.cost <= room:
            steps.append(step)
            room -= step.cost
    return [start, *steps, end]


def _second_operand(sign: str, value: int, rng: random.Random) -> int:
    """A small operand for `value`; _NoFitError where no small number divides it."""
    if sign == "x":
        return rng.randint(2, 9 if value < 10 else 5)
    if sign == "/":
        divisors = [n for n in range(2, 7) if value % n == 0]
        if not divisors:
            raise _NoFitError
        return rng.choice(divisors)
    return rng.randint(2, rng.choice((9, 40))) + (value if sign == "<" else 0)


def _equation(left: int, sign: str, right: int) -> tuple[int, str]:
    """The result and the equation's text; _NoFitError where it is inexact or out of range."""
    result = OPERATIONS[sign](left, right)
    inexact = sign == "/" and left % right
    if inexact or not SMALLEST <= result <= LARGEST or max(left, right) > LARGEST:
        raise _NoFitError
    return result, f"{left} {sign} {right} = {result}"


def _work(op: str, value: int, rng: random.Random) -> tuple[int, dict[str, str]]:
    """Draw the operands of `op` on `value`; return the new value and the part's numbers by slot."""
    words = {"a": str(value)}
    if op in "=.":
        return value, words
    sign, rest = op[0], op[1:]
    if rest == "x":
        m, k = rng.randint(2, 6), rng.randint(2, 9)
        n, product = _equation(m, "x", k)
        words |= {"m": str(m), "k": str(k), "mul": product}
    else:
        n = int(rest) if rest else _second_operand(sign, value, rng)
    result, equation = _equation(n, "-", value) if sign == "<" else _equation(value, sign, n)
    return result, words | {"n": str(n), "eq": equation}


def _fill(text: str, words: Mapping[str, str]) -> str:
    """Fill the slots in `words`; the subject's slots stay for `_polish`."""
    return re.sub(r"\{(\w+)\}", lambda slot: words.get(slot[1], slot[0]), text)


def _polish(text: str, name: str) -> str:
    """Name the subject once, then use pronouns; begin sentences with a capital."""
    he, him = PRONOUNS.get(name, ("it", "it"))
    text = re.sub(r"\{(s|him)\}", name, text, count=1)
    text = _fill(text, {"s": he, "him": him})
    return re.sub(r"(?:^|[.?]\s+)[a-z]", lambda begin: begin[0].upper(), text)


def _draw_texts(
    parts: Sequence[Part], numbers: Sequence[dict[str, str]], rng: random.Random
) -> list[str]:
    """A drawn text of each part, with its numbers filled in."""
    has_steps = len(parts) > 2
    texts = [rng.choice([t for t in p.texts if has_steps or t[0] != "~"]) for p in parts]
    return list(map(_fill, texts, numbers))


def _question(texts: Sequence[str], rng: random.Random) -> str:
    """Join the texts of the parts, in a drawn order, with drawn words."""
    start, *steps, end = texts
    *last_facts, ask = end.split(". ")
    if ask.startswith("&"):
        ask = rng.choice(WRAPS).format(ask[1:])
    late = start.startswith("~")
    first, *rest = steps if late else [start, *steps]
    text = first + "".join(rng.choice(JOINS) + fact for fact in rest)
    text += f". {start[1:]}" if late else ""
    text += "".join(rng.choice(LAST_JOINS) + fact for fact in last_facts)
    return f"{ask} {text}." if rng.random() < 0.2 else f"{text}. {ask}"


def _answer(parts: Sequence[Part], numbers: Sequence[dict[str, str]], texts: Sequence[str]) -> str:
    """Work one part per line, each after its text from the question, the way chat models do."""
    lines: list[str] = []
    for part, words, fact in zip(parts, numbers, texts, strict=True):
        if part.worked:
            fact = "" if part is parts[-1] else f"We know that {fact.lstrip('~')}. "
            lines.append(f"Step {len(lines) + 1}: {fact}{_fill(part.worked, words)}")
    body = "\n".join(lines)
    return f"Let us solve this step by step.\n\n{body}\n\nSo this is the answer: {parts[-1].final}"


def _draw_problem(story: Story, rng: random.Random) -> WordProblem:
    """One problem of this story; _NoFitError where the drawn numbers do not fit."""
    parts = _draw_parts(story, rng)
    value = rng.randint(*FIRST[parts[0].op])
    numbers = []
    for part in parts:
        value, part_numbers = _work(part.op, value, rng)
        numbers.append(part_numbers)
    name, friend = rng.sample(list(PRONOUNS), 2)
    words = {"name": name, "f": friend, "box": rf"\boxed{{{value}}}"}
    words |= {slot: rng.choice(values) for slot, values in story.slots.items()}
    texts = _draw_texts(parts, numbers, rng)
    question = _fill(_question(texts, rng), words)
    answer = _fill(_answer(parts, numbers, texts), words)
    return WordProblem(_polish(question, words["name"]), _polish(answer, words["name"]), value)


def make_problem(rng: random.Random) -> WordProblem:
    """Draw one problem of 2 to 4 operations, all values within SMALLEST..LARGEST."""
    story = rng.choice(STORIES)
    while True:
        with contextlib.suppress(_NoFitError):
            return _draw_problem(story, rng)


def split_of(question: str) -> str:
    """The split of a question, the same on every machine and in every run."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN else "held-out"


def _draw_split(split: str, seed: int) -> Iterator[WordProblem]:
    rng = random.Random(
        f"{split} {seed}"
    )  # seeded by text, so that the splits draw different streams
    seen: set[str] = set()
    while True:
        problem = make_problem(rng)
        if problem.question not in seen and split_of(problem.question) == split:
            seen.add(problem.question)
            yield problem


def problems(split: str, seed: int, count: int | None = None) -> Iterator[WordProblem]:
    """Draw `count` problems of a split, or endlessly; no question occurs twice.

    A split and a seed always give the same problems.

    Raises:
      ValueError: for a split that is not in SPLITS, and for a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if count is not None and count < 0:
        raise ValueError(f"count must not be negative, not {count}")
    return itertools.islice(_draw_split(split, seed), count)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} of `text`; None if there is none or it is not closed."""
    _, opening, rest = text.rpartition(r"\boxed{")
    depth = 1
    for place, letter in enumerate(rest if opening else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:place]
    return None


def is_correct(text: str, problem: WordProblem) -> bool:
    """Whether the last box of `text` holds exactly the result, surrounding spaces aside."""
    answer = boxed(text)
    return answer is not None and answer.strip() == str(problem.result)
