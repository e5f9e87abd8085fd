"""A run that can be killed: `python -m tests.support.programs.resumable DIR DEVICES [N]`.

Trains a small model with checkpoints every 3 steps. With N it kills itself, as kill -9 does, once
step N is logged and a checkpoint is whole (they are written behind the running steps, and a later
one may be half written then). Otherwise it prints the final weights' checksum and the step it
began from.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time
import types

from tests.support import fast_compile

if __name__ == "__main__" and sys.argv[2] != "1":
    os.environ["XLA_FLAGS"] = fast_compile.on_devices(int(sys.argv[2]))

import jax
import numpy as np

from orthrus_jax import sharding
from orthrus_jax.model import Model, params
from tests.support.training import CONFIG, made_rows, random_trees
from train import trainer
from train.checkpoints import Checkpoints
from train.data import Loader
from train.objective import Objective

RECIPE = types.SimpleNamespace(
    steps=12, accumulate=1, seed=1, log_every=1, eval_every=5, save_every=3
)


def train(run, devices=1, log=lambda record: None):
    """Go on with the run from what it left; return the state and the step it began from."""
    _, frozen, diffusion = random_trees()
    mesh = sharding.make_mesh(data=2, fsdp=-1) if devices > 1 else None
    if mesh is not None:
        place = lambda tree: jax.device_put(tree, sharding.of_tree(tree, mesh))
        frozen, diffusion = place(frozen), place(diffusion)
    frozen, diffusion = params.stack(frozen), params.stack(diffusion)
    optimizer = trainer.adamw(3e-3, RECIPE.steps, 0.1)
    state = trainer.init_state(diffusion, optimizer, mesh)
    loader = Loader(made_rows(rows=24), 8, 0)
    keeper = Checkpoints(run, {"base": "tiny"})
    if found := keeper.restore(state):
        state, place_in_data = found
        loader.restore(place_in_data)
    first = int(state.step)
    state = trainer.fit(
        RECIPE, Objective(5), Model(CONFIG, mesh), frozen, state, optimizer, loader, log,
        lambda diffusion: {}, keeper=keeper,
    )  # fmt: skip
    keeper.close()
    return state, first


def checksum(state):
    leaves = [np.asarray(x) for x in jax.tree.leaves((state.diffusion, state.optimizer))]
    return hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest()


def main(run, devices, last=0):
    def log(record):
        if record["step"] == last:
            written = pathlib.Path(run) / "checkpoints"
            while not any(path.name.isdecimal() for path in written.iterdir()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    state, first = train(pathlib.Path(run), devices, log)
    print(json.dumps({"checksum": checksum(state), "first": first}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
