"""Attention over a long cache, in chunks of slots with an online softmax: for decoding.

The work follows the length of the longest live sequence, which is known only at run time. Knows not
how a cache stores its slots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from orthrus_jax.attention.cache import KV_CHUNK, LayerCache
from orthrus_jax.attention.softmax import Carry, finish, initial_carry, online_softmax_step

Array = jax.Array


def chunked_attention(
    q: Array, slots: LayerCache, visible: Callable[[Array], Array], kv_len: Array
) -> tuple[Array, Array]:
    """Attend to the first `kv_len` slots, KV_CHUNK at a time.

    Args:
      q: [B, G, R, D].
      slots: S slots, a multiple of KV_CHUNK.
      visible: maps slot numbers [C] to those that each row sees, bool[B, 1, R, C].
      kv_len: int32[].

    Returns:
      softmax.finish's pair: the output float32[B, G, R, D] and lse float32[B, G, R, 1].
    """
    assert slots.num_slots % KV_CHUNK == 0, f"{slots.num_slots} slots are no multiple of {KV_CHUNK}"

    def step(i: Array, carry: Carry) -> Carry:
        first = i * KV_CHUNK
        chunk = slots.read(first, KV_CHUNK)
        seen = visible(first + jnp.arange(KV_CHUNK))
        scores = jnp.where(seen, chunk.scores(q), -jnp.inf)
        return online_softmax_step(carry, scores, lambda w: chunk.mix(w, jnp.float32))

    chunks = (kv_len + KV_CHUNK - 1) // KV_CHUNK
    return finish(jax.lax.fori_loop(0, chunks, step, initial_carry(q)))
