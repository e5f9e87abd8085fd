"""Compile a training step for a TPU or GPU that is not attached, to see whether it fits.

    python -m train.aot --config FILE --topology v5e:2x4

Any Linux host with libtpu, or for GPUs JAX's CUDA plugin, can do it: no weights are loaded and
nothing is run. orthrus_jax.aot holds the compilers and the report, and does the same for decoding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax import sharding
from orthrus_jax.aot import (
    Program,
    chip_of,
    compile_report,
    devices_of,
    finish,
    grow,
    on_mesh,
    weights,
)
from orthrus_jax.config import ModelConfig, preset_of
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, params
from train import cli, lock, settings, trainer
from train.data import Rows
from train.objective import objective_of

OPTIONS = {
    "topology": "KIND:SHAPE, what to compile for, e.g. v5e:1x1, v5e:2x4, h100:1",
    "largest": "batch: double the rows of a micro-batch while the step fits",
    "text": "FILE, write the compiled program's text there",
}


def lower_training(config: ModelConfig, mesh: Mesh, recipe: Any) -> Program:
    """Lower the training step of a recipe (`config.train`) for a base of the given sizes.

    Raises:
      UserError: for a batch that does not divide among micro-batches and devices.
    """
    trainer.check_batch(recipe, mesh)
    sizes = dataclasses.replace(config, block_size=recipe.block_size, dtype=recipe.dtype)
    model = Model(sizes, mesh, recipe.remat)
    freeze = () if recipe.train_o_proj else ("o_proj",)
    trees = params.split(weights(sizes, mesh), freeze=freeze)
    if recipe.stack_layers:
        trees = tuple(jax.eval_shape(params.stack, tree) for tree in trees)
    frozen, diffusion = (on_mesh(tree, mesh) for tree in trees)
    optimizer = trainer.adamw(recipe.learning_rate, recipe.steps, recipe.warmup)
    state = on_mesh(jax.eval_shape(lambda d: trainer.init_state(d, optimizer), diffusion), mesh)
    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, recipe.row_length)
    where = sharding.rows_sharding(mesh, axis=1)
    rows = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=NamedSharding(mesh, P()))
    lowered = trainer.train_step.lower(
        state,
        frozen,
        Rows(rows(jnp.int32), rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_)),
        seed,
        model=model,
        optimizer=optimizer,
        objective=objective_of(recipe),
    )
    return Program(lowered, {"weights": frozen, "training state": state})


def main(
    config: Any, *, topology: str | None, largest: str | None, text: str | None, json: bool
) -> None:
    """Compile, print the report, exit with 1 if the step does not fit.

    Args:
      config: `base`, which names a Qwen3 size; `mesh` and `train`.
      topology, largest, text: see OPTIONS.
      json: print one JSON object.

    Raises:
      UserError: for an option, a base, a mesh or a batch that is refused; without the compiler.
    """
    if topology is None:
        raise UserError("--topology KIND:SHAPE is required, e.g. --topology v5e:2x4")
    if largest not in (None, "batch"):
        raise UserError(f"--largest {largest}: the only choice is batch, the rows of a micro-batch")
    settings.check(config, "base", "mesh", "train")
    if text is not None:
        lock.check_writable("--text", text)
    sizes, recipe = preset_of(config.base), config.train
    chip = chip_of(topology)
    jax.config.update("jax_platforms", "cpu")  # nothing compiled here is run here
    devices = devices_of(topology)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    sharding.check_divides(sizes, mesh)
    options = {"base": config.base, "topology": topology, "program": "train", **config.mesh}
    options |= {"accumulate": recipe.accumulate, "remat": recipe.remat, "largest": largest}
    result = compile_report(lower_training(sizes, mesh, recipe), chip, text)
    if largest:
        rows = recipe.batch_size

        def lower(micro: int) -> Program:
            recipe.accumulate = rows // micro
            return lower_training(sizes, mesh, recipe)

        first = last = rows // recipe.accumulate
        while rows % (2 * last) == 0:
            last *= 2
        fitting = result["fits"] and grow("batch", lower, first, last, chip)
        result["largest_batch"] = int(fitting)
    finish(options, result, chip, len(devices), as_json=json)


if __name__ == "__main__":
    cli.run(
        main,
        default="configs/qwen3_0_6b.py",
        description=__doc__ or "",
        options=OPTIONS,
        switches={"json": "print one JSON object"},
        compile_cache=False,
    )
