"""Read a checkpoint: config.json and safetensors, or a GGUF file, become a config and a tree.

Decides which tensors a directory must hold. Knows no training state.
"""

import contextlib
import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from orthrus_jax import sharding
from orthrus_jax.checkpoint.directory import checked_path, resolve, weight_files
from orthrus_jax.checkpoint.gguf_file import GgufFile
from orthrus_jax.checkpoint.gguf_model import GgufTensors, gguf_config
from orthrus_jax.checkpoint.head import load_head
from orthrus_jax.checkpoint.hf_config import read_config
from orthrus_jax.checkpoint.tensors import (
    FILE_DTYPES,
    TensorSpec,
    cast_on_host,
    shorten,
    tensor_specs,
    to_device,
)
from orthrus_jax.checkpoint.view import View, check_base, view_head, with_view
from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line
from orthrus_jax.memory import check_memory
from orthrus_jax.model.pairwise import Head
from orthrus_jax.model.params import DIFFUSION, diffusion_from_base, merge
from orthrus_jax.model.transformer import Params

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Handle = Any  # safetensors.safe_open: a memory-mapped file; a tensor is read when it is asked for


class Checkpoint(NamedTuple):
    """A model in memory.

    Attributes:
      config: sizes and switches; every leaf of `params` has its `dtype`.
      params: the whole tree, frozen base and diffusion view merged.
      trained: whether the diffusion view differs from a copy of the AR attention. False for a base
        model, and for an Orthrus that was converted but never trained: its drafts are useless.
      directory: where the files lie, tokenizer files among them.
      head: the pairwise head, which is no part of `params`; None if there is none.
    """

    config: ModelConfig
    params: Params
    trained: bool
    directory: pathlib.Path
    head: Head | None = None


def load_checkpoint(
    source: str | pathlib.Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    view: View | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Load an Orthrus, or a base model, whose diffusion view is then a copy of its attention.

    Files are memory-mapped and read tensor by tensor: the host holds one tensor and its cast, the
    device the weights. bfloat16, which numpy lacks, is read as the `ml_dtypes` type that jax brings
    along: safetensors looks it up by name. No bits change unless the dtype does.

    Args:
      source: a directory or a hub id, see `resolve`.
      dtype: of the parameters; None takes the one in config.json.
      mesh: devices to share the parameters out over, each tensor straight to where it belongs.
      view: a view that takes the place of the checkpoint's own.
      progress: show a bar on stderr, if that is a terminal.

    Raises:
      UserError: for a source that cannot be fetched, a config.json that is refused, a model that
        the memory has no room for, a damaged or missing file; a view of another base; and once for
        all tensors that are missing, unexpected, or of a wrong shape or dtype.
    """
    directory = resolve(source)
    config, orthrus = read_config(directory)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    if mesh is not None:
        sharding.check_divides(config, mesh)
    if view is not None:
        check_base(view, config)
    # A head belongs to its view: another one's does not fit.
    head = view_head(view, config, mesh) if view else load_head(directory, config, mesh)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(directory, stack)
        orthrus = orthrus or any("_diff." in name for name in tensors)
        specs = tensor_specs(config, diffusion=orthrus)
        _check_tensors(directory, config, specs, tensors)
        _check_room(directory, config, specs, mesh)
        flat = _read_tensors(config, specs, tensors, mesh, progress)
    params = traverse_util.unflatten_dict(flat)
    if not orthrus:
        params = merge(params, diffusion_from_base(params))
    if view is not None:
        config, params = with_view(view, config, params, mesh)
    own = orthrus or view is not None
    trained = own and _is_trained(traverse_util.flatten_dict(params))
    return Checkpoint(config, params, trained, directory, head)


def load_gguf(file: GgufFile, *, dtype: str | None = None, progress: bool = False) -> Checkpoint:
    """Load the base of a GGUF file; its diffusion view is a copy of its attention.

    Quantised tensors are dequantised, one at a time, in float32.

    Args:
      file: see `open_gguf`.
      dtype: of the parameters; None is float16 or bfloat16 if all matrices are, else float32.
      progress: show a bar on stderr, if that is a terminal.

    Raises:
      UserError: for a setting that is not computed, and once for all tensors that do not fit.
    """
    config = gguf_config(file)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    held = GgufTensors(file, config)
    tensors: dict[str, Handle] = dict.fromkeys(held.names, held)
    specs = tensor_specs(config, diffusion=False)
    _check_tensors(file.path, config, specs, tensors)
    _check_room(file.path, config, specs, None)
    params = traverse_util.unflatten_dict(_read_tensors(config, specs, tensors, None, progress))
    whole = merge(params, diffusion_from_base(params))
    return Checkpoint(config, whole, False, file.path.parent)


def _read_tensors(
    config: ModelConfig,
    specs: dict[str, TensorSpec],
    tensors: dict[str, Handle],
    mesh: Mesh | None,
    progress: bool,
) -> dict[tuple[str, ...], jax.Array]:
    named = tqdm(specs.items(), "load", unit="tensor", disable=None if progress else True)
    return {
        spec.path: to_device(
            cast_on_host(tensors[name].get_tensor(name), config.dtype, name), spec, mesh
        )
        for name, spec in named
    }


def _check_room(
    directory: pathlib.Path, config: ModelConfig, specs: dict[str, TensorSpec], mesh: Mesh | None
) -> None:
    """Refuse weights that the devices have no room for; a base's attention is there twice."""
    is_base = not any(DIFFUSION in spec.path for spec in specs.values())
    count = sum(
        math.prod(spec.shape) * (1 + (is_base and "self_attn" in spec.path))
        for spec in specs.values()
    )
    check_memory(
        count * jnp.dtype(config.dtype).itemsize,
        f"loading {directory}",
        "take a smaller model, --dtype bfloat16, or more devices (--mesh)",
        None if mesh is None else list(mesh.devices.flat),
    )


def _is_trained(flat: dict[tuple[str, ...], jax.Array]) -> bool:
    """Whether any diffusion leaf differs from its AR twin; a trained view differs in the first."""
    twin = lambda path: tuple("self_attn" if name == DIFFUSION else name for name in path)
    pairs = ((leaf, flat[twin(path)]) for path, leaf in flat.items() if DIFFUSION in path)
    return any(not jnp.array_equal(*pair) for pair in pairs)


def _open_tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Handle]:
    """Map the weight files into memory; return, by tensor name, the file that holds it."""
    tensors: dict[str, Handle] = {}
    for file in weight_files(directory):
        handle = stack.enter_context(_open_file(checked_path(directory, file)))
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in tensors:
                raise UserError(f"{directory / file}: {name} is in another shard as well")
            tensors[name] = handle
    return tensors


def _open_file(path: pathlib.Path) -> Handle:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({first_line(error)}): truncated, damaged "
            "or a Git LFS pointer; fetch it again"
        ) from None


def _check_tensors(
    source: pathlib.Path,
    config: ModelConfig,
    specs: dict[str, TensorSpec],
    tensors: dict[str, Handle],
) -> None:
    """Compare the tensors in the files with those the config needs; raise once, for all."""
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
    listed = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems.items() if names]
    if listed:
        settings = "config.json" if source.is_dir() else "its settings"
        raise UserError(f"{source}: the tensors do not fit {settings}; " + "; ".join(listed))


def _is_copy(tensors: dict[str, Handle], *names: str) -> bool:
    """Whether two matrices are equal bit by bit, read in pieces: an embedding can be 3 GB."""
    views = [tensors[name].get_slice(name) for name in names if name in tensors]
    (shape, dtype), *others = [(view.get_shape(), view.get_dtype()) for view in views]
    if others != [(shape, dtype)] or len(shape) != 2 or dtype not in FILE_DTYPES.values():
        return False
    pieces = [slice(row, min(row + 4096, shape[0])) for row in range(0, shape[0], 4096)]
    return all(views[0][piece].tobytes() == views[1][piece].tobytes() for piece in pieces)
