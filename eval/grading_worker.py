"""The process where math-verify runs for `eval.grading`: a JSON question per line, a word back.

Started by path. A question that takes too long ends the process, whatever code is running: the
watchdog is an interpreter thread that needs neither signals nor the interpreter lock.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
from typing import Any

MEMORY_BYTES = 4 << 30  # far above any honest answer; 9^9^9 is not to fill the machine
IMPORT_SECONDS = 120


def compare(answer: str, gold: str) -> str:
    """Compare two pieces of LaTeX: "yes", "no", or "unreadable" for an answer that is no maths."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, MatrixBase, evaluate

    def read(latex: str) -> list[Any]:
        expressions = parse(
            rf"\boxed{{{latex}}}",
            [LatexExtractionConfig(boxed_match_priority=0)],
            extraction_mode="first_match",  # the content of the box, or nothing
            parsing_timeout=None,
        )
        # math-verify takes i for a variable. Unevaluated, or x = 2i would be false for a real x.
        with evaluate(False):
            return [
                x.xreplace({s: I for s in x.free_symbols if str(s) == "i"})
                if isinstance(x, Basic | MatrixBase)
                else x
                for x in expressions
            ]

    expressions = read(answer)
    # Inequalities may stand for intervals: x > 2 is (2, oo).
    if verify(read(gold), expressions, allow_set_relation_comp=True, timeout_seconds=None):
        return "yes"
    return "no" if any(isinstance(x, Basic | MatrixBase) for x in expressions) else "unreadable"


def main() -> None:
    """Answer questions until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    silence = sys.stdout
    faulthandler.dump_traceback_later(IMPORT_SECONDS, exit=True, file=silence)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    compare("1", "1")  # imports, compiles patterns
    print("ready", file=answers, flush=True)
    faulthandler.cancel_dump_traceback_later()
    for line in sys.stdin:
        question = json.loads(line)
        faulthandler.dump_traceback_later(question["seconds"], exit=True, file=silence)
        try:
            word = compare(question["answer"], question["gold"])
        except BaseException:  # sympy raises anything at all
            word = "unreadable"
        faulthandler.cancel_dump_traceback_later()
        print(word, file=answers, flush=True)


if __name__ == "__main__":
    main()
