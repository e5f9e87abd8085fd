"""The mesh and the one table of rules: which axis of an array lies on which axis of the mesh.

Three mesh axes: `data` and `fsdp` divide the sequences of a batch, `fsdp` and `tensor` the weights:
`fsdp` cuts a matrix along the model width (gathered layer by layer when it is used), `tensor` along
heads, MLP width and vocabulary. GSPMD follows these layouts; only flash attention, a tree's moves
in the cache and the vocabulary's losses are written per device (`shard_map`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax.errors import UserError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = (DATA, FSDP)  # the axes that divide the sequences of a batch

RULES: dict[str, tuple[str | None, ...]] = {  # a parameter's module -> its axes, [out, in]
    "embedding": (TENSOR, FSDP),
    "lm_head": (TENSOR, FSDP),
    "q_proj": (TENSOR, FSDP),
    "k_proj": (TENSOR, FSDP),
    "v_proj": (TENSOR, FSDP),
    "o_proj": (FSDP, TENSOR),
    "gate_proj": (TENSOR, FSDP),
    "up_proj": (TENSOR, FSDP),
    "down_proj": (FSDP, TENSOR),
    "bias": (TENSOR,),  # of a projection whose features lie on the tensor axis
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices; one of the three sizes may be -1: as many devices as are left.

    Raises:
      UserError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    sizes_text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or known < 1 or len(devices) % known:
        raise UserError(f"mesh {sizes_text} does not fit {len(devices)} devices")
    if free:
        sizes[free[0]] = len(devices) // known
    total = math.prod(sizes.values())
    if total != len(devices):
        raise UserError(f"mesh {sizes_text} has {total} devices, and there are {len(devices)}")
    auto = (AxisType.Auto,) * len(sizes)
    shape = tuple(sizes.values())
    if len(devices) == 1:  # jax.make_mesh needs the platform's topology, and one device has none
        return Mesh(np.array(devices).reshape(shape), tuple(sizes), axis_types=auto)
    return jax.make_mesh(shape, tuple(sizes), axis_types=auto, devices=devices)


def param_spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> P:
    """Where an array of a parameter tree lies, or the optimizer's state for it.

    A rule names the last axes; stacked layers have one more in front. An axis that does not divide
    among its devices stays whole.
    """
    names = [getattr(part, "key", getattr(part, "name", part)) for part in path]
    rule = next((RULES[name] for name in reversed(names) if name in RULES), ())
    if len(shape) < len(rule):  # a count, a norm
        return P()
    axes = (None,) * (len(shape) - len(rule)) + rule
    fits = lambda axis, size: axis is None or size % mesh.shape[axis] == 0
    return P(*(axis if fits(axis, size) else None for axis, size in zip(axes, shape, strict=True)))


def batch_sharding(shape: Sequence[int], mesh: Mesh, heads: bool = False) -> NamedSharding:
    """Where an array [B, ...] of decoding lies; with `heads`, a cache's [B, G, ...].

    A batch or heads that do not divide among their devices stay whole. A cache does not store
    leading axes of size 1 (see KVCache), so its axes are counted from the last.
    """
    names: tuple[Any, ...] = (BATCH, TENSOR)[max(0, 4 - len(shape)) :] if heads else (BATCH,)
    ways = {BATCH: mesh.shape[DATA] * mesh.shape[FSDP], TENSOR: mesh.shape[TENSOR]}
    axes = [n if size % ways[n] == 0 else None for n, size in zip(names, shape, strict=False)]
    return NamedSharding(mesh, P(*axes))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf (array or ShapeDtypeStruct) of a tree, by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(path, leaf.shape, mesh)), tree
    )


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a training array whose axis `axis` is the batch."""
    return NamedSharding(mesh, P(*(None,) * axis, BATCH))


def to_host(tree: Any) -> Any:
    """Every array of a tree as numpy, whole, on each host that holds a part of it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    fetch = lambda x: (
        x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
    )
    return jax.device_get(jax.tree.map(fetch, tree))


def check_divides(config: Any, mesh: Mesh) -> None:
    """Refuse a mesh whose tensor axis does not divide the model.

    Raises:
      UserError: naming the size and the axis.
    """
    ways = mesh.shape[TENSOR]
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ways:
            raise UserError(f"mesh tensor={ways} does not divide {name}={getattr(config, name)}")
