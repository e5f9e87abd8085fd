"""Turn a base into an Orthrus checkpoint, ready to be trained: `python -m orthrus_jax.convert`.

A base gets a diffusion view that copies its attention; an Orthrus keeps its own, so the command
also changes a checkpoint's dtype. Knows no tensors: checkpoint/ reads and writes them.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from orthrus_jax.config import DTYPES, ModelConfig
from orthrus_jax.errors import program_name, run_command
from orthrus_jax.tokenizer import check_vocabulary, load_tokenizer, require_mask_token


def main(argv: Sequence[str] | None = None, *, progress: bool = True) -> None:
    """Run the command; without `argv`, with the process's own arguments.

    Raises:
      UserError: when the source cannot be loaded or the target cannot be written.
      SystemExit: for --help and for flags that do not parse.
    """
    args = _parse(argv)
    from orthrus_jax import checkpoint
    from orthrus_jax.model import params  # jax takes seconds: --help does not wait for it

    checkpoint.check_target(args.target, overwrite=args.overwrite)
    options: dict[str, Any] = {"dtype": args.dtype, "progress": progress}
    if args.source.endswith(".gguf"):
        file = checkpoint.open_gguf(pathlib.Path(args.source))
        config, tokenizer = checkpoint.gguf_config(file), checkpoint.gguf_tokenizer(file)
        check_vocabulary(tokenizer, config)
        config = require_mask_token(config, tokenizer, args.mask_token)
        loaded = checkpoint.load_gguf(file, **options)
        files: dict[str, Any] = {"tokenizer": tokenizer}
    else:
        source = checkpoint.resolve(args.source)
        config = _masked(checkpoint.read_config(source).config, source, args.mask_token)
        loaded = checkpoint.load_checkpoint(source, **options)
        files = {"tokenizer_from": source}
    config = dataclasses.replace(loaded.config, mask_token_id=config.mask_token_id)
    checkpoint.save_checkpoint(
        args.target,
        config,
        loaded.params,
        overwrite=args.overwrite,
        progress=progress,
        **files,
    )
    frozen, diffusion = (params.count(part) for part in params.split(loaded.params))
    gigabytes = sum(path.stat().st_size for path in args.target.glob("*.safetensors")) / 1e9
    view = "unchanged" if loaded.trained else "a copy of the AR attention, untrained"
    print(
        f"wrote {args.target}: {frozen:,} frozen parameters, {diffusion:,} in the diffusion view "
        f"({view}), {gigabytes:.3g} GB, {loaded.config.dtype}"
    )


def _masked(config: ModelConfig, source: pathlib.Path, named: str) -> ModelConfig:
    """The config with a MASK token; the tokenizer is asked where config.json does not say."""
    if config.mask_token_id is not None and not named:
        return config
    return require_mask_token(config, load_tokenizer(source), named)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program_name("convert"),
        description="Turn a base (Qwen3, Qwen2, Llama, Mistral) into an Orthrus checkpoint, its "
        "diffusion view a copy of its attention, ready to be trained; or change the dtype of an "
        "Orthrus.",
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
        metavar="DIR",
        type=pathlib.Path,
        help="where the Orthrus checkpoint goes",
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
