"""Train the pairwise head of a finished run: `python -m train.head --config configs/tiny.py`.

`train.main` does so as its last stage. This command adds a head to the model of a run that has
none, or another one, e.g. with --config.head.rank=64. Of the model's files it writes the head's and
the card.
"""

import dataclasses
import pathlib
from typing import Any

from orthrus_jax import checkpoint
from orthrus_jax.engine import planner
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, params
from train import cli, hosts, lock, model_card, pairwise, recipe, settings
from train.data import open_rows
from train.main import held_out
from train.setup import prepare


def main(config: Any) -> None:
    """Train the head of RUN/model on RUN/rows, and write it into the model's directory.

    Args:
      config: see configs/paper.py.

    Raises:
      UserError: for a run that is not finished, or a bad configuration.
    """
    settings.check(config, "distributed", "head")
    if not config.head.steps:
        raise UserError("config.head.steps=0 trains no head: give more")
    hosts.begin(config.distributed)
    run = pathlib.Path(config.run)
    model = run / "model"
    if not (run / recipe.FINISHED).exists():
        raise UserError(f"{run} holds no finished training: run train.main first")
    setup, rows = prepare(config), open_rows(run / "rows")
    with lock.held(run):
        loaded = checkpoint.load_checkpoint(model, dtype=config.train.dtype, mesh=setup.mesh)
        setup = setup._replace(sizes=loaded.config)
        frozen, diffusion = params.split(loaded.params)
        view = pairwise.TrainedView(Model(loaded.config, setup.mesh), frozen, diffusion)
        step = model_card.last_record(run).get("step", 0)
        evaluate = held_out(config, setup, frozen)
        head = pairwise.train_head(config, view, rows, evaluate, step)
        if head is not None:
            hosts.on_first_host(lambda: _write(config, model, head))


def _write(config: Any, model: pathlib.Path, head: pairwise.Head) -> None:
    checkpoint.save_head(model, head)
    known = planner.load(model)
    if known is not None and known.measurements:
        # Acceptance and draft temperature were measured with other drafts.
        known = dataclasses.replace(known, measurements=(), about={}, draft_temperature=1.0)
        known.save(model)
        print(f"{model / planner.FILE}: acceptance removed, measure it with eval.calibrate")
    model_card.write(model / "README.md", config, model.parent)
    print(f"pairwise head written to {model / checkpoint.HEAD_FILE}")


if __name__ == "__main__":
    cli.run(main, default="configs/tiny.py", description=__doc__ or "")
