"""Checkpoints in and out: a directory of config.json, safetensors and tokenizer files, and a tree.

Decides what a directory must hold to be a Qwen3 or an Orthrus; names and shapes are params.py's,
settings config.py's. Knows nothing of training state. Reads no pickle, runs no code of others.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from orthrus_jax import sharding
from orthrus_jax.config import ModelConfig, read_json
from orthrus_jax.errors import UserError
from orthrus_jax.model import Params
from orthrus_jax.model.params import DIFFUSION, TensorSpec, diffusion_from_base, merge, tensor_specs

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|vocab|special_tokens_map|added_tokens)\.json"
    r"|merges\.txt|chat_template\.jinja"
)
FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors spells them
SHOWN = 6  # tensors named per kind of problem; the rest are counted

Handle = Any  # safetensors.safe_open: a memory-mapped file; a tensor is read when it is asked for


class Checkpoint(NamedTuple):
    """A model in memory.

    Attributes:
      config: its sizes; `dtype` is that of every leaf of `params`.
      params: the whole tree, frozen base and diffusion view merged.
      trained: whether the diffusion view differs from a copy of the AR attention. False for a
        Qwen3, and for an Orthrus that was converted but never trained: its drafts are useless.
      directory: where the files lie, tokenizer files among them.
    """

    config: ModelConfig
    params: Params
    trained: bool
    directory: pathlib.Path


def resolve(source: str | pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """Return the directory of a checkpoint: `source` itself, or the snapshot of a hub id.

    Of a hub repository only the top level's json, safetensors, txt and jinja files are fetched:
    no pickle, no Python.

    Args:
      source: a directory, or an id `owner/name` on the Hugging Face hub.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: naming `source`, when it is neither, cannot be fetched, or is a directory and a
        revision was asked for.
    """
    directory = pathlib.Path(source)
    if directory.is_dir():
        if revision is not None:
            raise UserError(f"{source} is a directory: a revision ({revision}) needs a hub id")
        return directory
    why = "no such directory"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        from huggingface_hub import snapshot_download  # late: most runs read a directory

        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        only: Any = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
        try:
            return pathlib.Path(snapshot_download(str(source), revision=revision, **only))
        except Exception as error:  # offline, not found, gated, disk full: each has its own class
            why = f"not a directory here, and the hub says: {_first_line(error)}"
    raise UserError(
        f"{source} cannot be loaded ({why}): give a checkpoint directory, or a hub id owner/name "
        "with network access (and HF_TOKEN where it is gated or private)"
    )


def load_checkpoint(
    source: str | pathlib.Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Load a Qwen3, its diffusion view then a copy of its attention, or an Orthrus.

    Files are memory-mapped and read tensor by tensor: beside the weights on the device, the host
    holds one tensor and its cast. bfloat16, which numpy lacks, is read as the `ml_dtypes` type that
    jax brings along: safetensors looks it up by name. No bits change unless the dtype does.

    Args:
      source: a directory or a hub id, see `resolve`.
      dtype: of the parameters; None takes what config.json says.
      mesh: devices to share the parameters out over, each tensor straight to where it belongs.
      progress: show a bar on stderr, if that is a terminal.

    Raises:
      UserError: for a source that cannot be had, a config.json that is refused, a damaged or
        missing file; and once for all tensors that are missing, unexpected, or of a wrong shape
        or dtype.
    """
    directory = resolve(source)
    config = ModelConfig.from_directory(directory)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    if mesh is not None:
        sharding.check(config, mesh)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(directory, stack)
        said = read_json(directory / "config.json").get("architectures") or []
        orthrus = "OrthrusLM" in said or any("_diff." in name for name in tensors)
        specs = tensor_specs(config, diffusion=orthrus)
        _check_tensors(directory, config, specs, tensors)
        named = tqdm(specs.items(), "load", unit="tensor", disable=None if progress else True)
        flat = {
            spec.path: _to_device(
                _cast(tensors[name].get_tensor(name), config.dtype, name), spec, mesh
            )
            for name, spec in named
        }
    params = traverse_util.unflatten_dict(flat)
    if not orthrus:
        return Checkpoint(config, merge(params, diffusion_from_base(params)), False, directory)
    return Checkpoint(config, params, _is_trained(flat), directory)


def _is_trained(flat: dict[tuple[str, ...], jax.Array]) -> bool:
    """Whether any diffusion leaf differs from its AR twin; a trained view differs in the first."""
    twin = lambda path: tuple("self_attn" if name == DIFFUSION else name for name in path)
    pairs = ((leaf, flat[twin(path)]) for path, leaf in flat.items() if DIFFUSION in path)
    return any(not jnp.array_equal(*pair) for pair in pairs)


def _open_tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Handle]:
    """Map the weight files into memory; return, by tensor name, the file that holds it."""
    tensors: dict[str, Handle] = {}
    for file in _weight_files(directory):
        handle = stack.enter_context(_open_file(inside(directory, file)))
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in tensors:
                raise UserError(f"{directory / file}: {name} is in another shard as well")
            tensors[name] = handle
    return tensors


def _weight_files(directory: pathlib.Path) -> list[str]:
    """Name the files with weights. What is in them, their headers say; an index may be wrong."""
    if (directory / SINGLE).exists():
        return [SINGLE]
    if (directory / INDEX).exists():
        claims = read_json(inside(directory, INDEX)).get("weight_map")
        if claims and isinstance(claims, dict) and {type(v) for v in claims.values()} == {str}:
            return sorted(set(claims.values()))
        raise UserError(f"{directory / INDEX} has no weight_map of tensor names to file names")
    pickles = any(directory.glob("pytorch_model*.bin"))
    hint = (
        "; its pytorch_model.bin is a pickle, which can run code, and is not read: convert it with "
        "transformers' AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
    )
    raise UserError(f"{directory} holds no {SINGLE} nor {INDEX}{hint if pickles else ''}")


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of file `name` of a checkpoint, refusing one that lies elsewhere.

    `name` may come from a downloaded index, so it must be a bare file name. A link may point within
    the directory or, in a hub cache (`repo/snapshots/commit/name -> ../../blobs/hash`), to the
    repository's own blobs; a link to anywhere else could pass off any file of this machine as part
    of the checkpoint.

    Raises:
      UserError: when the file lies elsewhere or does not exist.
    """
    if not re.fullmatch(r"\w[\w. -]{0,199}", name, re.ASCII):
        raise UserError(f"{directory} asks for the file {name!r}: expected a name without a folder")
    path, root = directory / name, directory.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    target = pathlib.Path(os.path.realpath(path))  # Path.resolve raises on a loop of links
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{path} is a link to {target}, outside its checkpoint: put a copy there")
    if not target.is_file():
        raise UserError(f"{path} does not exist or is no file: the checkpoint is incomplete")
    return path


def _open_file(path: pathlib.Path) -> Handle:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({_first_line(error)}): truncated, damaged "
            "or a Git LFS pointer; fetch it again"
        ) from None


def _check_tensors(
    directory: pathlib.Path,
    config: ModelConfig,
    specs: dict[str, TensorSpec],
    tensors: dict[str, Handle],
) -> None:
    """Compare what the files hold with what the config needs; raise once, for everything."""
    unexpected = sorted(set(tensors) - set(specs))
    if config.tie_word_embeddings and HEAD in unexpected:
        unexpected.remove(HEAD)
        if not _is_copy(tensors, HEAD, EMBEDDING):
            unexpected.insert(0, f"{HEAD} (tie_word_embeddings, but it differs from {EMBEDDING})")
    wrong_shape, wrong_dtype = [], []
    for name in specs.keys() & tensors.keys():
        view = tensors[name].get_slice(name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != specs[name].shape:
            wrong_shape.append(f"{name} (is {list(shape)}, expected {list(specs[name].shape)})")
        if dtype not in FILE_DTYPES.values():
            wrong_dtype.append(f"{name} (is {dtype}, expected F32, BF16 or F16)")
    problems = {
        "missing": sorted(set(specs) - set(tensors)),
        "unexpected": unexpected,
        "of wrong shape": sorted(wrong_shape),
        "of wrong dtype": sorted(wrong_dtype),
    }
    told = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems.items() if names]
    if told:
        raise UserError(f"{directory}: the tensors do not fit config.json; " + "; ".join(told))


def _is_copy(tensors: dict[str, Handle], *names: str) -> bool:
    """Whether two matrices are equal bit by bit, read in pieces: an embedding can be 3 GB."""
    views = [tensors[name].get_slice(name) for name in names if name in tensors]
    (shape, dtype), *others = [(view.get_shape(), view.get_dtype()) for view in views]
    if others != [(shape, dtype)] or len(shape) != 2 or dtype not in FILE_DTYPES.values():
        return False
    pieces = [slice(row, min(row + 4096, shape[0])) for row in range(0, shape[0], 4096)]
    return all(views[0][piece].tobytes() == views[1][piece].tobytes() for piece in pieces)


def _listing(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Cast on the host, rounding to nearest; refuse a weight too large for float16."""
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype), copy=False)
    if dtype == "float16" and cast is not array and np.isinf(cast).any():
        raise UserError(f"{name} holds weights beyond 65504, the largest float16: use bfloat16")
    return cast


def _to_device(host: np.ndarray, spec: TensorSpec, mesh: Mesh | None) -> jax.Array:
    """Place a checkpoint tensor as the tree keeps it; when it returns, `host` is not needed."""
    if mesh is None:
        there = jax.device_put(host)
    else:
        shape = host.shape[::-1] if spec.transpose else host.shape
        axes = sharding.spec(spec.path, shape, mesh)
        where = NamedSharding(mesh, P(*axes[::-1]) if spec.transpose else axes)
        # Each host places its own parts; device_put would compare the tensor across hosts first.
        there = jax.make_array_from_callback(host.shape, where, lambda index: host[index])
    # Transposed there: numpy takes a minute for what the device does in passing.
    return jax.block_until_ready(_turned(there) if spec.transpose else there)


def _to_host(leaf: jax.Array, spec: TensorSpec) -> np.ndarray:
    """Return a leaf as the checkpoint keeps it."""
    # A jax.Array that was read keeps its host copy for life: read one that dies here instead.
    return np.ascontiguousarray(_turned(leaf) if spec.transpose else jnp.array(leaf, copy=True))


def _turned(x: jax.Array) -> jax.Array:
    """x.T, its bits moved as integers: a compiler may pass floats through another type, which
    changes NaNs. Not under `jit`, where XLA sees the floats behind them.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").T
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def save_checkpoint(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    tokenizer_from: pathlib.Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> None:
    """Write a checkpoint directory: the published Orthrus layout, or a plain Qwen3.

    It is an Orthrus iff `params` holds the diffusion view. Everything is written to a hidden
    directory beside the target, which is renamed when complete: no failure leaves half a checkpoint
    or harms the one being replaced. One tensor at a time is on the host.

    Args:
      directory: the target; its parents are made.
      config: written with the dtype the tensors have.
      params: the frozen tree, or both views merged.
      tokenizer: its `save_pretrained` writes the tokenizer files.
      tokenizer_from: or they are copied from this checkpoint directory, those that it has.
      dtype: of the tensors; None keeps that of the leaves, which must then be one.
      overwrite: replace a checkpoint that is already there.
      max_shard_bytes: weights above this are cut into shards of at most this size, with an index.
      progress: show a bar on stderr, if that is a terminal.

    Raises:
      UserError: when the target is taken, the disk is full, or the leaves differ in dtype.
      ValueError: when `params` is not a tree of `config`.
    """
    if tokenizer is not None and tokenizer_from is not None:
        raise ValueError("give tokenizer or tokenizer_from, not both")
    target = pathlib.Path(directory).resolve()  # a link stays; what it points to is replaced
    check_target(target, overwrite=overwrite)
    leaves = _leaves(config, params)
    config = dataclasses.replace(config, dtype=dtype or _common_dtype(leaves))
    itemsize = jnp.dtype(config.dtype).itemsize
    shards = _shards(leaves, itemsize, max_shard_bytes)
    written = config.to_hf(orthrus=any(DIFFUSION in leaf.spec.path for leaf in leaves))
    eos = {"eos_token_id": written["eos_token_id"]}
    texts = {"config.json": written, "generation_config.json": eos}
    if list(shards) != [SINGLE]:
        texts[INDEX] = _index_of(shards, itemsize)
    bar = tqdm(total=len(leaves), desc="save", unit="tensor", disable=None if progress else True)
    with bar, _replacing(target) as folder:
        for name, members in shards.items():
            _write_shard(folder / name, members, config.dtype, bar.update)
        for name, value in texts.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        for path in sorted(tokenizer_from.iterdir()) if tokenizer_from else ():
            if TOKENIZER_FILE.fullmatch(path.name):
                shutil.copyfile(inside(path.parent, path.name), folder / path.name)
        check_target(target, overwrite=overwrite)  # another run may have written it meanwhile


class _Leaf(NamedTuple):
    name: str
    array: jax.Array
    spec: TensorSpec


def _leaves(config: ModelConfig, params: Params) -> list[_Leaf]:
    """Pair every leaf of the tree with its name and shape in the checkpoint."""
    flat = traverse_util.flatten_dict(params)
    specs = tensor_specs(config, diffusion=any(DIFFUSION in path for path in flat))
    needed = {s.path: s.shape[::-1] if s.transpose else s.shape for s in specs.values()}
    found = {path: leaf.shape for path, leaf in flat.items()}
    differ = sorted({"/".join(path) for path, _ in found.items() ^ needed.items()})
    if differ:
        raise ValueError(f"params is not a tree of this config; they differ in {_listing(differ)}")
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
            tensor = _cast(_to_host(leaf.array, leaf.spec), dtype, leaf.name)
            file.write(tensor.reshape(-1).view(np.uint8).data)
            done()


def check_target(directory: str | pathlib.Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a directory that `save_checkpoint` would refuse.

    Raises:
      UserError: when it is a file, holds anything and `overwrite` is not set, or holds something
        other than a checkpoint: overwriting deletes all of it.
    """
    target = pathlib.Path(directory)
    if target.exists() and not target.is_dir():
        raise UserError(f"{directory} is a file: expected a directory to write to")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{directory} is not empty: name another directory, or give --overwrite")
    if not (target / "config.json").exists():
        raise UserError(f"{directory} holds no checkpoint (no config.json): not overwritten")


@contextlib.contextmanager
def _replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a fresh directory that takes the place of `target` if the block succeeds."""
    tag = uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{tag}.{kind}") for kind in ("tmp", "old"))
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{target} could not be written: {error}; nothing was kept") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
