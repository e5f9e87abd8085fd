"""A run's --out directory: begun once, written by one process, resumed after any end.

Decides who may write and what must be unchanged. Knows no benchmark, no model and no figure.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from eval.arguments import check_directory
from eval.records import ANSWERS, RECIPE, read_answers, read_recipe
from orthrus_jax.errors import Terminated, UserError
from orthrus_jax.files import first_line, lock, write_atomic


class Answers:
    """answers.jsonl, opened by this process alone.

    Attributes:
      done: the ids of the problems that are in it.
    """

    def __init__(self, path: pathlib.Path, file: BinaryIO, recipe: Mapping[str, Any]) -> None:
        self._path, self._file = path, file
        rows, size = read_answers(path, recipe)
        file.truncate(size)  # the torn end of a killed run
        self.done = {row["id"] for row in rows}

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Append the lines of a chunk's problems, by id; they are on disk when this returns.

        Raises:
          UserError: when the disk is full, or another error of the system.
        """
        try:
            self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows.values()))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({first_line(error)}): {len(self.done)} problems "
                "are kept; once it can, the same command with --resume goes on"
            ) from None
        self.done |= rows.keys()


class RunDirectory:
    """An --out directory: its recipe, and the answers it holds so far."""

    def __init__(self, directory: pathlib.Path, *, resume: bool) -> None:
        """Read the directory; change nothing.

        Raises:
          UserError: for one that exists without --resume, holds something else, or cannot be
            written to.
        """
        self.directory = directory
        self.recipe: dict[str, Any] = {}
        check_directory("--out", directory)
        if not directory.exists():
            return
        if not resume:
            raise UserError(
                f"--out {directory} exists: give another one, or --resume to go on with that run"
            )
        if not _is_unbegun(directory):
            self.recipe = read_recipe(directory)

    def check(self, part: str, recipe: dict[str, Any]) -> None:
        """Refuse a recipe other than that of the run's first start, naming the difference."""
        for name, now in recipe.items() if self.recipe else ():
            before = self.recipe[part].get(name)
            if before != now:
                raise UserError(
                    f"--resume {self.directory}: {name} was {before} and is now {now}; "
                    "resume with what the run was begun with, or give another --out"
                )

    @contextlib.contextmanager
    def open(self, recipe: dict[str, Any]) -> Iterator[Answers]:
        """Open answers.jsonl for this process alone, and write the recipe if this run is new.

        Raises:
          UserError: when another process writes the run or has begun it, or the disk is full.
        """
        path = self.directory / ANSWERS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                _lock(file, path)
                if not self.recipe:
                    if not _is_unbegun(self.directory):
                        raise UserError(f"{self.directory} was begun by another process meanwhile")
                    write_atomic(self.directory / RECIPE, json.dumps(recipe, indent=2) + "\n")
                answers = Answers(path, file, self.recipe or recipe)
                with _ending_in_a_line(self.directory, answers):
                    yield answers
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written: {first_line(error)}") from None


def remove(directory: pathlib.Path) -> None:
    """Remove a run, unless a process is writing it.

    Raises:
      UserError: when one is.
    """
    path = directory / ANSWERS
    if path.exists():
        with path.open("ab") as file:
            _lock(file, path)
    shutil.rmtree(directory, ignore_errors=True)


def _is_unbegun(directory: pathlib.Path) -> bool:
    """Whether a run was killed before its recipe was written, or holds nothing at all."""
    return all(
        path.suffix == ".tmp" or (path.name == ANSWERS and not path.stat().st_size)
        for path in directory.iterdir()
    )


@contextlib.contextmanager
def _ending_in_a_line(directory: pathlib.Path, answers: Answers) -> Iterator[None]:
    """End the process in one line on Ctrl-C or SIGTERM, with how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        print(
            f"stopped: {directory} keeps {len(answers.done)} problems; the same command with "
            "--resume goes on",
            file=sys.stderr,
        )
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        sys.exit(128 + number)


def _lock(file: BinaryIO, path: pathlib.Path) -> None:
    if not lock(file):
        raise UserError(f"{path} is being written by another process")
