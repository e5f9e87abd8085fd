"""Tensors of a checkpoint: names and shapes, dtypes, and the way to a device and back.

A path in the parameter tree and a name in a Hugging Face checkpoint list the same words:

  layers_3/self_attn/q_proj/weight        model.layers.3.self_attn.q_proj.weight
  layers_3/self_attn_diff/q_proj/bias     model.layers.3.self_attn.q_proj_diff.bias
  layers_3/self_attn_diff/q_norm/weight   model.layers.3.self_attn.q_norm_diff.weight

Knows no files.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from orthrus_jax import sharding
from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.model.params import DIFFUSION, shapes

FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors spells them
SHOWN = 6  # tensors named per kind of problem; the rest are counted


class TensorSpec(NamedTuple):
    """Where a checkpoint tensor lives in the parameter tree, and its shape in both."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


def tensor_specs(config: ModelConfig, *, diffusion: bool) -> dict[str, TensorSpec]:
    """Return every tensor of a base model's checkpoint by name, with `diffusion` an Orthrus's."""
    return {
        checkpoint_name(path): TensorSpec(path, shape)
        for path, shape in shapes(config).items()
        if diffusion or DIFFUSION not in path
    }


def checkpoint_name(path: tuple[str, ...]) -> str:
    """Name a tree path as the published checkpoints do."""
    if path[0] == "lm_head":
        return "lm_head.weight"
    names = [re.sub(r"^layers_(\d+)$", r"layers.\1", name) for name in path[:-1]]
    if DIFFUSION in names:
        names = [name.replace(DIFFUSION, "self_attn") for name in names]
        names[-1] += "_diff"
    return ".".join(["model", *names, "bias" if path[-1] == "bias" else "weight"])


def cast_on_host(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Cast on the host, rounding to nearest; refuse a weight too large for float16."""
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype), copy=False)
    if dtype == "float16" and cast is not array and np.isinf(cast).any():
        raise UserError(f"{name} holds weights beyond 65504, the largest float16: use bfloat16")
    return cast


def to_device(host: np.ndarray, spec: TensorSpec, mesh: Mesh | None) -> jax.Array:
    """Place a checkpoint tensor on its devices; when it returns, `host` is not needed."""
    if mesh is None:
        # A copy: where the host is the device, device_put alone would go on using its array.
        return jax.block_until_ready(jnp.copy(jax.device_put(host)))
    where = NamedSharding(mesh, sharding.param_spec(spec.path, host.shape, mesh))
    # Each host places its own parts; device_put would compare the tensor across hosts first.
    there = jax.make_array_from_callback(host.shape, where, lambda index: host[index])
    return jax.block_until_ready(there)


def to_host(leaf: jax.Array) -> np.ndarray:
    """Return a leaf as the checkpoint keeps it."""
    # A jax.Array that was read keeps its host copy for life: read a temporary one instead.
    return np.ascontiguousarray(jnp.array(leaf, copy=True))


def shorten(names: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
