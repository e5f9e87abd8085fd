"""Attention over a quantised cache: tiles, their scales outside the products, and exact slots.

Each part gives an output and the log of its softmax's denominator, which merge as in attend_blocks.
A query is rotated once, and the tiles' output rotated back. Knows neither how tiles are made nor
who wrote the exact slots.
"""

import jax
import jax.numpy as jnp

from orthrus_jax.attention import kvarn
from orthrus_jax.attention.kvarn import Half
from orthrus_jax.attention.quantised import QuantisedLayer, tiles_per_chunk
from orthrus_jax.attention.softmax import Carry, finish, initial_carry, online_softmax_step
from orthrus_jax.attention.visibility import TreeMask, visible_slots

Array = jax.Array
Pair = tuple[Array, Array]  # softmax.finish's: output float32[B, G, R, D], lse float32[B, G, R, 1]
HIGHEST = jax.lax.Precision.HIGHEST


def mixed_attention(
    q: Array,
    layer: QuantisedLayer,
    end: Array,
    repeat: int,
    tree_mask: TreeMask | None,
    *,
    blocks: bool,
) -> Pair:
    """Attend to the slots below `end` and those of the tree, some of them quantised.

    Args:
      q: [B, G, T * repeat, D].
      layer: the slots.
      end: int32[B, T].
      repeat: rows of q that share an `end`.
      tree_mask: of the T rows or blocks, or None.
      blocks: whether each of T is a block, anchored after the last slot it sees. A row's position
        is that of the last slot it sees.

    Returns:
      softmax.finish's pair.
    """
    limits = quantised_ends(layer, end, tree_mask, blocks=blocks)
    seen = exact_visibility(layer, end, limits, tree_mask)
    seen = jnp.repeat(seen, repeat, axis=1)[:, None]
    slots = layer.exact.read(0, layer.config.exact_slots)
    scores = jnp.where(seen, slots.scores(q), -jnp.inf)
    mix = lambda weights: slots.mix(weights, jnp.float32)
    exact = finish(online_softmax_step(initial_carry(q), scores, mix))
    return merge(exact, tile_attention(q, layer, limits, repeat))


def quantised_ends(
    layer: QuantisedLayer, end: Array, tree_mask: TreeMask | None, *, blocks: bool
) -> Array:
    """int32[B, T]: up to which slot each row, or block, reads tiles.

    In a tree the position follows from the depth: how many of its ancestors are marked.
    """
    seen = end if tree_mask is None else end + tree_mask.mask.sum(-1, dtype=jnp.int32)
    if not blocks:
        return layer.config.quantised_end(seen - 1)
    # An outcome block's anchor may be one position past the pass: its tile may not be there yet.
    return jnp.minimum(layer.config.quantised_end(seen), layer.encoded[:, None])


def exact_visibility(
    layer: QuantisedLayer, end: Array, limits: Array, tree_mask: TreeMask | None
) -> Array:
    """bool[B, T, N]: which of the N exact slots, by their places, each row sees."""
    c = layer.config
    places, shift = jnp.arange(c.exact_slots), c.sink - layer.base
    since, upto = (x + shift[:, None] for x in (limits, end))
    seen = (places < c.sink) | (places >= since[..., None])
    seen &= places < upto[..., None]
    if tree_mask is not None:
        seen |= TreeMask(tree_mask.first + shift, tree_mask.mask).for_slots(places)
    return seen


def tile_attention(q: Array, layer: QuantisedLayer, limits: Array, repeat: int) -> Pair:
    """Attend to the slots from the sink up to `limits` int32[B, T], some tiles at a time."""
    c = layer.config
    count = tiles_per_chunk(c, layer.k.codes.shape[2])
    rotated = q.astype(jnp.float32)
    rotated = kvarn.rotate(rotated) if c.rotate else rotated

    def step(i: Array, carry: Carry) -> Carry:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * count, count, axis=2)
        k, v = jax.tree.map(part, (layer.k, layer.v))
        slots = c.sink + i * count * c.tile + jnp.arange(count * c.tile)
        seen = visible_slots(slots, None, limits, repeat)
        scores = jnp.where(seen, tile_scores(rotated, k, c.key_bits, q.dtype), -jnp.inf)
        mix = lambda weights: tile_mix(weights, v, c.value_bits, q.dtype)
        return online_softmax_step(carry, scores, mix)

    chunks = -(-(limits.max() - c.sink) // (count * c.tile))
    out, lse = finish(jax.lax.fori_loop(0, chunks, step, initial_carry(q)))
    return (kvarn.rotate(out) if c.rotate else out), lse


def tile_scores(q: Array, half: Half, bits: int, dtype: jnp.dtype) -> Array:
    """Scaled scores float32[B, G, R, C * tile] of rotated queries float32[B, G, R, D] on C tiles.

    With codes c: tau_t (sum_d q_d a_d c_td + sum_d q_d z_d), the products in `dtype`.
    """
    codes = kvarn.unpack(half.codes, bits).astype(dtype)
    step, low, scale = (
        x.astype(jnp.float32)[:, :, None] for x in (half.step, half.low, half.scale)
    )
    scaled = (q[:, :, :, None] * step).astype(dtype)
    products = jnp.einsum("bgrcd,bgctd->bgrct", scaled, codes, preferred_element_type=jnp.float32)
    lows = jnp.einsum("bgrd,bgcd->bgrc", q, low[:, :, 0], precision=HIGHEST)
    scores = (products + lows[..., None]) * scale
    return scores.reshape(*q.shape[:3], -1) * q.shape[-1] ** -0.5


def tile_mix(weights: Array, half: Half, bits: int, dtype: jnp.dtype) -> Array:
    """The rotated values of C tiles weighted by float32[B, G, R, C * tile]: float32[B, G, R, D].

    With codes c: kappa_d (sum_t (w_t a_t) c_td + sum_t w_t z_t), summed over the tiles.
    """
    codes = kvarn.unpack(half.codes, bits).astype(dtype)
    step, low, scale = (
        x.astype(jnp.float32)[:, :, None] for x in (half.step, half.low, half.scale)
    )
    weights = weights.reshape(*weights.shape[:3], *codes.shape[2:4])
    products = jnp.einsum(
        "bgrct,bgctd->bgrcd",
        (weights * step).astype(dtype),
        codes,
        preferred_element_type=jnp.float32,
    )
    lows = (weights * low).sum(-1, keepdims=True)
    return ((products + lows) * scale).sum(axis=3)


def merge(a: Pair, b: Pair) -> Pair:
    """Attention over two sets of slots, from each one's output and lse; nothing seen counts 0."""
    lse = jnp.logaddexp(a[1], b[1])
    return a[0] * jnp.exp(a[1] - lse) + b[0] * jnp.exp(b[1] - lse), lse
