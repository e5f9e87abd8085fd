"""Attention as pure functions of q, k, v and who sees whom. No weights, no cache, no views.

Two shapes of visibility cover everything the project does: a row that sees a range of slots
(prefill, AR decoding, verification), and a block that sees a range of slots and itself (drafting,
training). On a tree of drafts either sees its ancestors besides. Scores and softmax are float32.

Over many slots the work follows the rows' real length: `used`, known only at run time, says how
many slots are alive, and a loop walks that many in steps of SLOT_STEP with a running softmax (arXiv
2112.05682). Many rows over many slots, without `used`, are training's: tiled.py. Few slots are one
plain softmax, which is faster.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention import flash as tiled
from orthrus_jax.sharding import BATCH, TENSOR

Array = jax.Array
SLOT_STEP = 512
MANY_SLOTS = 1024  # more than this are walked in steps


class Branches(struct.PyTreeNode):
    """Slots that are seen one by one: of the W from `first` int32[B] on, those that `seen` marks.

    `seen` is bool[B, T, W], for each of T rows or blocks.
    """

    first: Array
    seen: Array

    def among(self, slots: Array) -> Array:
        """bool[B, T, S]: which of the consecutive `slots` [S] are seen."""
        many, width = slots.shape[0], self.seen.shape[2]
        around = jnp.pad(self.seen, ((0, 0), (0, 0), (many, many)))
        begin = jnp.clip(many + slots[0] - self.first, 0, many + width)
        cut = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, many, axis=1)
        return jax.vmap(cut)(around, begin)


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
    if used is None and tiled.fits(queries.shape[2], slots):
        assert turned, "without a cache, keys are turned"
        out, _ = _ranged(queries, k, v, start, end, per_row, mesh)
        return _by_row(out.astype(v.dtype), q.shape)
    if used is not None and slots > MANY_SLOTS:
        sees = lambda s: _in_range(s, start, end, per_row, branches)
        out, _ = _walk(queries, k, v, sees, used, turned)
        return _by_row(out.astype(v.dtype), q.shape)
    visible = _in_range(jnp.arange(slots), start, end, per_row, branches)
    scores = jnp.where(visible, _scores(queries, k, turned), -jnp.inf)
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
    own = _scores(queries.reshape(by_block), own_k.transpose(0, 3, 1, 4, 2))
    own_v = own_v.transpose(0, 3, 1, 2, 4)
    apart = None  # the slots' part, where they are many
    if used is not None and slots > MANY_SLOTS:
        sees = lambda s: _in_range(s, start, end, rows, branches)
        apart = _walk(queries, k, v, sees, used, turned)
    elif used is None and tiled.fits(a * rows, slots):
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

    visible = _in_range(jnp.arange(slots), start, end, rows, branches)  # [B, 1, A * rows, S]
    prefix = jnp.where(visible, _scores(queries, k, turned), -jnp.inf)
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
        return tiled.ranged_attention(q, k, v, start, end)
    heads, rows = P(BATCH, TENSOR), P(BATCH)
    on_each = jax.shard_map(  # rows and heads need nothing of each other
        tiled.ranged_attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows, rows),
        out_specs=(heads, heads),
        check_vma=False,
    )
    return on_each(q, k, v, start, end)


def _walk(
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
        scores = jnp.where(inside, _scores(q, k_step, turned), -jnp.inf)
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


def _by_group(q: Array, groups: int) -> Array:
    """[B, T, H, D] -> [B, G, T * H/G, D]: query heads of one key head are rows of one matmul."""
    b, t, h, d = q.shape
    return q.reshape(b, t, groups, h // groups, d).swapaxes(1, 2).reshape(b, groups, -1, d)


def _by_row(out: Array, shape: tuple[int, ...]) -> Array:
    """[B, G, T * H/G, D] -> [B, T, H, D], the inverse of `_by_group`."""
    b, t, h, d = shape
    groups = out.shape[1]
    return out.reshape(b, groups, t, h // groups, d).swapaxes(1, 2).reshape(shape)


def _scores(q: Array, k: Array, turned: bool = True) -> Array:
    """q [..., rows, D] @ k [..., D, S] / sqrt(D), in float32; not `turned`, k is [..., S, D]."""
    if turned:
        scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    else:  # asked for as it is: of a transposition the TPU's compiler makes a copy
        scores = jnp.einsum("...rd,...sd->...rs", q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _in_range(
    slots: Array, start: Array | None, end: Array, repeat: int, branches: Branches | None = None
) -> Array:
    """bool[B, 1, T * repeat, S]: which of `slots` [S] each of T rows sees."""
    inside = slots < end[..., None]
    if start is not None:
        inside &= slots >= start[..., None]
    if branches is not None:
        inside |= branches.among(slots)
    return jnp.repeat(inside, repeat, axis=1)[:, None]
