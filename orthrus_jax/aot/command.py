"""Compile prefill and decoding for a TPU or GPU that is not attached: `--help`.

XLA's compilers are libraries that run on any Linux host: libtpu for TPUs, JAX's CUDA plugin for
GPUs (no driver is needed). Before a machine is rented they say whether a program fits, in how many
GiB, how many kernels, loops and copies it has, and how long the compiler believes that one turn of
it takes. No weights are loaded and nothing is run.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from orthrus_jax import sharding
from orthrus_jax.aot import report, room
from orthrus_jax.aot.programs import METHODS, PROGRAMS, lower_decoding, shallow
from orthrus_jax.aot.targets import chip_of, devices_of
from orthrus_jax.attention.kv_config import kv_cache_of
from orthrus_jax.cli import add_blocks, add_kv_cache, strategy_of
from orthrus_jax.config import PRESETS
from orthrus_jax.errors import UserError, program_name

SEARCH_LIMIT = {
    "context": 40_960,
    "batch": 1024,
}  # where --largest stops: Qwen3's own limit; enough
MESH = {"data": 1, "fsdp": 1, "tensor": -1}  # defaults; -1 takes the remaining devices
ROWS = (1, 8, 16, 32, 64, 128, 256)
MEMORY = "memory"  # no program: what fits by shapes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("aot"),
        description=__doc__,
        epilog="The training step of a configuration: python -m train.aot --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), required=True, help="a Qwen3 size")
    add(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="TPUs: v5e:1x1, v5e:2x2, v6e:2x4; GPUs: h100:1, h200:1, a100-80g:1, l4:1",
    )
    add(
        "--program",
        choices=(*PROGRAMS, MEMORY),
        required=True,
        help="forward: verifications of "
        f"{', '.join(map(str, ROWS))} rows, their time estimated from 2 and 4 layers; "
        f"{MEMORY}: what fits with each kind of cache, nothing compiled",
    )
    add("--batch", type=int, default=1, help="sequences decoded together; default: %(default)s")
    add("--context", type=int, default=4096, help="cache slots per row; default: %(default)s")
    add_blocks(parser, "--program")
    add_kv_cache(parser)
    for axis, size in MESH.items():
        default = "the remaining devices" if size < 0 else size
        add(f"--{axis}", type=int, default=size, help=f"mesh axis; default: {default}")
    add("--largest", choices=sorted(SEARCH_LIMIT), help="double it while the program fits")
    add(
        "--estimate-only",
        action="store_true",
        help="compile 2 and 4 layers in place of all: time, kernels and copies, no memory",
    )
    add("--text", metavar="FILE", help="write the compiled program's text to FILE")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    by_depth = args.estimate_only or args.program in ("forward", MEMORY)
    for name in ("largest", "text"):
        if by_depth and (value := getattr(args, name)):
            raise UserError(f"--{name} {value} needs a whole program: not with --program forward "
                            f"or {MEMORY}, or --estimate-only")  # fmt: skip
    method = METHODS.get(args.program)
    strategy = strategy_of(args, method, selector="--program") if method else None
    chip = chip_of(args.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing compiled here is run here
    devices = devices_of(args.topology)
    config = PRESETS[args.preset]
    mesh = sharding.make_mesh(**{axis: getattr(args, axis) for axis in MESH}, devices=devices)
    sharding.check_divides(config, mesh)
    sizes = {"batch": args.batch, "context": args.context}
    if args.program == MEMORY:
        result: dict[str, Any] = {"by_cache": room.room_by_cache(config, mesh, chip, **sizes)}
        report.finish(vars(args), result, chip, len(devices), as_json=args.json)
        return
    kv_cache = kv_cache_of(args.kv_cache)
    quantised = {} if kv_cache is None else {"kv_cache": kv_cache}

    def lower(layers: int = config.num_hidden_layers, **options: Any) -> Any:
        options = sizes | {"strategy": strategy} | quantised | options
        return lower_decoding(args.program, shallow(config, layers), mesh, **options)

    by_layers = lambda **options: report.estimate_by_depth(
        lambda layers: lower(layers, **options), config.num_hidden_layers, chip
    )
    if args.program == "forward":
        result = {"rows": {rows: by_layers(rows=rows) for rows in ROWS}}
    elif by_depth:
        result = by_layers()
    else:
        result = report.compile_report(lower(), chip, args.text)
    if name := args.largest:
        resized = lambda n: lower(**{name: n})
        more = partial(report.grow, name, resized, sizes[name], SEARCH_LIMIT[name])
        result[f"largest_{name}"] = int(result["fits"] and more(chip))
    report.finish(vars(args), result, chip, len(devices), as_json=args.json)
