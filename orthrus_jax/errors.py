"""The exception that a user reads, and how a command starts and ends.

Anything a person can put right (a missing file, a bad flag, a prompt that does not fit) is raised
as `UserError` with the actual value, the expected one and the remedy. A bug is never a `UserError`.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Callable

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


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` or Ctrl-C ends it in one line, never in a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
