"""A run's directory in the hands of one process, and how the next one goes on from what it left.

Decides who may write there, and the last line of a command that a signal or a full disk ends. Knows
no file of the directory but its own lock.
"""

import contextlib
import errno
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

from orthrus_jax.errors import Terminated, UserError
from orthrus_jax.files import first_line, lock
from train import hosts

LOCK = ".lock"
FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}
GOES_ON = "the same command goes on from what {run} holds (without --overwrite, if it was given)"


@contextlib.contextmanager
def held(run: pathlib.Path, goes_on: str = GOES_ON) -> Iterator[None]:
    """Hold a run's directory, which is made if it is not there; of several hosts the first does.

    The lock ends with the process, however that ends. A directory that was made for the run, and
    in which nothing was written, is removed.

    Args:
      run: the directory.
      goes_on: what to do after an interruption, with {run} in it.

    Raises:
      UserError: when the directory cannot be written or another process holds it, and when its disk
        becomes full meanwhile.
    """
    if not hosts.is_first():
        with _says(goes_on.format(run=run)):
            yield
        return
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = _lock(run)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UserError(
            f"--config.run={run} cannot be written ({first_line(error)}): name another directory"
        ) from None
    try:
        with _says(goes_on.format(run=run)):
            yield
    finally:
        (run / LOCK).unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # one is not empty
            for path in made:
                path.rmdir()


def check_writable(name: str, path: str | pathlib.Path) -> None:
    """Refuse a file or directory that could not be written at the end of the work.

    Raises:
      UserError: giving `name` and the reason.
    """
    path = pathlib.Path(path)
    try:
        place = next(place for place in path.absolute().parents if place.exists())
        tempfile.TemporaryFile(dir=place).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}={path} cannot be written ({first_line(error)}): give another"
        ) from None


def _lock(run: pathlib.Path) -> TextIO:
    """Lock RUN/.lock, and write there who did."""
    while True:
        file = (run / LOCK).open("a+", encoding="utf-8")
        if not lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{run} is in use by {holder}: wait until it ends, or give another --config.run"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (run / LOCK).stat()):
                break
        file.close()  # its last holder has removed it since it was opened
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


@contextlib.contextmanager
def _says(goes_on: str) -> Iterator[None]:
    sys.unraisablehook = _show_unless_late  # for good: these errors come until the process ends
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        print(goes_on, file=sys.stderr)
        raise
    except Exception as error:
        if reason := _full_disk(error):
            raise UserError(f"{reason}: make room; {goes_on}") from None
        raise


def _show_unless_late(error: Any) -> None:
    """Print an error that nobody can catch, unless it is a checkpoint's after its first one.

    A failed write closes the event loop to which Orbax's other writes report, and these say so.
    """
    if error.exc_type is not RuntimeError or str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def _full_disk(error: BaseException | None) -> str | None:
    """The reason if an error, or any that it came from, is a full disk's.

    Libraries that write from threads of their own report it as text in an error of another type.
    """
    if error is None:
        return None
    for number, reason in FULL.items():
        if getattr(error, "errno", None) == number or reason in str(error):
            return reason
    origins = [error.__cause__ or error.__context__, *getattr(error, "exceptions", ())]
    return next(filter(None, map(_full_disk, origins)), None)
