r"""Grade a model's answer: the last \boxed{...} of its text against the gold answer.

Numbers and words are compared here, exactly; all other mathematics by math-verify. That runs in a
process of its own, kept for the next question and killed when one takes too long, so grading works
in any thread and neither hangs nor crashes, whatever the model wrote. Knows no benchmark and no
file; spellings are notation.py.
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

from eval import notation
from orthrus_jax.errors import UserError

WORKER = pathlib.Path(__file__).with_name("grading_worker.py")
SECONDS = 10.0  # for one comparison; most take milliseconds
LONGEST = 2000  # characters of an answer; the longest gold answer of MATH-500 has 53

CHOICE = re.compile(r"\(([A-Z])\)")  # of an answer among several


@dataclass(frozen=True)
class Grade:
    """A verdict, the answer (None: no box), and why the answer could not be graded, if so."""

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

    def compare(self, answer: str, gold: str) -> str:
        """ "yes", "no", or why math-verify could not compare: "unreadable", "took too long"."""
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
                verdict = process.stdout.readline().strip()
            except OSError:  # it ended
                verdict = ""
            except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
                self._end()
                raise
            if verdict:
                return verdict
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


def _same_words(answer: str, gold: str) -> bool:
    r"""Compare a gold answer that is a text; \textbf{(B)}\ 12 chooses (B)."""
    letter, chosen = CHOICE.fullmatch(notation.plain(gold).strip()), notation.plain(answer)
    if letter and CHOICE.match(chosen) and len(letters := CHOICE.findall(chosen)) == 1:
        return letters[0] == letter[1]
    return notation.words(answer) == notation.words(gold)


def _same_in_base(answer: str, gold: str) -> bool | None:
    """Compare where a base is written: 52_8 is 52 in a question about base 8, and never 52_7."""
    left, right = notation.in_base(answer), notation.in_base(gold)
    if left and right:
        return left == right
    if right and answer.isdecimal():
        return answer == right[0]
    return False if left and notation.number(gold) is not None else None


def _compare(answer: str, gold: str) -> bool | None:
    """Decide numbers, words and equal spellings; None: a question for math-verify."""
    if re.sub(r"\s", "", answer) == re.sub(r"\s", "", gold):
        return True
    if notation.TEXT.fullmatch(gold) and notation.words(gold):
        return _same_words(answer, gold)
    same = _same_in_base(answer, gold)
    if same is not None or notation.has_percent(answer + gold):
        return same
    left, right = notation.quantity(answer), notation.quantity(gold)
    if left is not None and right is not None:  # math-verify rounds to six places
        return left == right
    # math-verify would drop the words, and take the first number for all.
    return False if right is not None and notation.is_worded(answer) else None


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
    tidy, tidy_gold = notation.tidy(answer), notation.tidy(gold)
    same = _compare(tidy, tidy_gold)
    if same is not None:
        return Grade(same, answer)
    verdict = _worker.compare(tidy, tidy_gold)
    return Grade(verdict == "yes", answer, "" if verdict in ("yes", "no") else verdict)


def grade_integer(text: str, gold: str, *, last_number: bool = False) -> Grade:
    r"""Grade a whole number exactly, as AIME and GSM8K ask: 025, 25.0 and \$25 are all 25.

    The answer is the last \boxed{...}; with `last_number` (GSM8K), and only where there is no box,
    the last number of the text. A fraction or a sum is not worked out, a power is: 5^2 is 25.

    Raises:
      ValueError: for a gold answer that is no integer.
    """
    whole = notation.number(notation.tidy(gold))
    if whole is None or whole.denominator != 1:
        raise ValueError(f"a gold answer must be an integer, not {gold!r}")
    answer = final_answer(text)
    if answer is None and last_number:
        numbers = notation.IN_PROSE.findall(text.translate(notation.SYMBOLS))
        answer = numbers[-1] if numbers else None
        if answer is None:
            return Grade(False, None, "no number")
    if answer is None:
        return Grade(False, None, "no box")
    if len(answer) > LONGEST:
        return Grade(False, answer, "too long")
    value = notation.quantity(notation.tidy(answer).rpartition("=")[2].strip())
    return Grade(value == whole, answer, "" if value is not None else "not a number")
