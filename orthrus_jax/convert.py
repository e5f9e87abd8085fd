"""Turn a base into an Orthrus checkpoint, ready to be trained: `python -m orthrus_jax.convert`.

A base gets a diffusion view that copies its attention; an Orthrus keeps its own, so the command
also changes a checkpoint's dtype, takes a view apart from its base and puts the two together. Knows
no tensors: checkpoint/ reads and writes them.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from orthrus_jax.config import DTYPES
from orthrus_jax.errors import UserError, program_name, run_command
from orthrus_jax.tokenizer import check_vocabulary, load_tokenizer, require_mask_token


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
    alone = args.target.suffix == ".safetensors"
    _check_flags(args, alone)
    if alone:
        checkpoint.view_file(args.target, overwrite=args.overwrite)
    else:
        checkpoint.check_target(args.target, overwrite=args.overwrite)
    # Of a view alone the differences are taken in the source's dtype, then rounded.
    loaded, files = _load(args, None if alone else args.dtype, progress)
    frozen, diffusion = (params.count(part) for part in params.split(loaded.params))
    written: dict[str, Any] = {"overwrite": args.overwrite}
    if alone:
        options = {"head": loaded.head, "rank": args.rank, "dtype": args.dtype, **written}
        checkpoint.save_view(args.target, loaded.config, loaded.params, **options)
        held, sizes = "a diffusion view alone", [args.target]
    else:
        options = {"head": loaded.head, "progress": progress, **written, **files}
        checkpoint.save_checkpoint(args.target, loaded.config, loaded.params, **options)
        state = "unchanged" if loaded.trained else "a copy of the AR attention, untrained"
        held = f"{frozen:,} frozen parameters, {diffusion:,} in the diffusion view ({state})"
        sizes = list(args.target.glob("*.safetensors"))
    gigabytes = sum(path.stat().st_size for path in sizes) / 1e9
    dtype = args.dtype or loaded.config.dtype
    print(f"wrote {args.target}: {held}, {gigabytes:.3g} GB, {dtype}")


def _check_flags(args: argparse.Namespace, alone: bool) -> None:
    if args.rank is not None and not alone:
        raise UserError(f"--rank {args.rank} needs --to FILE.safetensors: a view written alone")
    if args.rank is not None and args.rank < 1:
        raise UserError(f"--rank {args.rank} must be at least 1")
    if args.view and args.mask_token:
        raise UserError(f"--mask-token {args.mask_token} beside --view: the view has its own")
    if args.view and args.source.endswith(".gguf"):
        raise UserError(f"--view {args.view}: convert {args.source} first, then add the view")


def _load(
    args: argparse.Namespace, dtype: str | None, progress: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the checkpoint, its config with a MASK token, and the source of its tokenizer."""
    from orthrus_jax import checkpoint

    options: dict[str, Any] = {"dtype": dtype, "progress": progress}
    if args.source.endswith(".gguf"):
        file = checkpoint.open_gguf(pathlib.Path(args.source))
        config, tokenizer = checkpoint.gguf_config(file), checkpoint.gguf_tokenizer(file)
        check_vocabulary(tokenizer, config)
        mask = require_mask_token(config, tokenizer, args.mask_token).mask_token_id
        loaded = checkpoint.load_gguf(file, **options)
        files: dict[str, Any] = {"tokenizer": tokenizer}
    else:
        view = checkpoint.open_view(args.view) if args.view else None
        source = checkpoint.resolve(args.source)
        mask = view.mask_token_id if view else _mask_token(source, args.mask_token)
        loaded = checkpoint.load_checkpoint(source, view=view, **options)
        files = {"tokenizer_from": source}
    config = dataclasses.replace(loaded.config, mask_token_id=mask)
    return loaded._replace(config=config), files


def _mask_token(source: pathlib.Path, named: str) -> int | None:
    """The id of the MASK token; the tokenizer is asked where config.json does not say."""
    from orthrus_jax import checkpoint

    config = checkpoint.read_config(source).config
    if config.mask_token_id is not None and not named:
        return config.mask_token_id
    return require_mask_token(config, load_tokenizer(source), named).mask_token_id


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program_name("convert"),
        description="Turn a base (Qwen3, Qwen2, Llama, Mistral) into an Orthrus checkpoint, its "
        "diffusion view a copy of its attention, ready to be trained; change the dtype of an "
        "Orthrus; take its view apart from its base, or put the two together.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR_OR_ID",
        help="a base or an Orthrus: a directory, or a hub id such as Qwen/Qwen3-1.7B; or a base in "
        "a file that ends in .gguf",
    )
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        metavar="DIR_OR_FILE",
        type=pathlib.Path,
        help="where the Orthrus checkpoint goes; a name that ends in .safetensors takes the "
        "diffusion view alone, without its base",
    )
    parser.add_argument(
        "--view",
        metavar="FILE_OR_DIR_OR_ID",
        help="put this diffusion view, saved without its base, in the place of the source's own",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="of a view written alone: keep each projection as its best difference of rank R to "
        "the AR view's; default: whole",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: the source's; float32 of a quantised one"
    )
    parser.add_argument(
        "--mask-token",
        default="",
        metavar="TOKEN_OR_ID",
        help="what the diffusion view reads in place of unknown tokens; default: config.json's, or "
        "a row past the tokenizer, or a special token that chats leave unused",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that --to holds"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
