"""KVCache: the AR view's keys and values, one fixed buffer per layer, shared by both views.

Slot s of a sequence holds position s. The cache knows no lengths: which slots are read follows from
the positions of the rows that read, so rolling a rejected draft back moves nothing, and a stale
slot is overwritten before any position is high enough to see it. How slots are stored is known in
this file alone. The verbs: a layer's `write` and `read`, and the whole cache's `commit`, `compact`,
`insert` and `extract`.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention.rotary import rope_cos_sin
from orthrus_jax.attention.softmax import scaled_scores
from orthrus_jax.config import ModelConfig
from orthrus_jax.sharding import batch_sharding

Array = jax.Array
KeysValues = tuple[tuple[Array, ...], ...]  # keys and values of all layers
KV_CHUNK = 512  # slots that attention reads at a time from a long cache
CHUNK_ABOVE = 1024  # a longer cache is a long one: it has whole chunks


class Slots(struct.PyTreeNode):
    """Keys and values of S consecutive slots, ready for attention's two products.

    Attributes:
      k: [B, G, D, S] if `keys_transposed`, else [B, G, S, D].
      v: [B, G, S, D].
    """

    k: Array
    v: Array
    keys_transposed: bool = struct.field(pytree_node=False, default=True)

    def scores(self, q: Array) -> Array:
        """Scaled scores float32[B, G, R, S] of queries q [B, G, R, D]."""
        if self.keys_transposed:
            return scaled_scores(q, self.k)
        # Contracted as they are stored: the TPU's compiler copies a k that is transposed first.
        scores = jnp.einsum("...rd,...sd->...rs", q, self.k, preferred_element_type=jnp.float32)
        return scores * q.shape[-1] ** -0.5

    def mix(self, weights: Array, dtype: Any) -> Array:
        """Values weighted by `weights` [B, G, R, S] and summed: [B, G, R, D] in `dtype`."""
        return jnp.matmul(weights.astype(self.v.dtype), self.v, preferred_element_type=dtype)

    def key_columns(self) -> Array:
        """Keys as [B, G, D, S], however they are stored."""
        return self.k if self.keys_transposed else self.k.swapaxes(-1, -2)


class LayerCache(struct.PyTreeNode):
    """One layer's keys and values as they are stored; see KVCache."""

    k: Array
    v: Array
    keys_transposed: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def from_rows(cls, k: Array, v: Array) -> "LayerCache":
        """Slots made of a segment's own rows, k and v [B, T, G, D] as projections return them."""
        return cls(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

    @property
    def num_slots(self) -> int:
        """S, the number of slots."""
        return self.v.shape[-2]

    @property
    def kv_heads(self) -> int:
        """G, the number of key heads."""
        return self.v.shape[-3] if self.v.ndim > 2 else 1

    def write(self, k: Array, v: Array, start: Array) -> "LayerCache":
        """Write k and v [B, T, G, D] at slots start[b] ... start[b] + T - 1 of sequence b.

        The caller keeps start + T <= S: like every dynamic update, one that runs over the end would
        be moved back over live slots.
        """
        new_k = k.transpose(0, 2, 3, 1) if self.keys_transposed else k.transpose(0, 2, 1, 3)
        return self.replace(
            k=_update(self.k, new_k, start, axis=_slots_axis(self.keys_transposed)),
            v=_update(self.v, v.transpose(0, 2, 1, 3), start, axis=-2),
        )

    def read(self, first: Array | int, count: int) -> Slots:
        """Slots first ... first + count - 1 of every sequence.

        Args:
          first: static, or int32[] in a loop.
          count: static; first + count <= S.
        """

        def chunk(x: Array, axis: int) -> Array:
            whole = lambda x: x.reshape((1,) * (4 - x.ndim) + x.shape)
            if isinstance(first, int):
                # Sliced last: the other order costs a prefill of one sequence 12 -> 18 copies and
                # 8 -> 12 transposes (XLA's CPU compiler, two layers).
                return jax.lax.slice_in_dim(whole(x), first, first + count, axis=axis)
            # Sliced first: of a loop that reads a reshaped cache, XLA's CPU compiler copies the
            # whole cache in every AR step (batch 1; four times in the program).
            return whole(jax.lax.dynamic_slice_in_dim(x, first, count, axis))

        return Slots(
            chunk(self.k, _slots_axis(self.keys_transposed)),
            chunk(self.v, -2),
            self.keys_transposed,
        )


class KVCache(struct.PyTreeNode):
    """One array of keys and one of values per layer.

    The best key layout differs by backend. On CPU, keys are stored transposed, as [B, G, D, S]:
    both attention products are then plain batched matmuls and XLA does not transpose the cache
    (1.3-3.3x per attention). On TPU that layout is copied around every loop, and a GPU's kernel
    reads whole keys, so there keys are stored like the values, [B, G, S, D]. Leading axes of size 1
    (a batch of one, then a single key head) are not stored: XLA's CPU compiler drops them in the
    matmul anyway, and when only that side of the update loses an axis it updates two copies of the
    cache (AR step 1.4x).

    `rotary` holds cos and sin, float32[S, D/2], of every slot's position: a table that the loop
    reads where XLA would otherwise recompute the angles for every head of every layer. On a `mesh`,
    sequences and key heads are shared out.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    rotary: tuple[Array, Array]
    keys_transposed: bool = struct.field(pytree_node=False, default=True)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        batch: int,
        slots: int,
        *,
        mesh: Mesh | None = None,
        keys_transposed: bool | None = None,
    ) -> "KVCache":
        """An empty cache of `slots` positions per sequence, in the config's dtype.

        More than CHUNK_ABOVE slots are rounded up to whole chunks. `keys_transposed` is None for
        the layout that suits the devices.
        """
        if slots > CHUNK_ABOVE:
            slots = -(-slots // KV_CHUNK) * KV_CHUNK
        if keys_transposed is None:
            device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
            keys_transposed = device.platform == "cpu"
        c, layers = config, range(config.num_hidden_layers)
        lead = tuple(itertools.dropwhile(lambda n: n == 1, (batch, c.num_key_value_heads)))
        of_key = (c.head_dim, slots) if keys_transposed else (slots, c.head_dim)
        cos, sin = rope_cos_sin(jnp.arange(slots), c.head_dim, c.rope_theta, c.rope_scaling)
        return cls(
            k=tuple(jnp.zeros((*lead, *of_key), c.dtype) for _ in layers),
            v=tuple(jnp.zeros((*lead, slots, c.head_dim), c.dtype) for _ in layers),
            rotary=(cos, sin),
            keys_transposed=keys_transposed,
            mesh=mesh,
        )

    @property
    def layers(self) -> list[LayerCache]:
        """Each layer's part."""
        return [LayerCache(*kv, self.keys_transposed) for kv in zip(self.k, self.v, strict=True)]

    def with_layers(self, layers: Sequence[LayerCache]) -> "KVCache":
        """The cache with each layer's part replaced."""
        return self.replace(k=tuple(x.k for x in layers), v=tuple(x.v for x in layers))

    def shardings(self) -> "KVCache":
        """Where each array lies on the mesh: batch and key heads shared out, the table whole."""
        assert self.mesh is not None, "made for one device"
        by_head = lambda x: batch_sharding(x.shape, self.mesh, heads=True)
        whole = NamedSharding(self.mesh, P())
        return self.replace(
            k=tuple(map(by_head, self.k)), v=tuple(map(by_head, self.v)), rotary=(whole, whole)
        )

    def commit(self, position: Array) -> "KVCache":
        """Declare the slots below position int32[B] final: no cycle rewrites or moves them.

        Nothing is to be done here, and nothing is compiled.
        """
        del position
        return self

    def compact(self, first: Array, rows: Array) -> "KVCache":
        """Move slot first[b] + rows[b, j] to slot first[b] + j, for all j at once.

        Args:
          first: int32[B].
          rows: int32[B, R], each below R.
        """
        move = partial(_compacted, axes=(_slots_axis(self.keys_transposed), -2))
        if self.mesh is not None:  # each sequence on its own device
            where = self.shardings()
            kv = jax.tree.map(lambda sharding: sharding.spec, (where.k, where.v))
            by_row = batch_sharding(first.shape, self.mesh).spec
            move = jax.shard_map(
                move, mesh=self.mesh, in_specs=(kv, by_row, by_row), out_specs=kv, check_vma=False
            )
        k, v = move((self.k, self.v), first, rows)
        return self.replace(k=k, v=v)

    def insert(self, row: "KVCache", at: Array) -> "KVCache":
        """Replace sequence `at` int32[] by `row`, a batch of one with as many slots."""

        def put(old: Array, new: Array) -> Array:
            if old.ndim < 4:  # a batch of one itself
                return new
            new = new.reshape((1,) * (old.ndim - new.ndim) + new.shape)
            return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)

        return self.replace(k=tuple(map(put, self.k, row.k)), v=tuple(map(put, self.v, row.v)))

    def extract(self, at: Array) -> "KVCache":
        """A copy of sequence `at` int32[] as a batch of one, as `zeros` stores such a batch."""

        def take(x: Array) -> Array:
            if x.ndim < 4:  # a batch of one itself
                return jnp.copy(x)
            one = jax.lax.dynamic_index_in_dim(x, at, axis=0, keepdims=False)
            return one[0] if one.shape[0] == 1 else one

        rotary = jax.tree.map(jnp.copy, self.rotary)
        return self.replace(k=tuple(map(take, self.k)), v=tuple(map(take, self.v)), rotary=rotary)


def _slots_axis(keys_transposed: bool) -> int:
    """The axis of the keys' slots; that of the values' is -2."""
    return -1 if keys_transposed else -2


def _update(buffer: Array, new: Array, start: Array, axis: int) -> Array:
    new = new.astype(buffer.dtype)
    update = lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n, s, axis)
    if buffer.ndim == 4:
        return constrain_layout_on_tpu(jax.vmap(update)(buffer, new, start))
    new = new.reshape(new.shape[4 - buffer.ndim :])
    return constrain_layout_on_tpu(update(buffer, new, start[0]))


def _compacted(kv: KeysValues, first: Array, rows: Array, axes: tuple[int, int]) -> KeysValues:
    all_buffers = lambda move, kv: tuple(
        tuple(move(x, axis=axis) for x in xs) for xs, axis in zip(kv, axes, strict=True)
    )
    at_once = lambda kv: all_buffers(partial(_moved, first=first, rows=rows), kv)
    one_row = lambda b, kv: all_buffers(partial(_moved_in_row, b=b, first=first, rows=rows), kv)
    if len(rows) == 1:
        return at_once(kv)
    # All windows of a batch at once make the TPU's compiler copy the cache; no other backend does.
    one_by_one = lambda kv: jax.lax.fori_loop(0, len(rows), one_row, kv)
    return jax.lax.platform_dependent(kv, tpu=one_by_one, default=at_once)


def _moved(buffer: Array, first: Array, rows: Array, axis: int) -> Array:
    def one_row(x: Array, first: Array, rows: Array) -> Array:
        window = jax.lax.dynamic_slice_in_dim(x, first, len(rows), axis)
        window = jnp.take(window, rows, axis=axis, mode="clip")
        return jax.lax.dynamic_update_slice_in_dim(x, window, first, axis)

    if buffer.ndim == 4:
        return jax.vmap(one_row)(buffer, first, rows)
    return constrain_layout_on_tpu(one_row(buffer, first[0], rows[0]))


def _moved_in_row(buffer: Array, b: Array, first: Array, rows: Array, axis: int) -> Array:
    start, sizes = [b, *[jnp.int32(0)] * 3], [1, *buffer.shape[1:]]
    start[axis], sizes[axis] = first[b], rows.shape[1]
    window = jax.lax.dynamic_slice(buffer, start, sizes)
    window = jnp.take(window, rows[b], axis=axis, mode="clip")
    return constrain_layout_on_tpu(jax.lax.dynamic_update_slice(buffer, window, start))


def constrain_layout_on_tpu(x: Array) -> Array:
    """Identity. On TPU, pins x to the cache's layout.

    XLA would otherwise give all slots the layout of the few new rows, and undo it, every cycle.
    """
    pin = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.lax.platform_dependent(x, tpu=pin, default=lambda x: x)
