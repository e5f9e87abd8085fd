"""How the training commands read `--config FILE --config.name=value` and end on an error.

The `ml_collections` config_flags convention; this file only turns its failures into one line.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from orthrus_jax.errors import UserError, run_command

USAGE = """
Flags:
  --config FILE           the run's configuration (default: {default})
  --config.NAME=VALUE     override one of its values, e.g. --config.train.steps=100
  --[no]overwrite         replace results that are already there (default: no)
"""


def run(main: Callable[[Any, bool], None], *, default: str, description: str) -> None:
    """Parse the command line and call `main(config, overwrite)`.

    Args:
      main: the command; `overwrite` is its --overwrite flag.
      default: path of the configuration used without --config.
      description: what `--help` says first.
    """
    sys.modules["__main__"].__doc__ = description + USAGE.format(default=default)
    with _told_in_one_line():  # defining the flag already reads the file and its overrides
        holder = config_flags.DEFINE_config_file("config", default, "The run's configuration file.")
    overwrite = flags.DEFINE_bool("overwrite", False, "Replace results that are already there.")

    def parse(argv: Sequence[str]) -> list[str]:
        with _told_in_one_line():
            rest = flags.FLAGS(list(argv))
            if len(rest) > 1:
                raise UserError(f"unexpected argument {rest[1]!r}")
            holder.value.to_dict()  # a file that could not be loaded says so here
        return rest

    app.run(lambda _: run_command(lambda: main(holder.value, overwrite.value)), flags_parser=parse)


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except AttributeError as error:  # how config_flags says that there is no such key
        name = str(error).strip("\"'")
        _refuse(f"the configuration has no key {name!r}")
    except Exception as error:  # a wrong flag or value, or whatever the file's own code raises
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
    sys.exit(2)
