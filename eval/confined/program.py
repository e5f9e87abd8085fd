"""The program's process: loads the program, then answers the tests' calls.

Nothing that comes from here is believed: the program may change all of it, and can then only answer
wrongly or end. Knows no test and no expected value.
"""

import builtins
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from eval.confined import values

NAME = "<program>"
OUT_OF_MEMORY = values.dump(["end", "memory", ""], id)  # ready: then nothing can be built


def compiled(versions: list[str]) -> types.CodeType:
    """The code of the first version that compiles.

    Raises:
      SyntaxError, ValueError, MemoryError, RecursionError: as the first version does, if none does.
    """
    failure: Exception | None = None
    for version in versions:
        try:
            return compile(version, NAME, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            failure = failure or error
    raise failure or SyntaxError("there is no program")


def print_exception(error: BaseException) -> None:
    """Print an exception to standard error, less the frames of this file."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename != NAME:
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace))
    sys.stderr.flush()


class Answers:
    """Where this process answers, and the objects that it has answered with."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.file: BinaryIO = open(descriptor, "wb")  # noqa: SIM115 - for as long as the process lives
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}

    def send(self, *message: Any) -> None:
        """Send a message as one line."""
        self.file.write(values.dump(list(message), self.refer))
        self.file.flush()

    def refer(self, thing: object) -> int:
        """The number of an object, which is kept from now on."""
        if id(thing) not in self.numbers:
            self.numbers[id(thing)] = len(self.objects)
            self.objects.append(thing)
        return self.numbers[id(thing)]

    def end(self, status: str, note: str = "") -> NoReturn:
        """Say how the program ended, and leave at once, whatever threads it left."""
        try:
            self.send("end", status, note)
        finally:
            os._exit(1)

    def attempt(self, action: Callable[..., Any], *arguments: Any, loading: bool = False) -> None:
        """Answer with the result of an action, or with what it raised; if `loading`, end then."""
        try:
            self.send("value", action(*arguments))
        except MemoryError:
            os.write(self.descriptor, OUT_OF_MEMORY)
            os._exit(1)
        except SystemExit:
            self.end("failed", "the program exited before its end")
        except BaseException as error:
            print_exception(error)
            if loading:
                self.end("failed")
            kinds = [kind.__name__ for kind in type(error).__mro__]
            self.send("raise", next(k for k in kinds if hasattr(builtins, k)), str(error))


def main(settings: dict[str, Any], held: list[str], watch: Callable[..., None] | None) -> None:
    """Load the program's parts into one module; answer until the tests' process has ended.

    Args:
      settings: the descriptors `questions` and `answers`; `parts`, each a list of versions;
        `directory`.
      held: the layers of the sandbox that hold, the first answer.
      watch: installs the audit hook.
    """
    answers = Answers(settings["answers"])
    questions = open(settings["questions"], "rb")  # noqa: SIM115
    answers.send("value", held)
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up
    if watch:
        watch(settings["directory"], lambda note: answers.end("blocked", note))

    def load() -> None:
        for versions in settings["parts"]:
            exec(compiled(versions), module.__dict__)

    def look_up(name: str) -> Any:
        if name not in module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return module.__dict__[name]

    verbs: dict[str, Callable[..., Any]] = {
        "name": look_up,
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
        "iter": iter,
        "next": next,
    }
    answers.attempt(load, loading=True)
    for line in questions:
        verb, *arguments = values.load(line, answers.objects.__getitem__)
        answers.attempt(verbs[verb], *arguments)
    os._exit(0)
