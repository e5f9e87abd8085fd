"""Attention of many rows over many slots, for training: tile by tile, no score matrix kept.

Each row sees a range of slots. Rows go in tiles, slots in tiles of their own; a tile of rows reads
only the slots that its rows' ranges touch, so sorted rows (anchors in order, packed documents) cost
what they see. The backward pass computes the scores again (arXiv 2205.14135) and has a gradient for
the queries alone: the keys and values are the frozen view's. Knows no cache and no trees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention.softmax import (
    Carry,
    finish,
    initial_carry,
    online_softmax_step,
    scaled_scores,
)
from orthrus_jax.sharding import BATCH, TENSOR

Array = jax.Array
ROW_TILE = 2048  # rows of one key head that go together
KV_TILE = 512  # slots that they read at a time


def flash_attention(
    q: Array, k: Array, v: Array, start: Array, end: Array, mesh: Mesh | None = None
) -> tuple[Array, Array]:
    """Each row sees the slots start <= s < end; a row may see none.

    Args:
      q: [B, G, R, D]; R is a multiple of ROW_TILE or below it.
      k: [B, G, D, S]. v: [B, G, S, D]. S is a multiple of KV_TILE.
      start, end: int32[B, R], best in ascending order.
      mesh: the devices that share out B and G, if there are several.

    Returns:
      softmax.finish's pair: the output float32[B, G, R, D] and lse float32[B, G, R, 1].

    Raises:
      NotImplementedError: when a gradient for k or v is asked for.
    """
    if mesh is None:
        return _flash(q, k, v, start, end)
    heads, rows = P(BATCH, TENSOR), P(BATCH)
    per_device = jax.shard_map(  # sequences and heads do not depend on each other
        _flash,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows, rows),
        out_specs=(heads, heads),
        check_vma=False,
    )
    return per_device(q, k, v, start, end)


def fits(rows: int, slots: int) -> bool:
    """Whether so many rows (of one key head) and slots divide into tiles, and are worth it."""
    large = rows * slots > ROW_TILE * KV_TILE
    return large and slots % KV_TILE == 0 and (rows < ROW_TILE or rows % ROW_TILE == 0)


@jax.custom_vjp
def _flash(q: Array, k: Array, v: Array, start: Array, end: Array) -> tuple[Array, Array]:
    return _forward(q, k, v, start, end)[0]


def _forward(
    q: Array, k: Array, v: Array, start: Array, end: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def tile(rows: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, start, end = rows

        def step(i: Array, carry: Carry) -> Carry:
            scores, _, v_tile = _scores(q, k, v, start, end, i)
            mix = lambda weights: jnp.matmul(
                weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32
            )
            return online_softmax_step(carry, scores, mix)

        return finish(jax.lax.fori_loop(*_tiles_seen(start, end), step, initial_carry(q)))

    out, lse = _over_tiles(tile, q, start, end)
    return (out, lse), (q, k, v, start, end, out, lse)


def _backward(kept: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple:
    q, k, v, start, end, out, lse = kept
    d_out, d_lse = (_dense(cotangent) for cotangent in cotangents)
    # A score's gradient is p * (dp - shift): the mean of dp under p, less the gradient of lse.
    shift = (d_out * out).sum(-1, keepdims=True) - d_lse

    def tile(rows: tuple[Array, ...]) -> Array:
        q, start, end, d_out, lse, shift = rows

        def step(i: Array, dq: Array) -> Array:
            scores, k_tile, v_tile = _scores(q, k, v, start, end, i)
            p = jnp.exp(scores - lse)
            dp = jnp.matmul(
                d_out.astype(v.dtype), v_tile.swapaxes(-1, -2), preferred_element_type=jnp.float32
            )
            ds = (p * (dp - shift)).astype(k.dtype)
            return dq + jnp.matmul(ds, k_tile.swapaxes(-1, -2), preferred_element_type=jnp.float32)

        dq = jax.lax.fori_loop(*_tiles_seen(start, end), step, jnp.zeros(q.shape, jnp.float32))
        return dq * q.shape[-1] ** -0.5

    dq = _over_tiles(tile, q, start, end, d_out, lse, shift)
    return dq.astype(q.dtype), None, None, None, None


def _forward_of_frozen(q: Any, k: Any, v: Any, start: Any, end: Any) -> Any:
    if k.perturbed or v.perturbed:
        raise NotImplementedError("flash_attention has no gradient for keys and values")
    return _forward(*(part.value for part in (q, k, v, start, end)))


_flash.defvjp(_forward_of_frozen, _backward, symbolic_zeros=True)


def _dense(cotangent: Any) -> Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _tiles_seen(start: Array, end: Array) -> tuple[Array, Array]:
    """First and one past the last of the tiles of slots of which some row sees a slot."""
    seen = start < end
    first = jnp.where(seen, start, jnp.iinfo(jnp.int32).max).min() // KV_TILE
    return first, (jnp.where(seen, end, 0).max() + KV_TILE - 1) // KV_TILE


def _scores(
    q: Array, k: Array, v: Array, start: Array, end: Array, i: Array
) -> tuple[Array, Array, Array]:
    """Masked float32 scores [B, G, R, KV_TILE] of tile i of the slots, and its keys and values."""
    first = i * KV_TILE
    k_tile = jax.lax.dynamic_slice_in_dim(k, first, KV_TILE, axis=3)
    v_tile = jax.lax.dynamic_slice_in_dim(v, first, KV_TILE, axis=2)
    slots = first + jnp.arange(KV_TILE)
    visible = (slots >= start[..., None]) & (slots < end[..., None])  # [B, R, KV_TILE]
    return jnp.where(visible[:, None], scaled_scores(q, k_tile), -jnp.inf), k_tile, v_tile


def _over_tiles(function: Callable, q: Array, start: Array, end: Array, *more: Array) -> Any:
    """Apply `function` to tiles of rows, one after another; join what it returns."""
    rows = q.shape[2]
    if rows <= ROW_TILE:
        return function((q, start, end, *more))
    tiles = rows // ROW_TILE

    def cut(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], tiles, ROW_TILE, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], rows, x.shape[-1])

    parts = (cut(q, 2), cut(start, 1), cut(end, 1), *(cut(x, 2) for x in more))
    return jax.tree.map(join, jax.lax.map(function, parts))
