"""Attention over a cache by one kernel that stops at the live length: for GPUs, while decoding.

The slots that a tile of rows may see are shared out among several programs, whose partial results
a second small kernel joins. Every form of visibility is the kernel's own: a range per row, the
slots of a tree, a block and itself. Rows without a cache (training), and shapes that do not divide
into tiles, are xla.py's. attend.py has the contract of both functions. On a CPU the kernels run in
Pallas' interpreter, for the tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention import xla
from orthrus_jax.attention.cache import LayerCache
from orthrus_jax.attention.softmax import MIN_SCORE
from orthrus_jax.attention.visibility import TreeMask
from orthrus_jax.sharding import batch_sharding

Array = jax.Array
LEAST = 16  # rows, slots and head size of a tile: what the matrix unit takes at the least
ROW_TILE = 64  # most rows per program
SLOT_TILES = {2: 64, 4: 32}  # slots read at a time, by bytes per number: what fits near the cores
PROGRAMS = 256  # as many as keep a large GPU's 132 cores busy
MOST_SPLITS = 32


def attend(
    q: Array,
    slots: LayerCache,
    start: Array | None,
    end: Array,
    kv_len: Array | None,
    max_kv_len: int | None,
    tree_mask: TreeMask | None,
    mesh: Mesh | None,
) -> Array:
    """See attend.attend."""
    if not _fits(q, slots, kv_len):
        return xla.attend(q, slots, start, end, kv_len, max_kv_len, tree_mask, mesh)
    rows = xla.group_heads(q, slots.kv_heads)[:, :, None]  # [B, G, 1, T * H/G, D]
    repeat = q.shape[2] // slots.kv_heads
    of_rows = lambda x: jnp.repeat(x, repeat, axis=1)[:, None]
    limits = _limits(start, end, tree_mask, of_rows)
    out = _attention(rows, slots, None, limits, _first(tree_mask), mesh)
    return xla.ungroup_heads(out[:, :, 0], q.shape)


def attend_blocks(
    q: Array,
    slots: LayerCache,
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
    if not _fits(q, slots, kv_len):
        args = start, end, kv_len, max_kv_len, tree_mask, mesh
        return xla.attend_blocks(q, slots, own_k, own_v, *args)
    b, a, t, h, d = q.shape
    groups = slots.kv_heads
    repeat = h // groups
    rows = q.reshape(b, a, t, groups, repeat, d).transpose(0, 3, 1, 2, 4, 5)
    rows = rows.reshape(b, groups, a, t * repeat, d)
    of_rows = lambda x: jnp.repeat(x[:, :, None], t * repeat, axis=2)
    own = tuple(x.transpose(0, 3, 1, 2, 4) for x in (own_k, own_v))  # [B, G, A, K, D]
    limits = _limits(start, end, tree_mask, of_rows)
    out = _attention(rows, slots, own, limits, _first(tree_mask), mesh)
    out = out.reshape(b, groups, a, t, repeat, d).transpose(0, 2, 3, 1, 4, 5)
    return out.reshape(q.shape)


def _fits(q: Array, slots: LayerCache, kv_len: Array | None) -> bool:
    """Whether the rows decode over a cache whose shape divides into tiles."""
    head = q.shape[-1]
    tiles = head >= LEAST and head & (head - 1) == 0 and slots.num_slots % LEAST == 0
    return kv_len is not None and tiles


def _first(tree_mask: TreeMask | None) -> Array | None:
    return None if tree_mask is None else tree_mask.first


def _limits(start: Array | None, end: Array, tree_mask: TreeMask | None, of_rows: Any) -> Any:
    """start, end int32[B, A, R] and the tree's mask int8[B, A, R, W] or None, for each row."""
    start = jnp.zeros_like(end) if start is None else start
    mask = None if tree_mask is None else of_rows(tree_mask.mask.astype(jnp.int8))
    return of_rows(start), of_rows(end), mask


def _attention(
    q: Array, slots: LayerCache, own: Any, limits: Any, first: Array | None, mesh: Mesh | None
) -> Array:
    """Attention of rows [B, G, A, R, D] over the cache and, with `own`, over their own block.

    Args:
      q: of A blocks of R rows.
      slots: S slots.
      own: keys and values [B, G, A, K, D] that all rows of a block see; or None.
      limits: as of `_limits`.
      first: int32[B], the first slot of the tree's mask; or None.
      mesh: devices that share out B and G, if there are several.

    Returns:
      [B, G, A, R, D] in q's dtype.
    """
    whole = lambda x: x.reshape((1,) * (4 - x.ndim) + x.shape)
    k, v = whole(slots.k), whole(slots.v)
    k = k.swapaxes(-1, -2) if slots.keys_transposed else k
    args = (q, k, v, own, *limits, first)
    if mesh is None or mesh.size == 1:
        return _per_device(*args)
    heads = batch_sharding(k.shape, mesh, heads=True).spec
    rows = P(heads[0])
    specs: tuple[Any, ...] = (heads, heads, heads, own and (heads, heads), rows, rows)
    specs += (None, None) if first is None else (rows, rows)
    return jax.shard_map(_per_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        *args
    )


def _per_device(*args: Any) -> Array:
    run = lambda interpret: lambda *args: _call(*args, interpret=interpret)
    return jax.lax.platform_dependent(*args, cpu=run(True), default=run(False))


def _call(q: Array, k: Array, v: Array, own: Any, *limits: Any, interpret: bool) -> Array:
    """`_attention` on one device: pad to tiles, run the kernel, join what its programs return."""
    b, g, a, rows, d = q.shape
    tile = min(ROW_TILE, max(LEAST, pl.next_power_of_2(rows)))
    count = -(-rows // tile)  # tiles of a block's rows
    splits = min(MOST_SPLITS, PROGRAMS // (b * g * a * count), k.shape[2] // _slot_tile(k))
    splits = max(1, splits)
    q = _padded(q, 3, count * tile).reshape(b * g, a, count * tile, d)
    arrays, specs = _inputs(q, k, v, own, *limits, tile=tile)
    kernel = functools.partial(
        _kernel,
        slot_tile=_slot_tile(k),
        splits=splits,
        tree=limits[2] is not None,
        own_rows=0 if own is None else own[0].shape[3],
    )
    lead = (splits, *q.shape[:3])
    by_tile = lambda i, j, s: (s, i, j // count, j % count)
    out, lse = pl.pallas_call(
        kernel,
        grid=(b * g, a * count, splits),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, None, tile, d), lambda *ijs: (*by_tile(*ijs), 0)),
            pl.BlockSpec((None, None, None, tile), by_tile),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, d), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention",
    )(*arrays)
    out = out[0] if splits == 1 else _join(out, lse, q.dtype, interpret)
    return out.reshape(b, g, a, count * tile, d)[:, :, :, :rows]


def _inputs(
    q: Array,
    k: Array,
    v: Array,
    own: Any,
    start: Array,
    end: Array,
    mask: Array | None,
    first: Array | None,
    *,
    tile: int,
) -> tuple[list[Array], list[Any]]:
    """The kernel's arrays in order, and which part of each a program (i, j, s) gets."""
    g, d = k.shape[1], k.shape[3]
    padded = q.shape[2]
    count = padded // tile
    of_rows = lambda *last: pl.BlockSpec(
        (None, None, tile, *last),
        lambda i, j, s: (i // g, j // count, j % count, *(0,) * len(last)),
    )
    of_slots = pl.BlockSpec((None, *k.shape[2:]), lambda i, j, s: (i, 0, 0))
    per_head = lambda x: x.reshape(-1, *x.shape[2:])
    arrays = [q, per_head(k), per_head(v), _padded(start, 2, padded), _padded(end, 2, padded)]
    of_q = pl.BlockSpec((None, None, tile, d), lambda i, j, s: (i, j // count, j % count, 0))
    specs = [of_q, of_slots, of_slots, of_rows(), of_rows()]
    if mask is not None and first is not None:
        width, margin = pl.next_power_of_2(mask.shape[3]), _slot_tile(k)
        mask = _padded(_padded(mask, 2, padded), 3, width)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (margin, margin)))
        arrays += [mask, first]
        specs += [of_rows(mask.shape[3]), pl.BlockSpec((None,), lambda i, j, s: (i // g,))]
    if own is not None:
        size = max(LEAST, pl.next_power_of_2(own[0].shape[3]))
        arrays += [per_head(_padded(x, 3, size)) for x in own]
        specs += [pl.BlockSpec((None, None, size, d), lambda i, j, s: (i, j // count, 0, 0))] * 2
    return arrays, specs


def _padded(x: Array, axis: int, size: int) -> Array:
    """x with zeros after its end along an axis, up to `size`."""
    room = [(0, 0)] * x.ndim
    room[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, room)


def _slot_tile(k: Array) -> int:
    """Slots read at a time: a power of two that divides them."""
    slots = k.shape[2]
    return min(slots & -slots, SLOT_TILES.get(k.dtype.itemsize, LEAST))


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    start_ref: Any,
    end_ref: Any,
    *refs: Any,
    slot_tile: int,
    splits: int,
    tree: bool,
    own_rows: int,
) -> None:
    """One program: a tile of rows over its share of the slots, and the rows' own block."""
    *more, out_ref, lse_ref = refs
    mask_ref, first_ref = more[:2] if tree else (q_ref, q_ref)  # unused without a tree
    q, start, end = q_ref[...], start_ref[...], end_ref[...]
    low, high = jnp.where(start < end, start, end).min(), end.max()
    if tree:
        first = first_ref[...]
        width = mask_ref.shape[1] - 2 * slot_tile
        low, high = jnp.minimum(low, first), jnp.maximum(high, first + width)
        high = jnp.minimum(high, k_ref.shape[0])
    low_tile, high_tile = low // slot_tile, pl.cdiv(high, slot_tile)
    share = pl.cdiv(high_tile - low_tile, splits)
    begin = low_tile + pl.program_id(2) * share

    def step(i: Array, carry: Any) -> Any:
        at = i * slot_tile
        slots = at + jnp.arange(slot_tile)
        seen = (slots[None] >= start[:, None]) & (slots[None] < end[:, None])
        if tree:
            column = jnp.clip(slot_tile + at - first, 0, slot_tile + width)
            seen |= mask_ref[:, pl.ds(column, slot_tile)] != 0
        chosen = pl.ds(at, slot_tile)
        return _online_step(carry, q, k_ref[chosen, :], v_ref[chosen, :], seen)

    shape = (q.shape[0],)
    carry = (
        jnp.full(shape, MIN_SCORE),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    carry = jax.lax.fori_loop(begin, jnp.minimum(begin + share, high_tile), step, carry)
    if own_rows:
        own_k, own_v = (ref[...] for ref in more[-2:])
        mine = (jnp.arange(own_k.shape[0]) < own_rows) & (pl.program_id(2) == 0)
        carry = _online_step(
            carry, q, own_k, own_v, jnp.broadcast_to(mine[None], (*shape, mine.size))
        )
    row_max, row_sum, acc = carry
    row_sum = jnp.maximum(row_sum, jnp.finfo(jnp.float32).tiny)
    out_ref[...] = (acc / row_sum[:, None]).astype(out_ref.dtype)
    lse_ref[...] = row_max + jnp.log(row_sum)


def _online_step(carry: Any, q: Array, k: Array, v: Array, seen: Array) -> Any:
    """softmax.online_softmax_step on a tile: q [R, D], k and v [S, D], seen bool[R, S]."""
    row_max, row_sum, acc = carry
    scores = _product(q, k, 1) * q.shape[-1] ** -0.5
    scores = jnp.where(seen, scores, -jnp.inf)
    new_max = jnp.maximum(row_max, scores.max(axis=1))
    weights, rescale = jnp.exp(scores - new_max[:, None]), jnp.exp(row_max - new_max)
    mixed = _product(weights.astype(v.dtype), v, 0)
    return new_max, row_sum * rescale + weights.sum(axis=1), acc * rescale[:, None] + mixed


def _product(a: Array, b: Array, axis: int) -> Array:
    """a's last axis against b's `axis`, summed in float32."""
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _join(out: Array, lse: Array, dtype: Any, interpret: bool) -> Array:
    """Join the shares' outputs float32[N, L, A, R, D] by their lse [N, L, A, R]."""
    splits, lead, blocks, rows, d = out.shape
    of = lambda *last: pl.BlockSpec(
        (splits, None, None, LEAST, *last), lambda i, j, r: (0, i, j, r, *(0,) * len(last))
    )

    def kernel(out_ref: Any, lse_ref: Any, joined_ref: Any) -> None:
        def step(i: Array, carry: Any) -> Any:
            top, total, acc = carry
            here = lse_ref[i, :]
            new = jnp.maximum(top, here)
            weight, rescale = jnp.exp(here - new), jnp.exp(top - new)
            acc = acc * rescale[:, None] + out_ref[i, :, :] * weight[:, None]
            return new, total * rescale + weight, acc

        zeros = jnp.zeros((LEAST,), jnp.float32)
        carry = (jnp.full((LEAST,), 2 * MIN_SCORE), zeros, jnp.zeros((LEAST, d), jnp.float32))
        _, total, acc = jax.lax.fori_loop(0, splits, step, carry)
        joined_ref[...] = (acc / total[:, None]).astype(joined_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(lead, blocks, rows // LEAST),
        in_specs=[of(d), of()],
        out_specs=pl.BlockSpec((None, None, LEAST, d), lambda i, j, r: (i, j, r, 0)),
        out_shape=jax.ShapeDtypeStruct(out.shape[1:], dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_join",
    )(out, lse)
