"""Command lines of training: `--config FILE --config.name=value`, and errors in one line.

The flags follow `ml_collections.config_flags`. Knows no command's own work.
"""

import contextlib
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from orthrus_jax import runtime
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import first_line

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
    path, sys.argv = _take_config(sys.argv, default)
    with _errors_in_one_line():  # defining the flag already reads the overrides
        holder = config_flags.DEFINE_config_dict("config", load_config(path))
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
        return rest

    def call() -> None:
        _quiet_libraries()
        if jax.config.read("jax_enable_x64"):
            raise UserError("JAX_ENABLE_X64 is set: training computes in 32 bits; unset it")
        if cache is not None:
            runtime.enable_compilation_cache(cache.value)
        main(holder.value, **{name: flag.value for name, flag in values.items()})

    app.run(lambda _: run_command(call), flags_parser=parse)


def _quiet_libraries() -> None:
    """Let an error be one line: Orbax logs it too, and its threads print what they meet later."""
    logging.set_verbosity(logging.FATAL)
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            usual(kind, error, trace)

    sys.excepthook = hook


def load_config(path: str) -> ConfigDict:
    """The configuration that `get_config()` of a Python file returns.

    Raises:
      UserError: when the file cannot be read, is no such file, or its own code fails.
    """
    source = pathlib.Path(path)
    try:
        text = source.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UserError(
            f"--config {path!r} cannot be read: {first_line(error)}: {path!r}"
        ) from None
    names: dict[str, Any] = {"__name__": "config", "__file__": str(source)}
    try:
        exec(compile(text, path, "exec", dont_inherit=True), names)
        if not callable(names.get("get_config")):
            raise UserError(
                f"--config {path} defines no get_config(): it must be a Python file like "
                "configs/tiny.py"
            )
        config = names["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file's own code
        line = getattr(error, "lineno", None) or _line_of(path, error.__traceback__)
        place = f":{line}" if line else ""
        raise UserError(
            f"--config {path}{place} is no Python file that defines a configuration: "
            f"{type(error).__name__}: {first_line(error):.200}"
        ) from None
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of --config {path} returns a {type(config).__name__}: expected a "
            "ConfigDict"
        )
    return config


def _line_of(path: str, trace: Any) -> int | None:
    """The last line of the file itself that was running."""
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == path]
    return lines[-1] if lines else None


def _take_config(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Take `--config FILE` out of a command line; the last one counts."""
    path, rest, words = default, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config"):
            path = value if equals else next(words, "")
        else:
            rest.append(word)
    return path, rest


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError) as error:  # config_flags raises them for an unknown key
        text = str(error)
        key = re.search(r"lookup: ([\w.]+)", text) or re.search(r"(\w+)", text)
        meant = re.search(r'Did you mean \\*"(\w+)', text)
        hint = f": did you mean {meant[1]!r}?" if meant else ""
        _refuse(f"the configuration has no key {(key[1] if key else text)!r}{hint}")
    except Exception as error:  # a wrong flag or value
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
    sys.exit(2)
