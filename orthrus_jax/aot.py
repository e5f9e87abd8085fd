"""Compile the real programs for a TPU that is not here: `python -m orthrus_jax.aot --help`.

XLA's TPU compiler is a library (`pip install libtpu`) that runs on any Linux host. It says what a
person wants to know before renting a slice: whether a program fits, how many GiB each device needs,
and what it takes to compile. No weights are loaded and nothing is run.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax import decode, params, sharding
from orthrus_jax.config import PRESETS, ModelConfig
from orthrus_jax.engine import bucket
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.model import REMAT, Model

CHIPS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of memory a chip
PROGRAMS = ("prefill", "ar", "orthrus", "train")
Lowered = Any


def tpu_devices(topology: str) -> list[Any]:
    """Descriptions of the chips of a slice such as "v5e:2x2", on any host.

    Raises:
      UserError: without libtpu, or for a topology that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("ahead-of-time compilation for TPU needs libtpu: pip install libtpu")
    from jax.experimental import topologies

    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        raise UserError(f"--topology {topology} is not KIND:SHAPE with a KIND of {', '.join(CHIPS)}")
    one = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one)
    except Exception as error:  # the library's own word on what it knows
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--topology {topology} is refused by libtpu: {why:.200}") from None
    return list(found.devices)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a parameter tree or training state, with where each lies."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, tree, sharding.of_tree(tree, mesh))


def weights(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes of both views' parameters in the config's dtype."""
    shape = jax.eval_shape(Model(config).init, jax.random.key(0))
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype)
    return on_mesh(jax.tree.map(cast, shape), mesh)


def lower_decoding(
    program: str, config: ModelConfig, mesh: Mesh, *, batch: int, context: int, prompt: int
) -> Lowered:
    """Lower prefill, the AR loop or the Orthrus loop for `batch` rows of `context` positions."""
    model, tree = Model(config, mesh), weights(config, mesh)
    rows = P(sharding.BATCH) if batch % mesh.size == 0 else P()
    heads = lambda x: P(*rows, *(None,) * (x.ndim - 1))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, heads(x)))
    slots, width = bucket(context + config.block_size), bucket(min(context, 2048))
    make = lambda: decode.prefill(
        model,
        tree,
        jnp.zeros((batch, prompt), jnp.int32),
        jnp.ones(batch, jnp.int32),
        jnp.ones(batch, jnp.int32),
        jnp.full((batch, 2), -1, jnp.int32),
        slots=slots,
        max_new_tokens=width,
    )
    if program == "prefill":
        vector = place(jax.ShapeDtypeStruct((batch,), jnp.int32))
        ids = lambda n: place(jax.ShapeDtypeStruct((batch, n), jnp.int32))
        return decode.prefill.lower(
            model, tree, ids(prompt), vector, vector, ids(2), slots=slots, max_new_tokens=width
        )
    state = jax.tree.map(
        lambda x: place(x) if x.shape[:1] == (batch,) else on_mesh(x, mesh),
        jax.eval_shape(lambda tree: make(), tree),
    )
    loop = decode.ar_decode if program == "ar" else decode.orthrus_decode
    return loop.lower(model, tree, state)


def lower_training(config: ModelConfig, mesh: Mesh, recipe: Any) -> Lowered:
    """Lower the training step of a recipe (`config.train`)."""
    # The one place where the library looks at the trainer, and only when asked to compile it.
    from train import trainer
    from train.data import Rows
    from train.main import objective_of

    sizes = dataclasses.replace(config, block_size=recipe.block_size, dtype=recipe.dtype)
    model = Model(sizes, mesh, recipe.remat)
    freeze = () if recipe.train_o_proj else ("o_proj",)
    trees = params.split(weights(sizes, mesh), freeze=freeze)
    if recipe.stack_layers:
        trees = tuple(jax.eval_shape(params.stack, tree) for tree in trees)
    frozen, diffusion = (on_mesh(tree, mesh) for tree in trees)
    optimizer = trainer.adamw(recipe.learning_rate, recipe.steps, recipe.warmup)
    state = on_mesh(jax.eval_shape(lambda d: trainer.init_state(d, optimizer), diffusion), mesh)
    micro, each = recipe.accumulate, recipe.batch_size // recipe.accumulate
    rows = lambda dtype: jax.ShapeDtypeStruct(
        (micro, each, recipe.row_length), dtype, sharding=sharding.of_batch(mesh, axis=1)
    )
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=NamedSharding(mesh, P()))
    return trainer.train_step.lower(
        state,
        frozen,
        Rows(rows(jnp.int32), rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_)),
        seed,
        model=model,
        optimizer=optimizer,
        objective=objective_of(recipe),
    )


def report(lowered: Lowered, limit: float) -> dict[str, Any]:
    """Compile; GiB a device of arguments, results and temporaries, and whether they fit `limit`.

    A program that the compiler finds too large is reported by its own figure.
    """
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:
        told = str(error)
        if "RESOURCE_EXHAUSTED" not in told and "Ran out of memory" not in told:
            raise
        first = next((x for x in told.splitlines() if "hbm" in x.lower()), told.splitlines()[0])
        return {"fits": False, "why": first.strip()[:200], "seconds": time.perf_counter() - begin}
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    gib = lambda name: getattr(memory, f"{name}_size_in_bytes") / 2**30
    found = {
        "arguments_gib": gib("argument"),
        "results_gib": gib("output") - gib("alias"),
        "temporaries_gib": gib("temp"),
    }
    total = sum(found.values())
    return found | {"total_gib": total, "fits": total <= limit, "seconds": seconds}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orthrus_jax.aot", description=__doc__)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--preset", choices=sorted(PRESETS), help="a Qwen3 size; decoding only")
    size.add_argument("--config", metavar="FILE", help="a training configuration, for its base's size")
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="e.g. v5e:1x1")
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    parser.add_argument("--batch", type=int, default=1, help="rows decoded; default: %(default)s")
    parser.add_argument("--context", type=int, default=4096, help="positions; default: %(default)s")
    parser.add_argument("--accumulate", type=int, help="train: micro-batches a step")
    parser.add_argument("--remat", choices=sorted(REMAT), help="train: what is recomputed")
    parser.add_argument("--fsdp", type=int, default=-1, help="mesh axis; default: what is left")
    parser.add_argument("--tensor", type=int, default=1, help="mesh axis; default: %(default)s")
    parser.add_argument("--data", type=int, default=1, help="mesh axis; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _of_file(path: str) -> tuple[ModelConfig, Any]:
    """A training configuration, and the preset its base is named after."""
    spec = importlib.util.spec_from_file_location("run_configuration", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).exists():
        raise UserError(f"--config {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    name = config.base.split("/")[-1].lower()
    if name not in PRESETS:
        raise UserError(f"--config {path}: its base {config.base!r} is none of {', '.join(PRESETS)}")
    return PRESETS[name], config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    devices = tpu_devices(args.topology)
    mesh = sharding.make_mesh(args.data, args.fsdp, args.tensor, devices=devices)
    config, run = (PRESETS[args.preset], None) if args.preset else _of_file(args.config)
    sharding.check(config, mesh)
    lower: Callable[[], Lowered]
    if args.program == "train":
        if run is None:
            raise UserError("--program train needs --config, which holds the recipe")
        if args.accumulate:
            run.train.accumulate = args.accumulate
        if args.remat:
            run.train.remat = args.remat
        lower = lambda: lower_training(config, mesh, run.train)
    else:
        shape = {"batch": args.batch, "context": args.context, "prompt": min(args.context, 1024)}
        lower = lambda: lower_decoding(args.program, config, mesh, **shape)
    limit = CHIPS[args.topology.partition(":")[0]]
    found = report(lower(), limit)
    if args.json:
        print(json.dumps(vars(args) | found))
        return
    if "why" in found:
        print(f"does not fit {limit} GiB a chip: {found['why']}")
    else:
        print(
            f"{'fits' if found['fits'] else 'does not fit'} {limit} GiB a chip: "
            f"arguments {found['arguments_gib']:.2f}, results {found['results_gib']:.2f}, "
            f"temporaries {found['temporaries_gib']:.2f} GiB"
        )
    print(f"compiled in {found['seconds']:.0f} s for {len(devices)} device(s)", file=sys.stderr)
    if not found["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
