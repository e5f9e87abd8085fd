"""Training state on disk, written by Orbax while training runs; enough to resume exactly.

A checkpoint holds the trained subtree, the optimizer, the step, the loader's position and the
identity of the base. Anchors are keyed by (seed, step), so there is no random state to save. The
frozen tree is never written; a resumed run must load the same one.
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
          identity: JSON values that a checkpoint to restore must share: the base's checksum, and
            what else decides the shapes of the state.
          keep: number of recent checkpoints to keep.
        """
        self.identity = identity
        self.last = _manager(run / "checkpoints", keep)
        self.best = _manager(run / "best", 1)
        self.best_value = self._best_value()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Start to write a checkpoint; return once the state is copied off the device."""
        step = int(state.step)
        if step in self.last.all_steps():
            return
        meta = {"identity": self.identity, "data": data}
        self.last.save(step, args=_args(state, meta))

    def save_best(self, state: TrainState, value: float) -> None:
        """Save the state as the best if `value` exceeds every earlier one."""
        if self.best_value is not None and value <= self.best_value:
            return
        self.best_value = value
        meta, step = {"identity": self.identity, "value": value}, int(state.step)
        if step in self.best.all_steps():  # of this step's evaluation before the run was killed
            self.best.delete(step)
        self.best.save(step, args=_args(state, meta), force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable checkpoint and the loader's position; None if there is no checkpoint.

        A damaged one is reported by a warning and deleted, and the one before it is restored.

        Args:
          like: arrays or ShapeDtypeStructs with the state's shapes and the wanted shardings.

        Raises:
          UserError: for a checkpoint of another base, or when no checkpoint can be read.
        """
        steps = sorted(self.last.all_steps(), reverse=True)
        for step in steps:
            try:
                meta = _meta(self.last, step)
                self._check(meta["identity"])
                restored = self.last.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)))
                )
            except UserError:
                raise
            except Exception as error:  # a damaged file may raise anything
                warnings.warn(
                    f"checkpoint {step} in {self.last.directory} cannot be read "
                    f"({first_line(error):.200}); "
                    "going back to the one before",
                    stacklevel=2,
                )
                continue
            for torn in (s for s in steps if s > step):
                self.last.delete(torn)
            state = TrainState(**restored["state"], broken_at=like.broken_at)
            return state, meta["data"]
        if steps:
            raise UserError(
                f"no checkpoint in {self.last.directory} can be read: delete the directory to "
                "train from the start"
            )
        return None

    def wait(self) -> None:
        """Wait until everything is on disk."""
        self.last.wait_until_finished()
        self.best.wait_until_finished()

    def close(self) -> None:
        """Finish writing, and stop the writing threads."""
        self.last.close()
        self.best.close()

    def _best_value(self) -> float | None:
        """The value of the best checkpoint; one that cannot be read is deleted."""
        values = []
        for step in self.best.all_steps():
            try:
                values.append(float(_meta(self.best, step)["value"]))
            except Exception:  # a damaged file may raise anything
                self.best.delete(step)
        return max(values, default=None)

    def _check(self, identity: dict[str, Any]) -> None:
        for name, expected in self.identity.items():
            if identity.get(name) != expected:
                raise UserError(
                    f"{self.last.directory} was trained with {name}={identity.get(name)}, and this "
                    f"is {name}={expected}: give another run directory"
                )


def _manager(directory: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(
        directory.absolute(), options=options, item_names=("state", "meta")
    )


def _args(state: TrainState, meta: dict[str, Any]) -> Any:
    return ocp.args.Composite(
        state=ocp.args.StandardSave(_saved(state)), meta=ocp.args.JsonSave(meta)
    )


def _saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state: all but `broken_at`, which is 0 whenever one is saved."""
    return {name: part for name, part in state._asdict().items() if name != "broken_at"}


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _abstract(like: TrainState) -> dict[str, Any]:
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(describe, _saved(like))
