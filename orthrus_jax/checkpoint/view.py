"""A diffusion view apart from its base, like an adapter: one safetensors file, written and merged.

Decides what the file holds, and whether a base is the one that a view was trained for. Tensors have
the published names (`*_diff`). With a rank R a projection is kept as the difference to the AR
view's, `B A`, in two factors: `NAME_a` [R, in] and `NAME_b` [out, R].
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from orthrus_jax.checkpoint.directory import checked_path, resolve
from orthrus_jax.checkpoint.head import PREFIX, head_of, head_tensors
from orthrus_jax.checkpoint.tensors import (
    FILE_DTYPES,
    TensorSpec,
    cast_on_host,
    shorten,
    tensor_specs,
    to_device,
    to_host,
)
from orthrus_jax.config import DTYPES, SIZES, ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line, write_atomic
from orthrus_jax.model.pairwise import Head
from orthrus_jax.model.params import DIFFUSION
from orthrus_jax.model.transformer import Params

FILE = "view.safetensors"  # in a directory or a hub repository
ABOUT = "orthrus_view"  # key of the file's metadata
OF_BASE = (*SIZES, "qk_norm", "attention_bias", "tie_word_embeddings")  # compared on load
FACTORS = ("_a", "_b")

Path = tuple[str, ...]


class View(NamedTuple):
    """A view's file that was opened; its tensors stay on disk.

    Attributes:
      path: of the file.
      block_size: K it was trained for.
      mask_token_id: id of the MASK token it was trained with.
      rank: of the projections' differences; None if they are kept whole.
      base: of the base it was trained for, the fields OF_BASE.
      weights: of that base, a checksum by tensor.
    """

    path: pathlib.Path
    block_size: int
    mask_token_id: int
    rank: int | None
    base: dict[str, Any]
    weights: dict[str, int]


def save_view(
    target: str | pathlib.Path,
    config: ModelConfig,
    params: Params,
    *,
    head: Head | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write the diffusion view alone.

    Args:
      target: a file that ends in .safetensors, or a directory, which then holds FILE.
      config: of the model; its `block_size` and `mask_token_id` are the view's.
      params: the whole tree, both views.
      head: the view's pairwise head, kept in the same file.
      rank: keep each projection as the best difference of this rank to the AR view's; None keeps
        it whole.
      dtype: of the tensors; None keeps the dtype of the leaves.
      overwrite: replace a file that is there.

    Returns:
      The file's path.

    Raises:
      UserError: when the file is there, cannot be written, or a value is refused.
    """
    path = view_file(target, overwrite=overwrite)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"rank={rank!r}: expected a whole number from 1")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    about = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_id,
        "rank": rank,
        "base": {name: getattr(config, name) for name in OF_BASE},
        "weights": base_checksums(config, params),
    }
    flat = traverse_util.flatten_dict(params)
    tensors: dict[str, np.ndarray] = {}
    for name, spec in _view_specs(config).items():
        parts = {name: to_host(flat[spec.path])}
        if rank is not None and len(spec.shape) == 2:
            twin = to_host(flat[_twin(spec.path)])
            a, b = _factors(parts[name].astype(np.float32) - twin.astype(np.float32), rank)
            parts = {f"{name}{FACTORS[0]}": a, f"{name}{FACTORS[1]}": b}
        kept = dtype or str(flat[spec.path].dtype)
        tensors |= {part: cast_on_host(array, kept, part) for part, array in parts.items()}
    tensors |= {} if head is None else head_tensors(head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, {ABOUT: json.dumps(about)}))
    except OSError as error:
        raise UserError(f"{path} could not be written: {first_line(error)}") from None
    return path


def view_file(target: str | pathlib.Path, *, overwrite: bool) -> pathlib.Path:
    """The file that `save_view` writes for a target, refused where it is taken."""
    path = pathlib.Path(target)
    if path.suffix != ".safetensors":
        path = path / FILE
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there: name another file, or overwrite it (--overwrite)")
    return path


def open_view(source: str | pathlib.Path) -> View:
    """Open a view: a file, or a directory or hub id that holds FILE.

    Raises:
      UserError: naming the file, when it is missing, damaged, or not a view.
    """
    path = pathlib.Path(source)
    if path.suffix == ".safetensors" and not path.is_dir():
        if not path.is_file():
            raise UserError(f"--view {source} does not exist: expected a view's file")
    else:
        path = checked_path(resolve(source), FILE)
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(ABOUT)
            names, held = set(file.keys()), dict(json.loads(text)) if text else None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({first_line(error)}): fetch it again"
        ) from None
    if held is None:
        whole = any("_diff." in name for name in names)
        hint = "a whole Orthrus is a --model" if whole else "a base is a --model"
        raise UserError(f"{path} is not a view that orthrus_jax.save_view wrote: {hint}")
    types = {"block_size": int, "mask_token_id": int, "base": dict, "weights": dict}
    damaged = [name for name, kind in types.items() if type(held.get(name)) is not kind]
    rank = held.get("rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        damaged.append("rank")
    if damaged:
        raise UserError(f"{path}: its description of the view is damaged: {', '.join(damaged)}")
    fields: dict[str, Any] = {name: held.get(name) for name in View._fields[1:]}
    return View(path, **fields)


def check_base(view: View, config: ModelConfig) -> None:
    """Refuse a base of other sizes than the view's, before its weights are read.

    Raises:
      UserError: naming what differs.
    """
    differ = [
        f"{name}={getattr(config, name)} (the view's base: {view.base.get(name)})"
        for name in OF_BASE
        if view.base.get(name) != getattr(config, name)
    ]
    if differ:
        raise UserError(f"{view.path} was trained for another base: {', '.join(differ)}")


def with_view(
    view: View, config: ModelConfig, params: Params, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Put a view in the place of a model's own; return the model's config and tree.

    Raises:
      UserError: when the base's weights are not those that the view was trained for, or the file's
        tensors are not those of its description.
    """
    check_base(view, config)
    present = base_checksums(config, params)
    changed = sorted(name for name, value in present.items() if view.weights.get(name) != value)
    if changed:
        raise UserError(
            f"{view.path} was trained for another base of the same sizes: {len(changed)} of "
            f"{len(present)} tensors differ: {shorten(changed)}"
        )
    flat = traverse_util.flatten_dict(params)
    specs = _view_specs(config)
    with safe_open(view.path, framework="np") as file:
        _check_tensors(view, specs, file)
        for name, spec in specs.items():
            if view.rank is None or len(spec.shape) < 2:
                array = cast_on_host(file.get_tensor(name), config.dtype, name)
                flat[spec.path] = to_device(array, spec, mesh)
            else:
                a, b = (file.get_tensor(name + end).astype(np.float32) for end in FACTORS)
                flat[spec.path] = _added(flat[_twin(spec.path)], a, b)
    try:
        config = dataclasses.replace(
            config, block_size=view.block_size, mask_token_id=view.mask_token_id
        )
    except (UserError, TypeError) as error:
        raise UserError(f"{view.path}: {error}") from None
    return config, traverse_util.unflatten_dict(flat)


def view_head(view: View, config: ModelConfig, mesh: Mesh | None = None) -> Head | None:
    """The pairwise head that lies in a view's file; None if there is none.

    Raises:
      UserError: for tensors that do not fit the config.
    """
    with safe_open(view.path, framework="np") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    return head_of(view.path, tensors, config, mesh) if tensors else None


def base_checksums(config: ModelConfig, params: Params) -> dict[str, int]:
    """A checksum of each tensor of the base, by name, of its weights rounded to bfloat16.

    So that a base in another dtype is the same base.
    """
    flat = traverse_util.flatten_dict(params)
    specs = tensor_specs(config, diffusion=False)
    sums = jax.device_get({name: _checksum(flat[spec.path]) for name, spec in specs.items()})
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Sum of the bits, each with a weight of its place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    weight = jnp.uint32(0x9E3779B1)  # odd: near 2^32 / golden ratio
    for axis, size in enumerate(x.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(size)
        bits = (bits ^ (bits >> 7)) * (place * weight | 1)
    return bits.sum(dtype=jnp.uint32)


def _view_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    specs = tensor_specs(config, diffusion=True)
    return {name: spec for name, spec in specs.items() if DIFFUSION in spec.path}


def _twin(path: Path) -> Path:
    """The AR view's leaf of the same role."""
    return tuple("self_attn" if name == DIFFUSION else name for name in path)


def _factors(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best a [R, in] and b [out, R] for b a = difference [out, in] (Eckart and Young)."""
    u, s, v = np.linalg.svd(difference, full_matrices=False)
    root = np.sqrt(s[:rank])  # shared out, so that both have the same scale
    return root[:, None] * v[:rank], u[:, :rank] * root


def _added(weight: jax.Array, a: np.ndarray, b: np.ndarray) -> jax.Array:
    """weight [out, in] + b a in the weight's dtype, where the weight lies."""

    @functools.partial(jax.jit, out_shardings=weight.sharding)
    def add(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + product).astype(weight.dtype)

    return add(weight, a, b)


def _check_tensors(view: View, specs: dict[str, TensorSpec], file: Any) -> None:
    """Compare the file's tensors with those of the description; raise once, for all."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        if view.rank is None or len(spec.shape) < 2:
            expected[name] = spec.shape
        else:
            rank = min(view.rank, *spec.shape)
            sizes = (rank, spec.shape[1]), (spec.shape[0], rank)
            expected |= {name + end: size for end, size in zip(FACTORS, sizes, strict=True)}
    names = [name for name in file.keys() if not name.startswith(PREFIX)]  # noqa: SIM118
    held = {name: file.get_slice(name) for name in names}
    wrong = sorted(
        name
        for name in expected.keys() | held.keys()
        if name not in expected
        or name not in held
        or tuple(held[name].get_shape()) != expected[name]
        or held[name].get_dtype() not in FILE_DTYPES.values()
    )
    if wrong:
        raise UserError(
            f"{view.path}: {len(wrong)} tensors are missing, unexpected, or of wrong shape or "
            f"dtype: {shorten(wrong)}"
        )
