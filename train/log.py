"""A training run's metrics: train.jsonl and TensorBoard events. Knows no metric by name."""

import contextlib
import itertools
import json
import pathlib
from typing import Any

import jax

from orthrus_jax.errors import UserError
from orthrus_jax.files import read_jsonl, write_atomic


class Log:
    """A run's logs, appended to; records of steps that will be taken again are cut off first."""

    def __init__(self, run: pathlib.Path, step: int) -> None:
        """Open RUN/train.jsonl and RUN/tensorboard at `step`."""
        self.path, self.main = run / "train.jsonl", jax.process_index() == 0
        self.board: Any = None
        if not self.main:
            return
        kept = [record for record in _records(self.path) if record["step"] <= step]
        write_atomic(self.path, "".join(map(_line, kept)))
        from tensorboardX import SummaryWriter  # late: it takes a while

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Log one step: numbers, lists by position in the block, texts."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, str):
                self.board.add_text(name, value, step)
            elif isinstance(value, list):
                for i, part in enumerate(value):
                    self.board.add_scalar(f"{name}/{i:02d}", part, step)
            elif name != "step":
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.board is not None:
            self.board.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a log up to a torn line, which a killed run may leave at the end."""
    records: list[dict[str, Any]] = []
    if path.exists():
        with contextlib.suppress(UserError):
            records += (record for _, record in read_jsonl(path))
    known = lambda record: isinstance(record, dict) and isinstance(record.get("step"), int)
    return list(itertools.takewhile(known, records))
