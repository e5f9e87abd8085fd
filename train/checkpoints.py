"""Training state on disk: Orbax, written beside training, with enough said to resume exactly.

A checkpoint is the trained subtree, the optimizer, the step, the loader's place and the identity of
the base. Anchors are keyed by (seed, step), so there is no random state to keep. The frozen tree is
never written; a resumed run must bring the same one.
"""

import pathlib
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line
from train.trainer import TrainState


class Checkpoints:
    """A run's checkpoints: the last few, and the best by held-out acceptance."""

    def __init__(self, run: pathlib.Path, identity: dict[str, Any], *, keep: int = 2) -> None:
        """Open or create RUN/checkpoints and RUN/best.

        Args:
          run: the run's directory.
          identity: JSON-able; what a checkpoint must have been written with (the base's checksum).
          keep: how many of the last checkpoints stay.
        """
        self.identity = identity
        self.last = _manager(run / "checkpoints", keep)
        self.best = _manager(run / "best", 1)
        self.best_value = max(
            (_meta(self.best, step)["value"] for step in self.best.all_steps()), default=None
        )

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Start to write a checkpoint; returns once the state is copied off the device."""
        step = int(state.step)
        if step in self.last.all_steps():
            return
        meta = {"identity": self.identity, "data": data}
        self.last.save(step, args=_args(state, meta))

    def save_best(self, state: TrainState, value: float) -> None:
        """Keep the state if its value is above all before it."""
        if self.best_value is not None and value <= self.best_value:
            return
        self.best_value = value
        meta = {"identity": self.identity, "value": value}
        self.best.save(int(state.step), args=_args(state, meta), force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and the loader's place; None where there is none.

        A torn one is reported by a warning, deleted, and the one before is taken.

        Args:
          like: arrays or ShapeDtypeStructs of the state's shapes, with the shardings it is to have.

        Raises:
          UserError: for a checkpoint of another base, or when none of those there can be read.
        """
        steps = sorted(self.last.all_steps(), reverse=True)
        for step in steps:
            try:
                meta = _meta(self.last, step)
                self._check(meta["identity"])
                found = self.last.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)))
                )
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes the library raise
                warnings.warn(
                    f"checkpoint {step} in {self.last.directory} cannot be read "
                    f"({first_line(error):.200}); "
                    "going back to the one before",
                    stacklevel=2,
                )
                continue
            for torn in (s for s in steps if s > step):
                self.last.delete(torn)
            return TrainState(**found["state"]), meta["data"]
        if steps:
            raise UserError(
                f"no checkpoint in {self.last.directory} can be read: delete the directory to "
                "train from the start"
            )
        return None

    def wait(self) -> None:
        """Until everything is on disk."""
        self.last.wait_until_finished()
        self.best.wait_until_finished()

    def close(self) -> None:
        """Finish writing, and stop the threads that do."""
        self.last.close()
        self.best.close()

    def _check(self, identity: dict[str, Any]) -> None:
        for name, mine in self.identity.items():
            if identity.get(name) != mine:
                raise UserError(
                    f"{self.last.directory} was trained with {name}={identity.get(name)}, and this "
                    f"is {name}={mine}: give another run directory"
                )


def _manager(directory: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(
        directory.absolute(), options=options, item_names=("state", "meta")
    )


def _args(state: TrainState, meta: dict[str, Any]) -> Any:
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta)
    )


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    found = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    return found["meta"]


def _abstract(like: TrainState) -> dict[str, Any]:
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(describe, like._asdict())
