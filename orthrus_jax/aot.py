"""Compile prefill and decoding for a TPU that is not attached: `python -m orthrus_jax.aot --help`.

XLA's TPU compiler is a library (`pip install libtpu`) that runs on any Linux host. Before a
slice is rented it reports whether a program fits, how many GiB each device needs, and how long
compilation takes. No weights are loaded and nothing is run.
"""

import argparse
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
from jax.sharding import Mesh

from orthrus_jax import decoding, sharding
from orthrus_jax.cli import add_blocks, strategy_of
from orthrus_jax.config import PRESETS, ModelConfig
from orthrus_jax.decoding import Strategy
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.errors import UserError, program_name, run_command
from orthrus_jax.files import first_line
from orthrus_jax.model import Model

CHIPS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of memory per chip
METHODS = {
    "ar": "ar",
    "orthrus": "orthrus",
    "two-forward": "orthrus-2f",
    "one-forward": "orthrus-1f",
}
PROGRAMS = ("prefill", *METHODS)
SEARCH_LIMIT = {
    "context": 40_960,
    "batch": 1024,
}  # where --largest stops: Qwen3's own limit; enough
MESH = {"data": 1, "fsdp": 1, "tensor": -1}  # defaults; -1 takes the remaining devices
PROMPT, ANSWER = 1024, 2048  # prompt tokens that prefill reads, tokens that a loop may emit


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
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one)
    except Exception as error:  # libtpu raises its own types for an unknown topology
        why = first_line(error)
        raise UserError(f"--topology {topology} is refused by libtpu: {why:.200}") from None
    return list(slice_.devices)


def chip_gib(topology: str) -> int:
    """GiB of memory of one chip of a topology that `tpu_devices` accepts."""
    return CHIPS[topology.partition(":")[0]]


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a parameter tree or training state, each with its sharding."""
    return jax.tree.map(_with_sharding, tree, sharding.tree_shardings(tree, mesh))


def _with_sharding(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def weights(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes of both views' parameters in the config's dtype."""
    shape = jax.eval_shape(Model(config).init, jax.random.key(0))
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype)
    return on_mesh(jax.tree.map(cast, shape), mesh)


class Program(NamedTuple):
    """A program ready to compile.

    Attributes:
      lowered: the program, traced and lowered by jax.
      parts: its inputs by name; shapes with their shardings.
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
    strategy: Strategy | None = None,
) -> Program:
    """Prefill, or a loop, for `batch` rows of `context` positions; the loop is `strategy`'s."""
    model, tree = Model(config, mesh), weights(config, mesh)
    place = lambda x: _with_sharding(x, sharding.batch_sharding(x.shape, mesh))
    prompt = min(context, PROMPT)
    sizes = {"slots": context, "max_new_tokens": min(context, ANSWER)}
    ids, vector = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, prompt), (batch,)))
    read = partial(decoding.prefill, model, **sizes)
    inputs = jax.tree.map(place, (ids, vector, vector, jax.ShapeDtypeStruct((batch, 2), jnp.int32)))
    if program == "prefill":
        lowered = decoding.prefill.lower(model, tree, *inputs, **sizes)
        return Program(lowered, {"weights": tree})
    state = jax.eval_shape(read, tree, *inputs)
    state = jax.tree.map(_with_sharding, state, decoding.shardings(state, mesh))
    strategy = (strategy or Strategy(METHODS[program])).resolve(config)
    carry = jax.eval_shape(lambda: first_carry(strategy, model, batch, context))
    state = state.replace(drafter=jax.tree.map(place, carry))
    loop, static = loop_of(strategy, model)
    lowered = loop.lower(model, tree, state, **static)
    return Program(lowered, {"weights": tree, "cache": state.cache})


def gib_per_device(tree: Any) -> float:
    """GiB of a tree of placed shapes on one device, before the device's own padding."""
    local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(local, jax.tree.leaves(tree))) / 2**30


def compile_report(program: Program, limit: float, text: str | None = None) -> dict[str, Any]:
    """Compile; GiB per device by part, and whether the total fits `limit` GiB.

    A program that the compiler finds too large is reported with the compiler's own message. The
    compiled text of one that it accepts is written to the file `text`.
    """
    result: dict[str, Any] = {
        f"{name.replace(' ', '_')}_gib": gib_per_device(tree)
        for name, tree in program.parts.items()
    }
    begin, begin_cpu = time.perf_counter(), time.process_time()
    try:
        compiled = program.lowered.compile()
    except Exception as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        lines = message.split("\n")
        about_memory = next((line for line in lines if "hbm" in line.lower()), lines[0])
        result |= {"fits": False, "why": about_memory.strip()[:200]}
    else:
        if text is not None:
            pathlib.Path(text).write_text(compiled.as_text() or "", encoding="utf-8")
        memory = compiled.memory_analysis()
        gib = lambda name: getattr(memory, f"{name}_size_in_bytes") / 2**30
        result["arguments_gib"] = gib("argument")
        result["results_gib"] = gib("output") - gib("alias")
        result["temporaries_gib"] = gib("temp")
        total = result["arguments_gib"] + result["results_gib"] + result["temporaries_gib"]
        result |= {"total_gib": total, "fits": total <= limit}
    return result | {
        "seconds": time.perf_counter() - begin,
        "processor_seconds": time.process_time() - begin_cpu,  # meaningful on a busy host too
    }


def largest(fits: Callable[[int], bool], first: int, last: int) -> int:
    """The largest first * 2**i up to `last` that fits, 0 if none does; each try compiles once."""
    best, size = 0, first
    while size <= last and fits(size):
        best, size = size, 2 * size
    return best


def grow(name: str, lower: Callable[[int], Program], size: int, last: int, limit: float) -> int:
    """The largest size up to `last` that fits, doubled from a `size` that does.

    Every try takes minutes, so each is printed to stderr.

    Args:
      name: of the size, for the output.
      lower: the program of a size.
      size: known to fit.
      last: the search stops there.
      limit: GiB per device.
    """

    def fits(n: int) -> bool:
        result = compile_report(lower(n), limit)
        outcome = f"{result['total_gib']:.2f} GiB" if "total_gib" in result else result["why"]
        print(f"{name} {n}: {outcome}", file=sys.stderr)
        return result["fits"]

    return largest(fits, 2 * size, last) or size


def finish(
    options: dict[str, Any], result: dict[str, Any], limit: float, devices: int, *, as_json: bool
) -> None:
    """Print a report, as one JSON object with the options or as text; exit with 1 if too large."""
    if as_json:
        print(json.dumps(options | result))
    else:
        sizes = [(name, size) for name, size in result.items() if name.endswith("_gib")]
        parts = [f"{name[:-4].replace('_', ' ')} {size:.2f}" for name, size in sizes]
        verdict = "fits" if result["fits"] else "does not fit"
        seconds, cpu = result["seconds"], result["processor_seconds"]
        print(f"{verdict} {limit} GiB per device, {devices} device(s)")
        print(f"GiB per device: {', '.join(parts)}")
        print(f"compiled in {seconds:.0f} s, {cpu:.0f} s of processor time")
        if "why" in result:
            print(f"the compiler: {result['why']}")
        for name in result:
            if name.startswith("largest_"):
                print(f"largest {name.removeprefix('largest_')} that fits: {result[name]}")
    if not result["fits"]:
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("aot"),
        description=__doc__,
        epilog="The training step of a configuration: python -m train.aot --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), required=True, help="a Qwen3 size")
    add("--topology", required=True, metavar="KIND:SHAPE", help="e.g. v5e:1x1, v5e:2x2, v6e:2x4")
    add("--program", choices=PROGRAMS, required=True)
    add("--batch", type=int, default=1, help="sequences decoded together; default: %(default)s")
    add("--context", type=int, default=4096, help="cache slots per row; default: %(default)s")
    add_blocks(parser, "--program")
    for axis, size in MESH.items():
        default = "the remaining devices" if size < 0 else size
        add(f"--{axis}", type=int, default=size, help=f"mesh axis; default: {default}")
    add("--largest", choices=sorted(SEARCH_LIMIT), help="double it while the program fits")
    add("--text", metavar="FILE", help="write the compiled program's text to FILE")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing compiled here is run here
    devices = tpu_devices(args.topology)
    limit = chip_gib(args.topology)
    config = PRESETS[args.preset]
    mesh = sharding.make_mesh(**{axis: getattr(args, axis) for axis in MESH}, devices=devices)
    sharding.check_divides(config, mesh)
    method = METHODS.get(args.program)
    strategy = strategy_of(args, method, selector="--program") if method else None
    lower = partial(lower_decoding, args.program, config, mesh, strategy=strategy)
    sizes = {"batch": args.batch, "context": args.context}
    result = compile_report(lower(**sizes), limit, args.text)
    if name := args.largest:
        resized = lambda n: lower(**(sizes | {name: n}))
        fitting = result["fits"] and grow(name, resized, sizes[name], SEARCH_LIMIT[name], limit)
        result[f"largest_{name}"] = int(fitting)
    finish(vars(args), result, limit, len(devices), as_json=args.json)


if __name__ == "__main__":
    run_command(main)
