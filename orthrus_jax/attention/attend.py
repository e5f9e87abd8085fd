"""Attention as pure functions of q, k, v and who sees whom. No weights, no cache, no views.

Two shapes of visibility cover everything the project does: a row that sees a range of slots
(prefill, AR decoding, verification), and a block that sees a range of slots and itself (drafting,
training). On a tree of drafts either sees its ancestors besides. Scores and softmax are float32.

Over many slots the work follows the rows' real length: `used`, known only at run time, says how
many slots are alive, and a loop walks that many in steps of SLOT_STEP with a running softmax (arXiv
2112.05682). Many rows over many slots, without `used`, are training's: flash.py. Few slots are one
plain softmax, which is faster.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention import chunked, flash
from orthrus_jax.attention.visibility import Branches, visible_slots
from orthrus_jax.sharding import BATCH, TENSOR

Array = jax.Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    start: Array | None,
    end: Array,
    used: Array | None = None,
    mesh: Mesh | None = None,
    branches: Branches | None = None,
    turned: bool = True,
) -> Array:
    """Each query row sees the slots start <= s < end.

    Args:
      q: [B, T, H, D]; its H heads read the G key heads in order, H/G to each.
      k: [B, G, D, S], or [B, G, S, D] if not `turned`. v: [B, G, S, D].
      start: int32[B, T] or None for 0.
      end: int32[B, T], at least start + 1.
      used: int32[], a bound on the slots seen that may save work, or None for S.
      mesh: what the arrays lie on, if on more than one device.
      branches: slots seen besides.
      turned: how the keys of the slots lie.

    Returns:
      [B, T, H, D] in q's dtype.
    """
    queries = _by_group(q, k.shape[1])  # [B, G, T * H/G, D]
    per_row, slots = q.shape[2] // k.shape[1], v.shape[2]
    if used is None and flash.fits(queries.shape[2], slots):
        assert turned, "without a cache, keys are turned"
        out, _ = _ranged(queries, k, v, start, end, per_row, mesh)
        return _by_row(out.astype(v.dtype), q.shape)
    if used is not None and slots > chunked.MANY_SLOTS:
        sees = lambda s: visible_slots(s, start, end, per_row, branches)
        out, _ = chunked.chunked_attention(queries, k, v, sees, used, turned)
        return _by_row(out.astype(v.dtype), q.shape)
    visible = visible_slots(jnp.arange(slots), start, end, per_row, branches)
    scores = jnp.where(visible, chunked.scores_of(queries, k, turned), -jnp.inf)
    out = jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v
    return _by_row(out, q.shape)


def attend_blocks(
    q: Array,
    k: Array,
    v: Array,
    own_k: Array,
    own_v: Array,
    start: Array | None,
    end: Array,
    used: Array | None = None,
    mesh: Mesh | None = None,
    branches: Branches | None = None,
    turned: bool = True,
) -> Array:
    """Each row of a block sees the slots start <= s < end, and every row of its own block.

    The two parts share one softmax. No score between blocks is ever formed.

    Args:
      q: [B, A, K, H, D]: A blocks of K rows.
      k: [B, G, D, S], or [B, G, S, D] if not `turned`, v: [B, G, S, D]: the slots all blocks choose
        from.
      own_k, own_v: [B, A, K, G, D].
      start: int32[B, A] or None for 0.
      end: int32[B, A]; end = start is a block that sees only itself.
      used: int32[], a bound on the slots seen that may save work, or None for S.
      mesh: what the arrays lie on, if on more than one device.
      branches: slots seen besides.
      turned: how the keys of the slots lie.

    Returns:
      [B, A, K, H, D] in q's dtype.
    """
    b, a, t, h, d = q.shape
    groups, slots = k.shape[1], v.shape[2]
    rows = t * (h // groups)  # of a block, in a group
    queries = _by_group(q.reshape(b, a * t, h, d), groups)  # [B, G, A * rows, D]
    by_block = (b, groups, a, rows, -1)
    own = chunked.scores_of(queries.reshape(by_block), own_k.transpose(0, 3, 1, 4, 2))
    own_v = own_v.transpose(0, 3, 1, 2, 4)
    apart = None  # the slots' part, where they are many
    if used is not None and slots > chunked.MANY_SLOTS:
        sees = lambda s: visible_slots(s, start, end, rows, branches)
        apart = chunked.chunked_attention(queries, k, v, sees, used, turned)
    elif used is None and flash.fits(a * rows, slots):
        assert turned, "without a cache, keys are turned"
        apart = _ranged(queries, k, v, start, end, rows, mesh)
    if apart is not None:
        before, log_mass = apart
        own_mass = jax.nn.logsumexp(own, axis=-1, keepdims=True)
        share = jax.nn.sigmoid(log_mass.reshape(by_block) - own_mass)  # of the slots
        within = jax.nn.softmax(own, axis=-1).astype(v.dtype) @ own_v
        out = share * before.reshape(by_block) + (1 - share) * within.astype(jnp.float32)
        return _by_row(out.astype(v.dtype).reshape(queries.shape), (b, a * t, h, d)).reshape(
            q.shape
        )

    visible = visible_slots(jnp.arange(slots), start, end, rows, branches)  # [B, 1, A * rows, S]
    prefix = jnp.where(visible, chunked.scores_of(queries, k, turned), -jnp.inf)
    scores = jnp.concatenate([prefix.reshape(by_block), own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = weights[..., :slots].reshape(b, groups, a * rows, slots) @ v
    out += (weights[..., slots:] @ own_v).reshape(out.shape)
    return _by_row(out, (b, a * t, h, d)).reshape(q.shape)


def _ranged(
    q: Array,
    k: Array,
    v: Array,
    start: Array | None,
    end: Array,
    repeat: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Attend by tiles; `start` and `end` [B, T] hold for `repeat` rows of q [B, G, R, D] each."""
    start = jnp.zeros_like(end) if start is None else start
    start, end = (jnp.repeat(x, repeat, axis=1) for x in (start, end))
    if mesh is None:
        return flash.ranged_attention(q, k, v, start, end)
    heads, rows = P(BATCH, TENSOR), P(BATCH)
    on_each = jax.shard_map(  # rows and heads need nothing of each other
        flash.ranged_attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows, rows),
        out_specs=(heads, heads),
        check_vma=False,
    )
    return on_each(q, k, v, start, end)


def _by_group(q: Array, groups: int) -> Array:
    """[B, T, H, D] -> [B, G, T * H/G, D]: query heads of one key head are rows of one matmul."""
    b, t, h, d = q.shape
    return q.reshape(b, t, groups, h // groups, d).swapaxes(1, 2).reshape(b, groups, -1, d)


def _by_row(out: Array, shape: tuple[int, ...]) -> Array:
    """[B, G, T * H/G, D] -> [B, T, H, D], the inverse of `_by_group`."""
    b, t, h, d = shape
    groups = out.shape[1]
    return out.reshape(b, groups, t, h // groups, d).swapaxes(1, 2).reshape(shape)
