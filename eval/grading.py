r"""Grade a model's answer: the last \boxed{...} of its text against the gold answer.

Numbers and words are compared here, exactly; all other mathematics by math-verify. That runs in a
process of its own, kept for the next question and killed when one takes too long, so grading works
in any thread and neither hangs nor crashes, whatever the model wrote. Knows no benchmark and no
file.
"""

import atexit
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from orthrus_jax.errors import UserError

WORKER = pathlib.Path(__file__).with_name("grading_worker.py")
SECONDS = 10.0  # for one comparison; most take milliseconds
LONGEST = 2000  # characters of an answer; the longest gold answer of MATH-500 has 53

SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "²": "^2",
        "³": "^3",
        "°": r"^\circ ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "\N{UNION}": r"\cup ",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∅": r"\emptyset ",
    }
)
# Rewrites of LaTeX that math-verify misreads.
REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\?\$|\\!\s*|(?<!\\)\\[()]|^\s*\\\[|\\\]\s*$", ""),  # dollars, delimiters, kerning
        (r"^\s*\\approx(?![a-zA-Z])", ""),
        (r"(?<!\\right)(?<!\\left)[.,;]\s*$", ""),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"^\s*[a-zA-Z]\s*\\in(?![a-zA-Z])", ""),
        (r"√\s*\(([^()]*)\)|√\s*(\d+|\w)", r"\\sqrt{\1\2}"),
        (r"(?<=\d)(?:\\[,;: ]|~|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),
        (r"^\s*(-?\d+)\s+(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),
        (r"\\\\\[[^\]]*\]", r"\\\\"),  # the height of a matrix row
    )
)
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d{1,50})\}")
GROUPED = r"\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+"
NUMBER = re.compile(rf"[-+]?\s*(?:(?:{GROUPED})(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?", re.ASCII)
IN_PROSE = re.compile(rf"(?:(?<![\w.)])-)?\$?(?:{GROUPED.replace(' ', '')})(?:\.\d+)?", re.ASCII)
WITH_BASE = re.compile(r"\(?(\d+)\)?_\{?(\d+)\}?", re.ASCII)
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# Possessive, or a long answer would take for ever. One bare letter is a variable: 5x is not 5.
UNIT = re.compile(
    r"(?:\\?%|\^\{?(?:\\circ|[23])\s*\}?|\\[,;: ]|[~\s./]|[a-zA-Z]{2,}+"
    r"|\\(?:text|textbf|mathrm|mbox)\s*\{[^{}\d]*\})*+"
)


@dataclass(frozen=True)
class Grade:
    """A verdict, the answer (None: no box), and why it could not be graded, if so."""

    correct: bool
    answer: str | None
    note: str = ""


class _Worker:
    """The process of `eval.grading_worker`: started on first use, replaced when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            # The order of sympy's sets depends on hashes: a fixed seed makes grades repeatable.
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for us to handle
        )
        self._process, self._owner = process, os.getpid()
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise UserError(
                f"the grading process did not start (exit {self._end()}): "
                "is it installed? pip install 'math-verify[antlr4_13_2]'"
            )
        return process

    def _end(self) -> int:
        """Stop the process, if there is one and it is ours (not a fork's parent's)."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        process.kill()
        assert process.stdin
        assert process.stdout
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:  # its buffer cannot be sent
                continue
        return process.wait()

    def ask(self, answer: str, gold: str) -> str:
        """The worker's answer, or why there is none."""
        question = json.dumps({"answer": answer, "gold": gold, "seconds": SECONDS})
        with self._lock:
            process = self._process
            if process is None or self._owner != os.getpid() or process.poll() is not None:
                self._end()
                process = self._start()
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(question + "\n")
                process.stdin.flush()
                word = process.stdout.readline().strip()
            except OSError:  # it ended
                word = ""
            except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
                self._end()
                raise
            if word:
                return word
            code = process.wait()
            self._end()
            return "took too long" if code == 1 else f"math-verify crashed (exit {code})"

    def close(self) -> None:
        with self._lock:
            self._end()


_worker = _Worker()
atexit.register(_worker.close)


def final_answer(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} of `text`, the inner one of two nested."""
    opened: list[int] = []  # where each open brace's content begins; negative for a plain brace
    begin, end = -1, -1
    for token in re.finditer(r"\\{1,2}boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if "boxed" in token[0] else -1)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > begin:
                begin, end = start, token.start()
    return text[begin:end].strip() if begin >= 0 else None


def _fraction(repeating: re.Match[str]) -> str:
    whole, fixed, period = repeating.groups()
    nines = 10 ** len(period) - 1
    value = int(whole + fixed or "0") + Fraction(int(period), nines)
    value /= 10 ** len(fixed)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _tidy(latex: str) -> str:
    latex = latex.translate(SYMBOLS)
    for pattern, by in REWRITES:
        latex = pattern.sub(by, latex)
    return REPEATING.sub(_fraction, latex).strip()


def _number(tidy: str) -> Decimal | None:
    """The value of a plain decimal number; None for all other mathematics."""
    if not NUMBER.fullmatch(tidy):
        return None
    return Decimal(re.sub(r"[,\s]", "", tidy))


def _words(latex: str) -> str:
    r"""The letters and digits of a text answer: (C), \text{C} and \textbf{(c)} are the same."""
    return re.sub(r"[\W_]", "", TEXT.sub(r"\1", latex)).casefold()


def _same_in_base(answer: str, gold: str) -> bool | None:
    """Compare where a base is written: 52_8 is 52 in a question about base 8, and never 52_7."""
    left, right = WITH_BASE.fullmatch(answer), WITH_BASE.fullmatch(gold)
    if left and right:
        return left.groups() == right.groups()
    if right and answer.isdecimal():
        return answer == right[1]
    return False if left and _number(gold) is not None else None


def _compare(answer: str, gold: str) -> bool | None:
    """Decide numbers, words and equal spellings; None: a question for math-verify."""
    if re.sub(r"\s", "", answer) == re.sub(r"\s", "", gold):
        return True
    if TEXT.fullmatch(gold) and _words(gold):
        return _words(answer) == _words(gold)
    left, right = _number(answer), _number(gold)
    if left is not None and right is not None:  # math-verify rounds to six places
        return left == right
    return _same_in_base(answer, gold)


def grade_math(text: str, gold: str) -> Grade:
    r"""Grade the last \boxed{...} of `text` against a gold answer in LaTeX, as MATH-500 has them.

    Without a box the answer is wrong: nothing is guessed from the rest of the text.
    """
    answer = final_answer(text)
    if answer is None:
        return Grade(False, None, "no box")
    if not answer:
        return Grade(False, answer, "empty box")
    if len(answer) > LONGEST:
        return Grade(False, answer, "too long")
    tidy, wanted = _tidy(answer), _tidy(gold)
    same = _compare(tidy, wanted)
    if same is not None:
        return Grade(same, answer)
    word = _worker.ask(tidy, wanted)
    return Grade(word == "yes", answer, "" if word in ("yes", "no") else word)


def grade_integer(text: str, gold: str, *, last_number: bool = False) -> Grade:
    r"""Grade a whole number exactly, as AIME and GSM8K ask: 025, 25.0 and \$25 are all 25.

    It is the last \boxed{...}; with `last_number` (GSM8K), and only where there is no box, the last
    number of the text. Raises ValueError for a gold answer that is no integer.
    """
    wanted = _number(_tidy(gold))
    if wanted is None or wanted != wanted.to_integral_value():
        raise ValueError(f"a gold answer must be an integer, not {gold!r}")
    answer = final_answer(text)
    if answer is None and last_number:
        numbers = IN_PROSE.findall(text.translate(SYMBOLS))
        answer = numbers[-1] if numbers else None
        if answer is None:
            return Grade(False, None, "no number")
    if answer is None:
        return Grade(False, None, "no box")
    if len(answer) > LONGEST:
        return Grade(False, answer, "too long")
    tidy = _tidy(answer).rpartition("=")[2].strip()
    emphasised = TEXT.fullmatch(tidy)
    tidy = (emphasised[1] if emphasised else tidy).strip()
    while len(tidy) > 1 and tidy[0] + tidy[-1] in ("()", "{}"):
        tidy = tidy[1:-1].strip()
    number = NUMBER.match(tidy)
    value = _number(number[0]) if number and UNIT.fullmatch(tidy, number.end()) else None
    return Grade(value == wanted, answer, "" if value is not None else "not a number")
