"""Command lines of training: `--config FILE --config.name=value`, and errors in one line.

The flags follow `ml_collections.config_flags`. Knows no command's own work.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from orthrus_jax import runtime
from orthrus_jax.errors import UserError, run_command

OVERWRITE = {"overwrite": "replace existing results"}
USAGE = """
Flags:
  --config FILE           the run's configuration (default: {default})
  --config.NAME=VALUE     override one of its values, e.g. --config.train.steps=100
"""
CACHE = {"compile_cache": "DIR for compiled programs, or off (default: under your user cache)"}


def run(
    main: Callable[..., None],
    *,
    default: str,
    description: str,
    options: Mapping[str, str] | None = None,
    switches: Mapping[str, str] | None = None,
    compile_cache: bool = True,
) -> None:
    """Parse the command line and call `main(config, **options, **switches)`.

    Args:
      main: the command.
      default: path of the configuration used without --config.
      description: opens the text of `--help`.
      options: names and help texts of flags that take a text; one not given is None.
      switches: names and help texts of flags that are off by default.
      compile_cache: keep compiled programs, and take --compile_cache.
    """
    options, switches = options or {}, switches or {}
    usage = USAGE.format(default=default)
    for name, text in {**options, **(CACHE if compile_cache else {})}.items():
        usage += f"  --{name:<21} {text}\n"
    for name, text in switches.items():
        usage += f"  --[no]{name:<17} {text} (default: no)\n"
    sys.modules["__main__"].__doc__ = description + usage
    with _errors_in_one_line():  # defining the flag already reads the file and its overrides
        holder = config_flags.DEFINE_config_file("config", default, "The run's configuration file.")
    values: dict[str, flags.FlagHolder[Any]] = {
        name: flags.DEFINE_string(name, None, text) for name, text in options.items()
    }
    values |= {name: flags.DEFINE_bool(name, False, text) for name, text in switches.items()}
    cache = None
    if compile_cache:
        cache = flags.DEFINE_string("compile_cache", None, CACHE["compile_cache"])

    def parse(argv: Sequence[str]) -> list[str]:
        if {"-h", "--help"} & set(argv):  # absl's own help exits with an error's status
            app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
        with _errors_in_one_line():
            rest = flags.FLAGS(list(argv))
            if len(rest) > 1:
                raise UserError(f"unexpected argument {rest[1]!r}")
            holder.value.to_dict()  # raises where the file could not be loaded
        return rest

    def call() -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every file
        if cache is not None:
            runtime.enable_compilation_cache(cache.value)
        main(holder.value, **{name: flag.value for name, flag in values.items()})

    app.run(lambda _: run_command(call), flags_parser=parse)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except AttributeError as error:  # config_flags raises it for an unknown key
        name = str(error).strip("\"'")
        _refuse(f"the configuration has no key {name!r}")
    except Exception as error:  # a wrong flag or value, or any error of the file's own code
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
    sys.exit(2)
