"""The exception that a user reads, and how a command starts and ends.

Anything a person can put right (a missing file, a bad flag, a prompt that does not fit) is raised
as `UserError` with the actual value, the expected one and the remedy. A bug is never a `UserError`.
"""

import contextlib
import importlib.util
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# The packages that each extra of pyproject.toml adds, by their import names.
EXTRAS = {
    "train": (
        *("datasets", "grain", "matplotlib", "ml_collections", "optax", "orbax", "pyarrow"),
        "tensorboardX",
    ),
    "eval": ("datasets", "math_verify", "matplotlib", "sympy"),
    "serve": ("prometheus_client", "starlette", "uvicorn"),
    "structured": ("llguidance",),
}


class UserError(ValueError):
    """Bad input, described in one line. Commands print it and exit with status 2."""


class PromptLengthError(UserError):
    """A prompt that, with the tokens of its answer, does not fit the model's positions."""


class Terminated(BaseException):
    """SIGTERM. No `Exception` and no KeyboardInterrupt: nothing goes on after it."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; what ends it early is one line, never a traceback.

    Exit statuses: 2 for a `UserError`, for a file that the system refuses and for output that
    cannot be written; 130 for Ctrl-C and 143 for SIGTERM, each after cleaning up; 141, without a
    word, where the reader of the output has gone.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: what is printed to None goes to the other one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    try:
        try:
            os.getcwd()
        except FileNotFoundError:
            raise UserError("the working directory was deleted: change to another") from None
        with _sigterm_raises():
            main()
        sys.stdout.flush()  # here it can still be reported
    except UserError as error:
        _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Terminated:
        _end("terminated", 143)
    except BrokenPipeError:
        _end("", 141)
    except OSError as error:
        place = "the output" if error.filename is None else error.filename
        _end(f"error: {place}: {error.strerror or error}", 2)


def _end(line: str, status: int) -> NoReturn:
    """Print the last line and exit, whatever has become of the streams."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):  # Python flushes once more, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, where nothing else handles it."""

    def terminate(*_: object) -> None:
        raise Terminated

    is_ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interrupt_quietly() -> None:
    """Let Ctrl-C end `python -m NAME` in one line while its modules are still being imported.

    For the packages' `__init__`: `run_command` has not begun. Does nothing elsewhere.
    """
    if sys.argv[:1] != ["-m"]:  # set by Python while it looks for the module to run
        return
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook


def program_name(command: str | None = None) -> str:
    """The name under which this process was started, for a usage line.

    Args:
      command: a command of the library; None for the console command itself.
    """
    program = pathlib.Path(sys.argv[0])
    if program.stem == "orthrus":
        start = "orthrus"
    elif command is None or program.parts[-2:] == ("orthrus_jax", "__main__.py"):
        start = "python -m orthrus_jax"
    else:
        return f"python -m orthrus_jax.{command}"
    return start if command is None else f"{start} {command}"


def require_extra(extra: str) -> None:
    """End `python -m {extra}.NAME` in one line where a package of the extra is not installed.

    To be called by the package's `__init__`: before its modules' imports can fail. Does nothing
    where the package is imported otherwise, for many of its modules need no extra.
    """
    if sys.argv[:1] != ["-m"]:  # set by Python while it looks for the module to run
        return
    run_command(lambda: check_extra(extra))


def check_extra(extra: str) -> None:
    """Refuse to go on without the packages of an extra.

    Raises:
      UserError: naming those that are not installed.
    """
    if missing := missing_packages(extra):
        raise UserError(
            f"{', '.join(missing)} not installed: pip install -e '.[{extra}]' in the checkout"
        )


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed, by their import names."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
