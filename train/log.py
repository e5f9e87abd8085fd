"""A training run's metrics: train.jsonl and TensorBoard events. Knows no metric by name."""

import contextlib
import itertools
import json
import pathlib
import time
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
        self.board = _Board(run / "tensorboard", step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Log one step: numbers, lists by position in the block, texts."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, str):
                self.board.add(self.board.summary.text(name, value), step)
            elif isinstance(value, list):
                for i, part in enumerate(value):
                    self.board.add(self.board.summary.scalar(f"{name}/{i:02d}", part), step)
            elif name != "step":
                self.board.add(self.board.summary.scalar(name, value), step)
        self.board.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.board is not None:
            self.board.close()


class _Board:
    """TensorBoard's events, written by the caller's thread.

    The usual SummaryWriter writes in a thread of its own. A full disk ends that thread, and then
    its queue has no reader: the run would wait for ever.
    """

    def __init__(self, directory: pathlib.Path, first_step: int) -> None:
        """Open a file of events; those of earlier files from `first_step` on are hidden."""
        from tensorboardX import event_file_writer, summary  # late: they take a while
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.summary, self._event = summary, Event
        directory.mkdir(parents=True, exist_ok=True)
        self._file = event_file_writer.EventsWriter(str(directory / "events"))
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Any, step: int) -> None:
        self._write(step, summary=summary)

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
