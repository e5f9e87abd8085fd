"""The tests' process: runs the tests, calls the program's functions by value, writes the verdict.

The tests and what they expect are known here alone. What the program sends is rebuilt from plain
values; objects stay with it, and equal only themselves. The verdict carries a nonce that the
program's process never sees. Knows no benchmark.
"""

import builtins
import json
import linecache
import os
import traceback
from typing import Any, BinaryIO

from eval.confined import values

# Endings that the program's process may report of itself: none of them passes.
ENDINGS = ("blocked", "failed", "memory")


class Ended(BaseException):
    """The program's process can no longer be asked; `status` is how it ended."""

    def __init__(self, status: str, note: str):
        super().__init__(status, note)
        self.status, self.note = status, note


class Remote:
    """An object of the program's process: it can be called, read, changed and iterated over there.

    It equals itself only; its truth is that of any object.
    """

    __slots__ = ("_number", "_program")

    def __init__(self, program: "Program", number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self, name, value)

    def __iter__(self) -> Any:
        return self._program.ask("iter", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)


class Program:
    """The program's process as the tests see it: a question goes out, an answer comes back."""

    def __init__(self, questions: BinaryIO, answers: BinaryIO):
        self.questions, self.answers = questions, answers
        self.objects: dict[int, Remote] = {}
        self.ended: Ended | None = None  # kept, so that no `except` in a test makes it unsaid

    def ask(self, *question: Any) -> Any:
        """Send a question and wait for its answer.

        Raises:
          Exception: what the call raised in the program, as the nearest exception built in.
          TypeError: for an argument that is no plain value and no object of the program.
          Ended: if the process has ended, or sent what is no answer.
        """
        line = values.dump(list(question), self._refer)
        try:
            self.questions.write(line)
            self.questions.flush()
        except OSError:
            raise self._end("ended", "the program's process ended") from None
        return self.receive()

    def receive(self) -> Any:
        """Wait for an answer that is due."""
        if self.ended:
            raise self.ended
        line = self.answers.readline(values.LONGEST)
        if not line:
            raise self._end("ended", "the program's process ended")
        if not line.endswith(b"\n"):
            raise self._end("failed", f"an answer was cut off, or has over {values.LONGEST} bytes")
        try:
            answer = values.load(line, self._resolve)
        except ValueError as error:
            raise self._end("failed", f"the program's process sent {error}") from None
        match answer:
            case ["value", value]:
                return value
            case ["raise", str() as name, str() as text]:
                raise _exception(name, text)
            case ["end", str() as status, str() as note] if status in ENDINGS:
                raise self._end(status, note)
        raise self._end("failed", "the program's process sent no answer")

    def _end(self, status: str, note: str) -> Ended:
        self.ended = Ended(status, note)
        return self.ended

    def _refer(self, thing: object) -> int:
        if isinstance(thing, Remote):
            return thing._number
        raise TypeError(f"a {type(thing).__name__} of the tests cannot be given to the program")

    def _resolve(self, number: int) -> Remote:
        return self.objects.setdefault(int(number), Remote(self, int(number)))


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # one of several arguments, as UnicodeDecodeError
            pass
    return RuntimeError(f"{name}: {text}")


def judge(program: Program, helpers: str, tests: str, names: list[str]) -> tuple[str, str]:
    """Run the tests; return the status and a note.

    Args:
      program: the process that has loaded the program.
      helpers: code that the tests need, run first.
      tests: their code; a name that the program lacks is an error where they use it.
      names: the program's objects that the tests use, by their names there.
    """
    scope: dict[str, Any] = {"__name__": "tests"}
    try:
        program.receive()
        exec(compile(helpers, "<helpers>", "exec", dont_inherit=True), scope)
        for name in names:
            try:
                scope[name] = program.ask("name", name)
            except NameError:
                scope.pop(name, None)
        linecache.cache["<tests>"] = (len(tests), None, tests.splitlines(True), "<tests>")
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), scope)
    except Ended as end:
        return end.status, end.note
    except MemoryError:
        return "memory", "the tests ran out of memory"
    except BaseException as error:
        trace = error.__traceback__
        note = "".join(traceback.format_exception(error.with_traceback(trace and trace.tb_next)))
        return program.ended.status if program.ended else "failed", note
    if program.ended:
        return program.ended.status, program.ended.note
    return "passed", ""


def main(settings: dict[str, Any], held: list[str]) -> None:
    """Judge; write two lines: the layers that hold here and there, then the verdict.

    Args:
      settings: the descriptors `questions`, `answers` and `result`; `helpers`, `tests`, `names`;
        `nonce`, which marks what is this process's.
      held: the layers of the sandbox that hold here.
    """
    program = Program(open(settings["questions"], "wb"), open(settings["answers"], "rb"))  # noqa: SIM115
    write = lambda **parts: os.write(
        settings["result"], json.dumps({"nonce": settings["nonce"]} | parts).encode() + b"\n"
    )
    try:
        write(held=held, program_held=program.receive())
    except Ended:
        os._exit(1)
    status, note = judge(program, settings["helpers"], settings["tests"], settings["names"])
    write(status=status, note=note[-2000:])
    os._exit(0)
