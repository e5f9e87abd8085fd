"""Scaled scores, and the online softmax that reads the slots piece by piece.

Chunked attention (decoding) and flash attention (training) share both. Knows neither where the
slots are stored nor who sees them. Source: arXiv 2112.05682; names as in arXiv 2205.14135.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Carry = tuple[Array, Array, Array]  # row_max, row_sum [B, G, R, 1], acc [B, G, R, D]; float32
MIN_SCORE = jnp.finfo(jnp.float32).min / 2  # finite: inf - inf would be NaN


def scaled_scores(q: Array, k: Array) -> Array:
    """q [..., R, D] @ k [..., D, S] / sqrt(D), in float32."""
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def initial_carry(q: Array) -> Carry:
    """The state before any slot was read, for queries [B, G, R, D]."""
    row_max = jnp.full((*q.shape[:3], 1), MIN_SCORE)
    return row_max, jnp.zeros_like(row_max), jnp.zeros(q.shape, jnp.float32)


def online_softmax_step(carry: Carry, scores: Array, mix: Callable[[Array], Array]) -> Carry:
    """Read one more piece of the slots.

    Args:
      carry: the state so far.
      scores: float32[B, G, R, S], -inf where a row does not see a slot.
      mix: the piece's values weighted by float32[B, G, R, S] and summed, float32[B, G, R, D].
    """
    row_max, row_sum, acc = carry
    new_max = jnp.maximum(row_max, scores.max(axis=-1, keepdims=True))
    weights, rescale = jnp.exp(scores - new_max), jnp.exp(row_max - new_max)
    new_sum = row_sum * rescale + weights.sum(axis=-1, keepdims=True)
    return new_max, new_sum, acc * rescale + mix(weights)


def finish(carry: Carry) -> tuple[Array, Array]:
    """Attention's output and the log of the softmax's denominator.

    Returns:
      The mean of the values under the softmax, float32[B, G, R, D], and lse, float32[B, G, R, 1]: 0
      and very negative for a row that sees nothing.
    """
    row_max, row_sum, acc = carry
    row_sum = jnp.maximum(row_sum, jnp.finfo(jnp.float32).tiny)
    return acc / row_sum, row_max + jnp.log(row_sum)
