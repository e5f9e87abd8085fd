"""Small files: written whole or not at all, locked, read line by line as JSON.

Decides the form of a prompt file; knows nothing else of what the files hold.
"""

import codecs
import gzip
import json
import os
import pathlib
import sys
import uuid
import zlib
from collections.abc import Iterator
from typing import IO, Any

from orthrus_jax.errors import UserError


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file under a temporary name in the same directory, then give it its own.

    A reader sees the old content or the new, and an exception leaves the old. Text becomes UTF-8.
    There is no fsync: after a power failure the new file may be empty.
    """
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def lock(file: IO[Any]) -> bool:
    """Take an open file for this process alone, until it is closed; False if another one has it.

    Where there are no locks, nothing is taken: a note on standard error says so.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(
            f"note: {file.name} is on a file system without locks ({first_line(error)}): start no "
            "second process on it",
            file=sys.stderr,
        )
    return True


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    r"""Yield (line number from 1, value) for each line that is not blank.

    Lines end at "\n" alone: U+2028, U+2029 and U+0085, at which `str.splitlines` also splits, may
    stand in a JSON string. A file whose name ends in .gz is unpacked.

    Raises:
      UserError: naming file and line, for a line that is not UTF-8 or not JSON.
      OSError: when the file cannot be read or unpacked.
    """
    for number, line in _lines(path):
        try:
            yield number, json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
            raise UserError(f"{path}:{number} is not JSON: {first_line(error)}") from None


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a file of one {"prompt": TEXT} per line, as --prompts takes it.

    Raises:
      UserError: naming the file and the line.
    """
    prompts = []
    try:
        for number, line in _lines(path):
            try:
                prompt = json.loads(line.decode())["prompt"]
            except (ValueError, RecursionError, KeyError, TypeError):
                raise UserError(
                    f'{path}:{number} is not a JSON object with a "prompt", like {{"prompt": "Hi"}}'
                ) from None
            if not isinstance(prompt, str) or not prompt:
                raise UserError(
                    f'{path}:{number}: "prompt" is {json.dumps(prompt):.40}: expected a text of at '
                    "least one character"
                )
            prompts.append(prompt)
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {first_line(error)}") from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) for each line that is not blank, as `read_jsonl` does."""
    path = pathlib.Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.startswith(codecs.BOM_UTF8):
                    raise UserError(
                        f"{path}:{number} begins with a byte order mark: save the file as UTF-8 "
                        "without one"
                    )
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error) as error:  # a truncated or damaged .gz
        raise OSError(first_line(error)) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none.

    Of a system error only the reason: the caller names the file.
    """
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
