"""Small files: written whole or not at all, JSON lines read one by one, errors cut to a line.

Knows nothing of what the files hold.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

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


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    r"""Yield (line number from 1, value) for each line that is not blank.

    Lines end at "\n" alone: U+2028, U+2029 and U+0085, at which `str.splitlines` also splits, may
    stand in a JSON string.

    Raises:
      UserError: naming file and line, for a line that is not UTF-8 or not JSON.
      OSError: when the file cannot be read.
    """
    with pathlib.Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse(line, f"{path}:{number}")


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
