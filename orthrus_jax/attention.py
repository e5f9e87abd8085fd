"""Attention as pure functions of q, k, v and who sees whom. No weights, no cache, no views.

Two shapes of visibility cover everything the project does: a row that sees a range of slots
(prefill, AR decoding, verification), and a block that sees a range of slots and itself (drafting,
training). Scores and softmax are float32.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def attend(q: Array, k: Array, v: Array, start: Array | None, end: Array) -> Array:
    """Each query row sees the slots start <= s < end.

    Args:
      q: [B, T, H, D]; its H heads read the G key heads in order, H/G to each.
      k: [B, G, D, S]. v: [B, G, S, D].
      start: int32[B, T] or None for 0.
      end: int32[B, T], at least start + 1.

    Returns:
      [B, T, H, D] in q's dtype.
    """
    queries = _by_group(q, k.shape[1])  # [B, G, T * H/G, D]
    per_row = q.shape[2] // k.shape[1]
    visible = jnp.repeat(_in_range(k.shape[3], start, end), per_row, axis=1)  # [B, T * H/G, S]
    scores = jnp.where(visible[:, None], _scores(queries, k), -jnp.inf)
    out = jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v
    return _by_row(out, q.shape)


def attend_blocks(
    q: Array, k: Array, v: Array, own_k: Array, own_v: Array, start: Array | None, end: Array
) -> Array:
    """Each row of a block sees the slots start <= s < end, and every row of its own block.

    The two parts share one softmax. No score between blocks is ever formed.

    Args:
      q: [B, A, K, H, D]: A blocks of K rows.
      k: [B, G, D, S], v: [B, G, S, D], the slots all blocks choose from.
      own_k, own_v: [B, A, K, G, D].
      start: int32[B, A] or None for 0.
      end: int32[B, A]; end = start is a block that sees only itself.

    Returns:
      [B, A, K, H, D] in q's dtype.
    """
    b, a, t, h, d = q.shape
    groups, slots = k.shape[1], k.shape[3]
    rows = t * (h // groups)  # of a block, in a group
    queries = _by_group(q.reshape(b, a * t, h, d), groups)  # [B, G, A * rows, D]
    visible = jnp.repeat(_in_range(slots, start, end), rows, axis=1)  # [B, A * rows, S]
    prefix = jnp.where(visible[:, None], _scores(queries, k), -jnp.inf)

    by_block = (b, groups, a, rows, -1)
    own = _scores(queries.reshape(by_block), own_k.transpose(0, 3, 1, 4, 2))
    scores = jnp.concatenate([prefix.reshape(by_block), own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = weights[..., :slots].reshape(b, groups, a * rows, slots) @ v
    out += (weights[..., slots:] @ own_v.transpose(0, 3, 1, 2, 4)).reshape(out.shape)
    return _by_row(out, (b, a * t, h, d)).reshape(q.shape)


def _by_group(q: Array, groups: int) -> Array:
    """[B, T, H, D] -> [B, G, T * H/G, D]: query heads of one key head are rows of one matmul."""
    b, t, h, d = q.shape
    return q.reshape(b, t, groups, h // groups, d).swapaxes(1, 2).reshape(b, groups, -1, d)


def _by_row(out: Array, shape: tuple[int, ...]) -> Array:
    """[B, G, T * H/G, D] -> [B, T, H, D], the inverse of `_by_group`."""
    b, t, h, d = shape
    groups = out.shape[1]
    return out.reshape(b, groups, t, h // groups, d).swapaxes(1, 2).reshape(shape)


def _scores(q: Array, k: Array) -> Array:
    """q [..., rows, D] @ k [..., D, S] / sqrt(D), in float32."""
    return jnp.matmul(q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _in_range(slots: int, start: Array | None, end: Array) -> Array:
    """bool[B, T, S]: which of the `slots` lie in [start, end) of each row."""
    index = jnp.arange(slots)
    inside = index < end[..., None]
    return inside if start is None else inside & (index >= start[..., None])
