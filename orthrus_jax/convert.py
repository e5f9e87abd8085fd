"""Turn a Qwen3 into an Orthrus checkpoint, ready to be trained: `python -m orthrus_jax.convert`.

A Qwen3 gets a diffusion view that copies its attention; an Orthrus keeps its own, so the command
also changes a checkpoint's dtype. Knows no tensors: checkpoint/ reads and writes them.
"""

import argparse
import pathlib
from collections.abc import Sequence

from orthrus_jax.config import DTYPES
from orthrus_jax.errors import program_name, run_command


def main(argv: Sequence[str] | None = None, *, progress: bool = True) -> None:
    """Run the command; without `argv`, with the process's own arguments.

    Raises:
      UserError: when the source cannot be loaded or the target cannot be written.
      SystemExit: for --help and for flags that do not parse.
    """
    args = _parse(argv)
    from orthrus_jax import checkpoint, runtime
    from orthrus_jax.model import params  # jax takes seconds: --help does not wait for it

    runtime.check_devices()
    checkpoint.check_target(args.target, overwrite=args.overwrite)
    loaded = checkpoint.load_checkpoint(args.source, dtype=args.dtype, progress=progress)
    checkpoint.save_checkpoint(
        args.target,
        loaded.config,
        loaded.params,
        head=loaded.head,
        tokenizer_from=loaded.directory,
        overwrite=args.overwrite,
        progress=progress,
    )
    frozen, diffusion = (params.count(part) for part in params.split(loaded.params))
    gigabytes = sum(path.stat().st_size for path in args.target.glob("*.safetensors")) / 1e9
    view = "unchanged" if loaded.trained else "a copy of the AR attention, untrained"
    print(
        f"wrote {args.target}: {frozen:,} frozen parameters, {diffusion:,} in the diffusion view "
        f"({view}), {gigabytes:.3g} GB, {loaded.config.dtype}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program_name("convert"),
        description="Turn a Qwen3 into an Orthrus checkpoint, its diffusion view a copy of its "
        "attention, ready to be trained; or change the dtype of an Orthrus.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR_OR_ID",
        help="a Qwen3 or Orthrus: a directory, or a hub id such as Qwen/Qwen3-1.7B",
    )
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        metavar="DIR",
        type=pathlib.Path,
        help="where the Orthrus checkpoint goes",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the source's")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that --to holds"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
