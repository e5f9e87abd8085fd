"""Where a run's figures go: train.jsonl, TensorBoard events, and Weights & Biases if asked for."""

import json
import pathlib
from typing import Any

import jax

from orthrus_jax.errors import UserError


class Log:
    """A run's logs, appended to; records of steps that will be taken again are cut off first."""

    def __init__(self, run: pathlib.Path, step: int, config: Any) -> None:
        """Open RUN/train.jsonl and RUN/tensorboard at `step`.

        Raises:
          UserError: when `config.wandb_project` is set and wandb is not installed.
        """
        self.path, self.main = run / "train.jsonl", jax.process_index() == 0
        self.board: Any = None
        self.wandb: Any = None
        if not self.main:
            return
        kept = [r for r in _records(self.path) if r["step"] <= step]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        from tensorboardX import SummaryWriter  # late: it takes a while

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        if config.wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    f"wandb_project={config.wandb_project!r} needs wandb: pip install wandb, or "
                    "leave it empty"
                ) from None
            self.wandb = wandb.init(
                project=config.wandb_project, dir=str(run), config=config.to_dict(), resume="allow"
            )

    def write(self, record: dict[str, Any]) -> None:
        """Log one step: numbers, lists by position in the block, texts."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, str):
                self.board.add_text(name, value, step)
            elif isinstance(value, list):
                for i, part in enumerate(value):
                    self.board.add_scalar(f"{name}/{i:02d}", part, step)
            elif name != "step":
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(record, step=step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a killed run may leave a torn last one."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records
