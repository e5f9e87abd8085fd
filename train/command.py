"""How the training commands read `--config FILE --config.name=value` and end on an error.

The `ml_collections` config_flags convention; this file only turns its failures into one line.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from orthrus_jax import runtime
from orthrus_jax.errors import UserError, run_command

USAGE = """
Flags:
  --config FILE           the run's configuration (default: {default})
  --config.NAME=VALUE     override one of its values, e.g. --config.train.steps=100
  --[no]overwrite         replace results that are already there (default: no)
  --compile_cache DIR     where compiled programs are kept, or off (default: a directory of yours)
{more}"""


def run(
    main: Callable[..., None],
    *,
    default: str,
    description: str,
    switches: Mapping[str, str] | None = None,
) -> None:
    """Parse the command line and call `main(config, overwrite, **switches)`.

    Args:
      main: the command; `overwrite` is its --overwrite flag.
      default: path of the configuration used without --config.
      description: what `--help` says first.
      switches: further flags that are off by default, and what they do.
    """
    switches = switches or {}
    more = "".join(f"  --[no]{name:<17} {told} (default: no)\n" for name, told in switches.items())
    usage = USAGE.format(default=default, more=more)
    sys.modules["__main__"].__doc__ = description + usage
    with _told_in_one_line():  # defining the flag already reads the file and its overrides
        holder = config_flags.DEFINE_config_file("config", default, "The run's configuration file.")
    overwrite = flags.DEFINE_bool("overwrite", False, "Replace results that are already there.")
    cache = flags.DEFINE_string("compile_cache", None, "Where compiled programs are kept, or off.")
    given = {name: flags.DEFINE_bool(name, False, told) for name, told in switches.items()}

    def parse(argv: Sequence[str]) -> list[str]:
        if {"-h", "--help"} & set(argv):  # absl's own ends as an error does
            app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
        with _told_in_one_line():
            rest = flags.FLAGS(list(argv))
            if len(rest) > 1:
                raise UserError(f"unexpected argument {rest[1]!r}")
            holder.value.to_dict()  # a file that could not be loaded says so here
        return rest

    def call() -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
        runtime.enable_compilation_cache(cache.value)
        main(holder.value, overwrite.value, **{name: flag.value for name, flag in given.items()})

    app.run(lambda _: run_command(call), flags_parser=parse)


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
