"""Run by test_eight_devices.py in a process of its own, which has eight (fake) devices.

Prints one JSON object: what a mesh of each shape named made of the same small model and rows.
"""

import json
import os
import sys

from tests.support import fast_compile

os.environ["XLA_FLAGS"] = fast_compile.on_devices(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax import decoding, sharding
from orthrus_jax.attention import flash as tiled
from orthrus_jax.model import Model, params
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import orthrus_decode
from tests.support.weights import random_params
from train import divergence, trainer
from train.data import TokenizedDialogue, pack, stack
from train.objective import Objective

MESHES = {
    "8 x 1 x 1": (8, 1, 1),
    "1 x 8 x 1": (1, 8, 1),
    "2 x 2 x 2": (2, 2, 2),
    "4 x 1 x 2": (4, 1, 2),
}
STEPS, LENGTH = 6, 96


def rows():
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 60, n).tolist()
    talk = [TokenizedDialogue(ids(rng.integers(1, 9)), ids(rng.integers(9, 30))) for _ in range(60)]
    return stack(list(pack(talk, LENGTH, pad=0))[:8])


def curve(mesh, *, micro=1, stacked=True, remat="full"):
    """Losses of a few steps, and the trained weights."""
    config = tiny_config()
    frozen, diffusion = params.split(random_params(config, 0, copy=True))
    if mesh is not None:
        place = lambda tree: jax.device_put(tree, sharding.tree_shardings(tree, mesh))
        frozen, diffusion = place(frozen), place(diffusion)
    if stacked:
        frozen, diffusion = params.stack(frozen), params.stack(diffusion)
    model, optimizer = Model(config, mesh, remat), trainer.adamw(3e-3, STEPS, 0.2)
    state = trainer.init_state(diffusion, optimizer, mesh)
    losses = []
    for _ in range(STEPS):
        batch = trainer.to_devices(rows(), micro, model)
        state, metrics = trainer.train_step(
            state, frozen, batch, jnp.uint32(3), model=model, optimizer=optimizer,
            objective=Objective(8),
        )  # fmt: skip
        losses.append(float(metrics["loss"]))
    whole = params.unstack(state.diffusion) if stacked else state.diffusion
    parts = [np.ravel(x) for x in jax.tree.leaves(whole)]
    return losses, np.concatenate(parts)


def text(mesh, loop):
    """What a batch of eight prompts is answered."""
    config = tiny_config(tie_word_embeddings=False)
    weights = random_params(config, 1)
    if mesh is not None:
        weights = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
    prompts = jnp.asarray(np.random.default_rng(1).integers(0, 60, (8, 7)), jnp.int32)
    lengths = jnp.arange(8, dtype=jnp.int32) % 7 + 1
    if mesh is not None:
        prompts, lengths = jax.device_put((prompts, lengths), sharding.rows_sharding(mesh))
    model = Model(config, mesh)
    state = decoding.prefill(
        model, weights, prompts, lengths, jnp.full(8, 20), NO_EOS, slots=64, max_new_tokens=20
    )
    return np.asarray(loop(model, weights, state).tokens).tolist()


def main():
    tiled.ROW_TILE, tiled.KV_TILE = 32, 32  # so that this small model is attended in tiles
    divergence.TEACHER_TILE, divergence.STUDENT_TILE = 24, 16
    losses, weights = curve(None)
    plain, _ = curve(None, stacked=False, remat="none")
    summed, summed_weights = curve(None, micro=4)
    found = {"one": losses, "unstacked": plain, "accumulated": summed, "meshes": {}}
    found["accumulated_weights"] = float(np.abs(summed_weights - weights).max())
    ar, orthrus = text(None, decoding.ar_decode), text(None, orthrus_decode)
    found["ar"] = ar == orthrus
    for name in sys.argv[1:]:
        mesh = sharding.make_mesh(*MESHES[name])
        losses, theirs = curve(mesh)
        found["meshes"][name] = {
            "losses": losses,
            "weights": float(np.abs(theirs - weights).max()),
            "again": bool((curve(mesh)[1] == theirs).all()),
            "text": text(mesh, orthrus_decode) == ar == text(mesh, decoding.ar_decode),
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
