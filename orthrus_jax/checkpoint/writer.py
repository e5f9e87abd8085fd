"""Write a checkpoint, of an Orthrus or of a base model: a whole directory, or nothing.

Decides the files and their order. Knows no training state.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from orthrus_jax.checkpoint.directory import (
    INDEX,
    SINGLE,
    TOKENIZER_FILE,
    check_target,
    checked_path,
    replacing,
)
from orthrus_jax.checkpoint.head import save_head
from orthrus_jax.checkpoint.hf_config import config_to_hf
from orthrus_jax.checkpoint.tensors import (
    FILE_DTYPES,
    TensorSpec,
    cast_on_host,
    shorten,
    tensor_specs,
    to_host,
)
from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.model.pairwise import Head
from orthrus_jax.model.params import DIFFUSION
from orthrus_jax.model.transformer import Params
from orthrus_jax.values import check_switch, check_type, check_whole


def save_checkpoint(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: Params,
    *,
    head: Head | None = None,
    tokenizer: Any = None,
    tokenizer_from: pathlib.Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> None:
    """Write a checkpoint directory: the published Orthrus layout, or a base model's.

    It is an Orthrus iff `params` holds the diffusion view. Everything is written to a hidden
    directory beside the target, which is renamed when complete: no failure leaves half a checkpoint
    or harms the one being replaced. One tensor at a time is on the host.

    Args:
      directory: the target; missing parents are created.
      config: written with the dtype the tensors have.
      params: the frozen tree, or both views merged.
      head: a pairwise head, written to a file of its own.
      tokenizer: its `save_pretrained` writes the tokenizer files.
      tokenizer_from: or those present in this checkpoint directory are copied.
      dtype: of the tensors; None keeps the dtype of the leaves, which must then be the same in all.
      overwrite: replace a checkpoint that is already there.
      max_shard_bytes: weights above this are cut into shards of at most this size, with an index.
      progress: show a bar on stderr, if that is a terminal.

    Raises:
      UserError: when the target is taken, the disk is full, the leaves differ in dtype, or no
        config.json describes the model.
      ValueError: when `params` is not a tree of `config`.
    """
    if tokenizer is not None and tokenizer_from is not None:
        raise ValueError("give tokenizer or tokenizer_from, not both")
    check_type("config", config, ModelConfig, "a ModelConfig")
    check_type("params", params, Mapping, "a tree of parameters")
    check_switch("overwrite", overwrite)
    check_whole("max_shard_bytes", max_shard_bytes, 1)
    check_type("directory", directory, (str, os.PathLike), "a path")
    target = pathlib.Path(directory).resolve()  # a link stays, its target is replaced
    check_target(target, overwrite=overwrite)
    leaves = _leaves(config, params)
    config = dataclasses.replace(config, dtype=dtype or _common_dtype(leaves))
    itemsize = jnp.dtype(config.dtype).itemsize
    shards = _shards(leaves, itemsize, max_shard_bytes)
    written = config_to_hf(config, orthrus=any(DIFFUSION in leaf.spec.path for leaf in leaves))
    eos = {"eos_token_id": written["eos_token_id"]}
    texts = {"config.json": written, "generation_config.json": eos}
    if list(shards) != [SINGLE]:
        texts[INDEX] = _index_of(shards, itemsize)
    bar = tqdm(total=len(leaves), desc="save", unit="tensor", disable=None if progress else True)
    with bar, replacing(target, overwrite=overwrite) as folder:
        for name, members in shards.items():
            _write_shard(folder / name, members, config.dtype, bar.update)
        for name, value in texts.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        if head is not None:
            save_head(folder, head)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        for path in sorted(tokenizer_from.iterdir()) if tokenizer_from else ():
            if TOKENIZER_FILE.fullmatch(path.name):
                shutil.copyfile(checked_path(path.parent, path.name), folder / path.name)
        check_target(target, overwrite=overwrite)  # another run may have written it meanwhile


class _Leaf(NamedTuple):
    name: str
    array: jax.Array
    spec: TensorSpec


def _leaves(config: ModelConfig, params: Params) -> list[_Leaf]:
    """Pair every leaf of the tree with its name and shape in the checkpoint."""
    flat = traverse_util.flatten_dict(params)
    specs = tensor_specs(config, diffusion=any(DIFFUSION in path for path in flat))
    needed = {spec.path: spec.shape for spec in specs.values()}
    given = {path: leaf.shape for path, leaf in flat.items()}
    differ = sorted({"/".join(path) for path, _ in given.items() ^ needed.items()})
    if differ:
        raise ValueError(f"params is not a tree of this config; they differ in {shorten(differ)}")
    return [_Leaf(name, flat[spec.path], spec) for name, spec in specs.items()]


def _common_dtype(leaves: list[_Leaf]) -> str:
    dtypes = sorted({str(leaf.array.dtype) for leaf in leaves})
    if len(dtypes) > 1:
        raise UserError(f"the parameters are {' and '.join(dtypes)}: choose one dtype to write")
    return dtypes[0]


def _shards(leaves: list[_Leaf], itemsize: int, limit: int) -> dict[str, list[_Leaf]]:
    """Cut the leaves, in order, into files of at most `limit` bytes; a larger leaf has its own."""
    parts: list[list[_Leaf]] = [[]]
    size = 0
    for leaf in leaves:
        nbytes = leaf.array.size * itemsize
        if parts[-1] and size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(leaf)
        size += nbytes
    count = len(parts)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return dict(zip(names if count > 1 else [SINGLE], parts, strict=True))


def _index_of(shards: dict[str, list[_Leaf]], itemsize: int) -> dict[str, Any]:
    total = sum(leaf.array.size for part in shards.values() for leaf in part) * itemsize
    placed = {leaf.name: shard for shard, part in shards.items() for leaf in part}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def _write_shard(
    path: pathlib.Path, leaves: list[_Leaf], dtype: str, done: Callable[[], Any]
) -> None:
    """Write one safetensors file, leaf by leaf; the library's writer wants all of them at once.

    Layout: length of the header (8 bytes, little-endian), the header in JSON, padded with spaces to
    a multiple of 8, then the tensors without gaps.
    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for leaf in leaves:
        start, end = end, end + leaf.array.size * jnp.dtype(dtype).itemsize
        header[leaf.name] = {
            "dtype": FILE_DTYPES[dtype],
            "shape": list(leaf.spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for leaf in leaves:
            tensor = cast_on_host(to_host(leaf.array), dtype, leaf.name)
            file.write(tensor.reshape(-1).view(np.uint8).data)
            done()
