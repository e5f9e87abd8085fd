"""Compile the real programs for a TPU that is not here: `python -m orthrus_jax.aot --help`.

XLA's TPU compiler is a library (`pip install libtpu`) that runs on any Linux host. It says what a
person wants to know before renting a slice: whether a program fits, how many GiB each device needs,
and what it takes to compile. No weights are loaded and nothing is run.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax import decoding, sharding
from orthrus_jax.cli import add_blocks
from orthrus_jax.config import PRESETS, ModelConfig, preset_of
from orthrus_jax.decoding import overlapped as ahead
from orthrus_jax.engine import BLOCKS, CYCLES, Plan
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.model import REMAT, Model, params

CHIPS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of memory a chip
LOOPS: dict[str, Any] = {
    "ar": decoding.ar_decode,
    "orthrus": decoding.orthrus_decode,  # the paper's cycle
    "two-forward": ahead.two_forward_decode,
    "one-forward": ahead.one_forward_decode,
}
PROGRAMS = ("prefill", *LOOPS, "train")
MOST = {"context": 40_960, "batch": 1024}  # where --largest stops: Qwen3's own limit; enough
DECODING_MESH = {"data": 1, "fsdp": 1, "tensor": -1}
PROMPT, ANSWER = 1024, 2048  # rows that prefill reads, tokens that a loop may emit


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
        raise UserError(
            f"--topology {topology} is not KIND:SHAPE with a KIND of {', '.join(CHIPS)}"
        )
    one = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one)
    except Exception as error:  # the library's own word on what it knows
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--topology {topology} is refused by libtpu: {why:.200}") from None
    return list(found.devices)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a parameter tree or training state, with where each lies."""
    return jax.tree.map(_placed, tree, sharding.tree_shardings(tree, mesh))


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def weights(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes of both views' parameters in the config's dtype."""
    shape = jax.eval_shape(Model(config).init, jax.random.key(0))
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype)
    return on_mesh(jax.tree.map(cast, shape), mesh)


class Program(NamedTuple):
    """A program ready to compile.

    Attributes:
      lowered: what jax lowered.
      parts: what it takes, by name; shapes with their places.
    """

    lowered: Any
    parts: dict[str, Any]


def lower_decoding(
    program: str,
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    context: int,
    blocks: Plan | None = None,
) -> Program:
    """Prefill or a loop for `batch` rows of `context` positions; `blocks` as a cycle needs."""
    model, tree = Model(config, mesh), weights(config, mesh)
    place = lambda x: _placed(x, sharding.batch_sharding(x.shape, mesh))
    prompt = min(context, PROMPT)
    sizes = {"slots": context, "max_new_tokens": min(context, ANSWER)}
    ids, vector = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, prompt), (batch,)))
    read = partial(decoding.prefill, model, **sizes)
    inputs = jax.tree.map(place, (ids, vector, vector, jax.ShapeDtypeStruct((batch, 2), jnp.int32)))
    if program == "prefill":
        lowered = decoding.prefill.lower(model, tree, *inputs, **sizes)
        return Program(lowered, {"weights": tree})
    state = jax.eval_shape(read, tree, *inputs)
    state = jax.tree.map(_placed, state, decoding.shardings(state, mesh))
    loop, static = LOOPS[program], {}
    if program in CYCLES:
        static["scheme"] = scheme = dataclasses.replace(blocks or Plan(), cycle=program).scheme(
            config
        )
        if program == "one-forward":
            nothing = jax.eval_shape(lambda: scheme.nothing(batch))
            state = state.replace(ahead=jax.tree.map(place, nothing))
    lowered = loop.lower(model, tree, state, **static)
    return Program(lowered, {"weights": tree, "cache": state.cache})


def lower_training(config: ModelConfig, mesh: Mesh, recipe: Any) -> Program:
    """The training step of a recipe (`config.train`).

    Raises:
      UserError: for a batch that does not divide among micro-batches and devices.
    """
    # The one place where the library looks at the trainer, and only when asked to compile it.
    from train import trainer
    from train.data import Rows
    from train.main import objective_of

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
    micro, each = recipe.accumulate, recipe.batch_size // recipe.accumulate
    rows = lambda dtype: jax.ShapeDtypeStruct(
        (micro, each, recipe.row_length), dtype, sharding=sharding.rows_sharding(mesh, axis=1)
    )
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


def gib_a_device(tree: Any) -> float:
    """GiB of a tree of placed shapes on one device, before the device's own padding."""
    here = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(here, jax.tree.leaves(tree))) / 2**30


def report(program: Program, limit: float, text: str | None = None) -> dict[str, Any]:
    """Compile; GiB a device by part, and whether all of it fits `limit` GiB.

    A program that the compiler finds too large is reported in the compiler's words. What it made of
    one that it took is written to the file `text`.
    """
    found: dict[str, Any] = {
        f"{name.replace(' ', '_')}_gib": gib_a_device(tree) for name, tree in program.parts.items()
    }
    begin, worked = time.perf_counter(), time.process_time()
    try:
        compiled = program.lowered.compile()
    except Exception as error:
        told = str(error)
        if "RESOURCE_EXHAUSTED" not in told and "Ran out of memory" not in told:
            raise
        lines = told.splitlines()
        first = next((line for line in lines if "hbm" in line.lower()), lines[0])
        found |= {"fits": False, "why": first.strip()[:200]}
    else:
        if text is not None:
            pathlib.Path(text).write_text(compiled.as_text() or "", encoding="utf-8")
        memory = compiled.memory_analysis()
        gib = lambda name: getattr(memory, f"{name}_size_in_bytes") / 2**30
        found["arguments_gib"] = gib("argument")
        found["results_gib"] = gib("output") - gib("alias")
        found["temporaries_gib"] = gib("temp")
        total = found["arguments_gib"] + found["results_gib"] + found["temporaries_gib"]
        found |= {"total_gib": total, "fits": total <= limit}
    # Of the two, the processor's time says something on a busy host.
    return found | {
        "seconds": time.perf_counter() - begin,
        "processor_seconds": time.process_time() - worked,
    }


def largest(fits: Callable[[int], bool], first: int, last: int) -> int:
    """The largest first * 2**i up to `last` that fits, 0 if none does; each try compiles once."""
    best, size = 0, first
    while size <= last and fits(size):
        best, size = size, 2 * size
    return best


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orthrus_jax.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--preset", choices=sorted(PRESETS), help="a Qwen3 size; decoding only")
    size.add_argument("--config", metavar="FILE", help="a training configuration, and its base")
    add("--topology", required=True, metavar="KIND:SHAPE", help="e.g. v5e:1x1, v5e:2x2, v6e:2x4")
    add("--program", choices=PROGRAMS, required=True)
    add("--batch", type=int, default=1, help="rows decoded; default: %(default)s")
    add("--context", type=int, default=4096, help="cache slots a row; default: %(default)s")
    add_blocks(parser)
    add("--accumulate", type=int, help="train: micro-batches a step; default: the recipe's")
    add("--remat", choices=sorted(REMAT), help="train: what is recomputed; default: the recipe's")
    for axis, default in DECODING_MESH.items():
        what = "what is left" if default < 0 else default
        add(f"--{axis}", type=int, help=f"mesh axis; default: the recipe's, {what} when decoding")
    add(
        "--largest",
        choices=("context", "batch"),
        help="double it, from --context or --batch on, while the program fits; when training, the "
        "rows of a micro-batch, from --accumulate's on",
    )
    add("--text", metavar="FILE", help="write the compiled program there, to read what is copied")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _recipe(path: str) -> tuple[ModelConfig, Any]:
    """The size a training configuration's base is named after, and the configuration."""
    spec = importlib.util.spec_from_file_location("run_configuration", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).exists():
        raise UserError(f"--config {path} is not there, or is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    try:
        return preset_of(config.base), config
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _lowering(
    args: argparse.Namespace, devices: Sequence[Any]
) -> tuple[Callable[..., Program], dict[str, tuple[int, int]]]:
    """A function of the batch and context; of each, the command's own and where --largest stops.

    In training the batch is a micro-batch: a step of the recipe's rows has the fewer of them.
    """
    training = args.program == "train"
    if training and args.preset:
        raise UserError("--program train needs --config, which holds the recipe")
    if training and args.largest == "context":
        raise UserError("--largest context is of decoding: a recipe's rows are --largest batch")
    run: Any
    config, run = (PRESETS[args.preset], None) if args.preset else _recipe(args.config)
    axes = dict(run.mesh if training else DECODING_MESH)
    axes |= {axis: size for axis in axes if (size := getattr(args, axis)) is not None}
    mesh = sharding.make_mesh(**axes, devices=devices)
    sharding.check_divides(config, mesh)
    if not training:
        blocks = Plan(**{name: getattr(args, name) for name in BLOCKS})
        sizes = {"batch": args.batch, "context": args.context}
        lower = partial(lower_decoding, args.program, config, mesh, blocks=blocks)
        ranges = {name: (size, MOST[name]) for name, size in sizes.items()}
        return lambda **changes: lower(**(sizes | changes)), ranges
    run.train.accumulate = args.accumulate or run.train.accumulate
    run.train.remat = args.remat or run.train.remat

    def step(batch: int | None = None) -> Program:
        if batch is not None:
            run.train.accumulate = run.train.batch_size // batch
        return lower_training(config, mesh, run.train)

    rows = run.train.batch_size
    first = last = rows // run.train.accumulate
    while rows % (2 * last) == 0:
        last *= 2
    return step, {"batch": (first, last)}


def _say(found: dict[str, Any], limit: float, devices: int) -> None:
    parts = [f"{k[:-4].replace('_', ' ')} {v:.2f}" for k, v in found.items() if k.endswith("_gib")]
    verdict = "fits" if found["fits"] else "does not fit"
    print(f"{verdict} {limit} GiB a device, {devices} device(s)")
    print(f"GiB a device: {', '.join(parts)}")
    print(f"compiled in {found['seconds']:.0f} s, {found['processor_seconds']:.0f} s of processors")
    if "why" in found:
        print(f"the compiler: {found['why']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # what is compiled here is not run here
    devices = tpu_devices(args.topology)
    lower, ranges = _lowering(args, devices)
    limit = CHIPS[args.topology.partition(":")[0]]
    found = report(lower(), limit, args.text)
    if args.largest:
        size, last = ranges[args.largest]

        def fits(n: int) -> bool:  # takes minutes: say what came of it
            tried = report(lower(**{args.largest: n}), limit)
            told = f"{tried['total_gib']:.2f} GiB" if "total_gib" in tried else tried["why"]
            print(f"{args.largest} {n}: {told}", file=sys.stderr)
            return tried["fits"]

        more = largest(fits, 2 * size, last) if found["fits"] else 0
        found[f"largest_{args.largest}"] = more or (size if found["fits"] else 0)
    if args.json:
        print(json.dumps(vars(args) | found))
    else:
        _say(found, limit, len(devices))
        if args.largest:
            print(f"largest {args.largest} that fits: {found[f'largest_{args.largest}']}")
    if not found["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
