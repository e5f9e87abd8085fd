"""Attention in plain JAX, the reference: attend.py has the contract of both functions.

By shape, and by whether it decodes or trains, the slots are read in one of these ways. Few slots
are one plain softmax, which is faster. Many slots of a cache are read in chunks (chunked.py), many
rows over many slots without a cache in tiles (flash.py), a quantised cache by mixture.py. Knows no
cache layout.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from orthrus_jax.attention import cache, flash
from orthrus_jax.attention.chunked import chunked_attention
from orthrus_jax.attention.mixture import mixed_attention
from orthrus_jax.attention.quantised import QuantisedLayer
from orthrus_jax.attention.softmax import scaled_scores
from orthrus_jax.attention.visibility import TreeMask, visible_slots

Array = jax.Array


def attend(
    q: Array,
    slots: cache.LayerCache | QuantisedLayer,
    start: Array | None,
    end: Array,
    kv_len: Array | None,
    max_kv_len: int | None,
    tree_mask: TreeMask | None,
    mesh: Mesh | None,
) -> Array:
    """See attend.attend."""
    queries = group_heads(q, slots.kv_heads)  # [B, G, T * H/G, D]
    repeat = q.shape[2] // slots.kv_heads
    count = _count(slots, max_kv_len)
    prefix: tuple[Array, Array] | None
    if isinstance(slots, QuantisedLayer):
        prefix = mixed_attention(queries, slots, end, repeat, tree_mask, blocks=False)
    else:
        prefix = _many_slots(queries, slots, count, start, end, repeat, kv_len, tree_mask, mesh)
    if prefix is not None:
        return ungroup_heads(prefix[0].astype(q.dtype), q.shape)
    assert isinstance(slots, cache.LayerCache)
    few = slots.read(0, count)
    visible = visible_slots(jnp.arange(count), start, end, repeat, tree_mask)
    scores = jnp.where(visible, few.scores(queries), -jnp.inf)
    out = few.mix(jax.nn.softmax(scores, axis=-1), q.dtype)
    return ungroup_heads(out, q.shape)


def attend_blocks(
    q: Array,
    slots: cache.LayerCache | QuantisedLayer,
    own_k: Array,
    own_v: Array,
    start: Array | None,
    end: Array,
    kv_len: Array | None,
    max_kv_len: int | None,
    tree_mask: TreeMask | None,
    mesh: Mesh | None,
) -> Array:
    """See attend.attend_blocks."""
    b, a, t, h, d = q.shape
    groups = slots.kv_heads
    repeat = t * (h // groups)  # rows of a block per key head
    queries = group_heads(q.reshape(b, a * t, h, d), groups)  # [B, G, A * repeat, D]
    by_block = (b, groups, a, repeat, -1)
    own = scaled_scores(queries.reshape(by_block), own_k.transpose(0, 3, 1, 4, 2))
    own_v = own_v.transpose(0, 3, 1, 2, 4)
    count = _count(slots, max_kv_len)
    prefix: tuple[Array, Array] | None
    if isinstance(slots, QuantisedLayer):
        prefix = mixed_attention(queries, slots, end, repeat, tree_mask, blocks=True)
    else:
        prefix = _many_slots(queries, slots, count, start, end, repeat, kv_len, tree_mask, mesh)
    if prefix is not None:
        prefix_out, prefix_lse = (x.reshape(by_block) for x in prefix)
        own_lse = jax.nn.logsumexp(own, axis=-1, keepdims=True)
        prefix_weight = jax.nn.sigmoid(prefix_lse - own_lse)
        block_out = jax.nn.softmax(own, axis=-1).astype(own_v.dtype) @ own_v
        out = prefix_weight * prefix_out + (1 - prefix_weight) * block_out.astype(jnp.float32)
        out = out.astype(q.dtype).reshape(queries.shape)
    else:
        assert isinstance(slots, cache.LayerCache)
        few = slots.read(0, count)
        visible = visible_slots(jnp.arange(count), start, end, repeat, tree_mask)
        scores = jnp.where(visible, few.scores(queries), -jnp.inf)
        both = jnp.concatenate([scores.reshape(by_block), own], axis=-1)
        weights = jax.nn.softmax(both, axis=-1).astype(own_v.dtype)
        out = few.mix(weights[..., :count].reshape(b, groups, a * repeat, count), q.dtype)
        out += (weights[..., count:] @ own_v).reshape(out.shape)
    return ungroup_heads(out, (b, a * t, h, d)).reshape(q.shape)


def group_heads(q: Array, groups: int) -> Array:
    """[B, T, H, D] -> [B, G, T * H/G, D]: query heads of one key head are rows of one matmul."""
    b, t, h, d = q.shape
    return q.reshape(b, t, groups, h // groups, d).swapaxes(1, 2).reshape(b, groups, -1, d)


def ungroup_heads(out: Array, shape: tuple[int, ...]) -> Array:
    """[B, G, T * H/G, D] -> [B, T, H, D], the inverse of `group_heads`."""
    b, t, h, d = shape
    groups = out.shape[1]
    return out.reshape(b, groups, t, h // groups, d).swapaxes(1, 2).reshape(shape)


def _many_slots(
    q: Array,
    slots: cache.LayerCache,
    count: int,
    start: Array | None,
    end: Array,
    repeat: int,
    kv_len: Array | None,
    tree_mask: TreeMask | None,
    mesh: Mesh | None,
) -> tuple[Array, Array] | None:
    """softmax.finish's pair for queries [B, G, R, D] over many slots, or None if they are few.

    start, end [B, T] and the mask hold for `repeat` consecutive rows each.
    """
    if kv_len is not None and count > cache.CHUNK_ABOVE:
        sees = lambda s: visible_slots(s, start, end, repeat, tree_mask)
        return chunked_attention(q, slots, sees, kv_len)
    if kv_len is None and tree_mask is None and flash.fits(q.shape[2], count):
        start = jnp.zeros_like(end) if start is None else start
        start, end = (jnp.repeat(x, repeat, axis=1) for x in (start, end))
        many = slots.read(0, count)
        return flash.flash_attention(q, many.key_columns(), many.v, start, end, mesh)
    return None


def _count(slots: cache.LayerCache | QuantisedLayer, max_kv_len: int | None) -> int:
    """How many slots may be seen, as far as it is known when compiling."""
    return slots.num_slots if max_kv_len is None else min(max_kv_len, slots.num_slots)
