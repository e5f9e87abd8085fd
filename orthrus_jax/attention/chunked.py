"""Attention over a long cache, in chunks of slots with an online softmax: for decoding.

The work follows the length of the longest live sequence, which is known only at run time. Source:
arXiv 2112.05682.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
SLOT_STEP = 512
MANY_SLOTS = 1024  # more than this are walked in steps


def chunked_attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Callable[[Array], Array],
    used: Array,
    turned: bool,
) -> tuple[Array, Array]:
    """Attend to the first `used` slots, SLOT_STEP at a time.

    Args:
      q: [B, G, R, D]. k: [B, G, D, S] if `turned`, else as v. v: [B, G, S, D]; S is a multiple of
        SLOT_STEP.
      visible: of slot numbers [s], which each row sees: bool[B, 1, R, s].
      used: int32[].

    Returns:
      The mean of v under the softmax, float32[B, G, R, D], and the log of the softmax's
      denominator, float32[B, G, R, 1]: 0 and very negative for a row that sees nothing.
    """
    assert v.shape[2] % SLOT_STEP == 0, f"{v.shape[2]} slots are no multiple of {SLOT_STEP}"
    least = jnp.finfo(jnp.float32).min / 2  # finite, so that nothing is inf - inf

    # The loop must read the cache in the cache's own shape: reshaped, XLA's CPU compiler copies the
    # whole of it in every AR step of one row (found in the program: four times).
    k_rest, v_rest = _at_rest(k), _at_rest(v)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, mass, out = carry
        first = i * SLOT_STEP
        k_step = jax.lax.dynamic_slice_in_dim(k_rest, first, SLOT_STEP, -1 if turned else -2)
        k_step = k_step.reshape(*k.shape[:2], *k_step.shape[-2:])
        v_step = jax.lax.dynamic_slice_in_dim(v_rest, first, SLOT_STEP, axis=-2)
        v_step = v_step.reshape(*v.shape[:2], SLOT_STEP, v.shape[3])
        inside = visible(first + jnp.arange(SLOT_STEP))
        scores = jnp.where(inside, scores_of(q, k_step, turned), -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, fade = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
        mixed = jnp.matmul(weights.astype(v.dtype), v_step, preferred_element_type=jnp.float32)
        mass = mass * fade + weights.sum(axis=-1, keepdims=True)
        return new_peak, mass, out * fade + mixed

    rows = (*q.shape[:3], 1)
    empty = (jnp.full(rows, least), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32))
    steps = (used + SLOT_STEP - 1) // SLOT_STEP
    peak, mass, out = jax.lax.fori_loop(0, steps, step, empty)
    mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)
    return out / mass, peak + jnp.log(mass)


def _at_rest(x: Array) -> Array:
    """Drop the leading axes of size 1, as KVCache does."""
    return x.reshape(*itertools.dropwhile(lambda n: n == 1, x.shape[:2]), *x.shape[2:])


def scores_of(q: Array, k: Array, turned: bool = True) -> Array:
    """q [..., rows, D] @ k [..., D, S] / sqrt(D), in float32; not `turned`, k is [..., S, D]."""
    if turned:
        scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    else:  # asked for as it is: of a transposition the TPU's compiler makes a copy
        scores = jnp.einsum("...rd,...sd->...rs", q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5
