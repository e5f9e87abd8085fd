"""Attention of many rows over many slots, for training: tile by tile, no score matrix kept.

Each row sees a range of slots. Rows go in tiles, slots in steps; a tile visits only the steps that
its rows' ranges touch, so sorted rows (anchors in order, packed documents) cost what they see. The
backward pass computes the scores again (arXiv 2205.14135) and has a gradient for the queries alone:
the keys and values are the frozen view's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
ROW_TILE = 2048  # rows of one key head that go together
SLOT_TILE = 512
LEAST = jnp.finfo(jnp.float32).min / 2  # finite, so that nothing is inf - inf


@jax.custom_vjp
def ranged_attention(q: Array, k: Array, v: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """Each row sees the slots start <= s < end; a row may see none.

    Args:
      q: [B, G, R, D]; R is a multiple of ROW_TILE or below it.
      k: [B, G, D, S]. v: [B, G, S, D]. S is a multiple of SLOT_TILE.
      start, end: int32[B, R], best in ascending order.

    Returns:
      The mean of v under the softmax, float32[B, G, R, D], and the log of the softmax's
      denominator, float32[B, G, R, 1]: 0 and very negative for a row that sees nothing.
    """
    return _forward(q, k, v, start, end)[0]


def _forward(
    q: Array, k: Array, v: Array, start: Array, end: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def tile(rows: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, start, end = rows

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak, mass, out = carry
            scores, _, v_step = _scores(q, k, v, start, end, i)
            new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
            weights, fade = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
            mixed = jnp.matmul(weights.astype(v.dtype), v_step, preferred_element_type=jnp.float32)
            return new_peak, mass * fade + weights.sum(-1, keepdims=True), out * fade + mixed

        empty = jnp.full((*q.shape[:3], 1), LEAST)
        carry = (empty, jnp.zeros_like(empty), jnp.zeros(q.shape, jnp.float32))
        peak, mass, out = jax.lax.fori_loop(*_steps(start, end), step, carry)
        mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)
        return out / mass, peak + jnp.log(mass)

    out, log_mass = _over_tiles(tile, q, start, end)
    return (out, log_mass), (q, k, v, start, end, out, log_mass)


def _backward(kept: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple:
    q, k, v, start, end, out, log_mass = kept
    d_out, d_log_mass = (_dense(cotangent) for cotangent in cotangents)
    # A score's gradient is p * (dp - shift): the mean of dp under p, less what log_mass asks for.
    shift = (d_out * out).sum(-1, keepdims=True) - d_log_mass

    def tile(rows: tuple[Array, ...]) -> Array:
        q, start, end, d_out, log_mass, shift = rows

        def step(i: Array, dq: Array) -> Array:
            scores, k_step, v_step = _scores(q, k, v, start, end, i)
            p = jnp.exp(scores - log_mass)
            dp = jnp.matmul(
                d_out.astype(v.dtype), v_step.swapaxes(-1, -2), preferred_element_type=jnp.float32
            )
            ds = (p * (dp - shift)).astype(k.dtype)
            back = k_step.swapaxes(-1, -2)
            return dq + jnp.matmul(ds, back, preferred_element_type=jnp.float32)

        dq = jax.lax.fori_loop(*_steps(start, end), step, jnp.zeros(q.shape, jnp.float32))
        return dq * q.shape[-1] ** -0.5

    dq = _over_tiles(tile, q, start, end, d_out, log_mass, shift)
    return dq.astype(q.dtype), None, None, None, None


def _forward_of_frozen(q: Any, k: Any, v: Any, start: Any, end: Any) -> Any:
    if k.perturbed or v.perturbed:
        raise NotImplementedError("ranged_attention has no gradient for keys and values")
    return _forward(*(part.value for part in (q, k, v, start, end)))


ranged_attention.defvjp(_forward_of_frozen, _backward, symbolic_zeros=True)


def fits(rows: int, slots: int) -> bool:
    """Whether so many rows (of one key head) and slots divide into tiles, and are worth it."""
    large = rows * slots > ROW_TILE * SLOT_TILE
    return large and slots % SLOT_TILE == 0 and (rows < ROW_TILE or rows % ROW_TILE == 0)


def _dense(cotangent: Any) -> Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _steps(start: Array, end: Array) -> tuple[Array, Array]:
    """The steps that some row of a tile sees a slot of."""
    seen = start < end
    first = jnp.where(seen, start, jnp.iinfo(jnp.int32).max).min() // SLOT_TILE
    return first, (jnp.where(seen, end, 0).max() + SLOT_TILE - 1) // SLOT_TILE


def _scores(
    q: Array, k: Array, v: Array, start: Array, end: Array, i: Array
) -> tuple[Array, Array, Array]:
    """Masked float32 scores [B, G, r, SLOT_TILE] of step i, and its keys and values."""
    at = i * SLOT_TILE
    k_step = jax.lax.dynamic_slice_in_dim(k, at, SLOT_TILE, axis=3)
    v_step = jax.lax.dynamic_slice_in_dim(v, at, SLOT_TILE, axis=2)
    slots = at + jnp.arange(SLOT_TILE)
    visible = (slots >= start[..., None]) & (slots < end[..., None])  # [B, r, SLOT_TILE]
    scores = jnp.matmul(q, k_step, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(visible[:, None], scores, -jnp.inf), k_step, v_step


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
