"""How the training commands read `--config FILE --config.name=value` and end on an error.

The `ml_collections` config_flags convention; this file only turns its failures into one line.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

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
    holder = config_flags.DEFINE_config_file("config", default, "The run's configuration file.")
    overwrite = flags.DEFINE_bool("overwrite", False, "Replace results that are already there.")

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
            if len(rest) > 1:
                raise UserError(f"unexpected argument {rest[1]!r}")
            assert holder.value is not None  # reads the file, so that its errors are told here
        except AttributeError as error:  # how config_flags says that there is no such key
            key = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error
            _refuse(f"the configuration has no key {key}")
        except Exception as error:  # a wrong flag or value, or whatever the file's own code raises
            _refuse(str(error))
        return rest

    app.run(lambda _: run_command(lambda: main(holder.value, overwrite.value)), flags_parser=parse)


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
    sys.exit(2)
