"""KVCache: the AR view's keys and values, one fixed buffer a layer, shared by both views.

Slot s of a row holds position s of that row. The cache knows no lengths: what may be read follows
from the positions of the rows that read, so rolling a rejected draft back moves nothing, and a
stale slot is overwritten before any position is high enough to see it.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention.chunked import MANY_SLOTS, SLOT_STEP
from orthrus_jax.attention.rotary import rope_cos_sin
from orthrus_jax.config import ModelConfig
from orthrus_jax.sharding import of_rows

Array = jax.Array
KeysValues = tuple[tuple[Array, ...], ...]  # keys and values of all layers


class LayerCache(struct.PyTreeNode):
    """One layer's keys and values as they lie: see KVCache."""

    k: Array
    v: Array
    turned: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def of(cls, k: Array, v: Array) -> "LayerCache":
        """Slots that are the rows k and v [B, T, G, D], as projections make them, themselves."""
        return cls(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

    def seen(self, span: int | None) -> tuple[Array, Array]:
        """Return the first `span` slots: keys, turned or not, and values [B, G, S, D]."""
        k, v = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (self.k, self.v))
        return k[..., :span] if self.turned else k[:, :, :span], v[:, :, :span]

    def write(self, k: Array, v: Array, start: Array) -> "LayerCache":
        """Write k and v [B, T, G, D] at slots start[b] ... start[b] + T - 1 of row b.

        The caller keeps start + T <= S: like every dynamic update, one that runs over the end would
        be moved back over live slots.
        """
        new_k = k.transpose(0, 2, 3, 1) if self.turned else k.transpose(0, 2, 1, 3)
        return self.replace(
            k=_update(self.k, new_k, start, axis=_slots_axis(self.turned)),
            v=_update(self.v, v.transpose(0, 2, 1, 3), start, axis=-2),
        )


class KVCache(struct.PyTreeNode):
    """Values [B, G, S, D] and keys, `turned` [B, G, D, S] or as the values; one array a layer.

    What a matmul's compiler wants of the keys differs. Turned, scores (q @ k) and output (weights @
    v) are plain batched matmuls, and the CPU's turns no cache round (measured 1.3-3.3x per
    attention). The TPU's lays turned keys out anew, and back, around every loop: there they lie as
    the values do. Leading axes of size 1 (a batch of one, then a single key head) are dropped at
    rest: XLA's CPU compiler drops them in the matmul anyway, and when only that side of the update
    loses an axis it updates two copies of the cache (AR step 1.4x).

    `rotary` holds cos and sin, float32[S, D/2], of every slot's position: a table that the loop
    reads where XLA would otherwise recompute the angles for every head of every layer. On a `mesh`
    rows and key heads are shared out.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    rotary: tuple[Array, Array]
    turned: bool = struct.field(pytree_node=False, default=True)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        batch: int,
        slots: int,
        turned: bool = True,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache of `slots` positions for `batch` rows, in the config's dtype.

        Many slots are rounded up to what attention walks in whole steps.
        """
        if slots > MANY_SLOTS:
            slots = -(-slots // SLOT_STEP) * SLOT_STEP
        c, layers = config, range(config.num_hidden_layers)
        lead = tuple(itertools.dropwhile(lambda n: n == 1, (batch, c.num_key_value_heads)))
        of_key = (c.head_dim, slots) if turned else (slots, c.head_dim)
        cos, sin = rope_cos_sin(jnp.arange(slots), c.head_dim, c.rope_theta)
        return cls(
            k=tuple(jnp.zeros((*lead, *of_key), c.dtype) for _ in layers),
            v=tuple(jnp.zeros((*lead, slots, c.head_dim), c.dtype) for _ in layers),
            rotary=(cos, sin),
            turned=turned,
            mesh=mesh,
        )

    @property
    def layers(self) -> list[LayerCache]:
        """Each layer's part."""
        return [LayerCache(*kv, self.turned) for kv in zip(self.k, self.v, strict=True)]

    def with_layers(self, layers: Sequence[LayerCache]) -> "KVCache":
        """The cache with each layer's part replaced."""
        return self.replace(k=tuple(x.k for x in layers), v=tuple(x.v for x in layers))

    def shardings(self) -> "KVCache":
        """Where each array lies on the mesh: rows and key heads shared out, the table whole."""
        assert self.mesh is not None, "made for one device"
        heads = lambda x: of_rows(x.shape, self.mesh, heads=True)
        whole = NamedSharding(self.mesh, P())
        return self.replace(
            k=tuple(map(heads, self.k)), v=tuple(map(heads, self.v)), rotary=(whole, whole)
        )

    def compact(self, first: Array, rows: Array) -> "KVCache":
        """Move what lies in slots first[b] + rows[b, j] to first[b] + j, for all j at once.

        Args:
          first: int32[B].
          rows: int32[B, R], each below R.
        """
        move = partial(_compacted, axes=(_slots_axis(self.turned), -2))
        if self.mesh is not None:  # each row where it is
            where = self.shardings()
            kv = jax.tree.map(lambda sharding: sharding.spec, (where.k, where.v))
            by_row = of_rows(first.shape, self.mesh).spec
            move = jax.shard_map(
                move, mesh=self.mesh, in_specs=(kv, by_row, by_row), out_specs=kv, check_vma=False
            )
        k, v = move((self.k, self.v), first, rows)
        return self.replace(k=k, v=v)

    def insert(self, row: "KVCache", at: Array) -> "KVCache":
        """Put a batch of one with as many slots in place of row `at`."""

        def put(old: Array, new: Array) -> Array:
            if old.ndim < 4:  # a batch of one itself
                return new
            new = new.reshape((1,) * (old.ndim - new.ndim) + new.shape)
            return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)

        return self.replace(k=tuple(map(put, self.k, row.k)), v=tuple(map(put, self.v, row.v)))


def _slots_axis(turned: bool) -> int:
    """Where the slots of the keys are; those of the values are at -2."""
    return -1 if turned else -2


def _update(buffer: Array, new: Array, start: Array, axis: int) -> Array:
    new = new.astype(buffer.dtype)
    update = lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n, s, axis)
    if buffer.ndim == 4:
        return _pinned_on_tpu(jax.vmap(update)(buffer, new, start))
    return _pinned_on_tpu(update(buffer, new.reshape(new.shape[4 - buffer.ndim :]), start[0]))


def _compacted(kv: KeysValues, first: Array, rows: Array, axes: tuple[int, int]) -> KeysValues:
    each = lambda move, kv: tuple(
        tuple(move(x, axis=axis) for x in xs) for xs, axis in zip(kv, axes, strict=True)
    )
    at_once = lambda kv: each(partial(_moved, first=first, rows=rows), kv)
    of_row = lambda b, kv: each(partial(_moved_in_row, b=b, first=first, rows=rows), kv)
    if len(rows) == 1:
        return at_once(kv)
    # Of a batch's windows taken at once the TPU's compiler copies the cache; others run them so.
    one_by_one = lambda kv: jax.lax.fori_loop(0, len(rows), of_row, kv)
    return jax.lax.platform_dependent(kv, tpu=one_by_one, default=at_once)


def _moved(buffer: Array, first: Array, rows: Array, axis: int) -> Array:
    def of_row(x: Array, first: Array, rows: Array) -> Array:
        window = jax.lax.dynamic_slice_in_dim(x, first, len(rows), axis)
        window = jnp.take(window, rows, axis=axis, mode="clip")
        return jax.lax.dynamic_update_slice_in_dim(x, window, first, axis)

    if buffer.ndim == 4:
        return jax.vmap(of_row)(buffer, first, rows)
    return _pinned_on_tpu(of_row(buffer, first[0], rows[0]))


def _moved_in_row(buffer: Array, b: Array, first: Array, rows: Array, axis: int) -> Array:
    start, sizes = [b, *[jnp.int32(0)] * 3], [1, *buffer.shape[1:]]
    start[axis], sizes[axis] = first[b], rows.shape[1]
    window = jax.lax.dynamic_slice(buffer, start, sizes)
    window = jnp.take(window, rows[b], axis=axis, mode="clip")
    return _pinned_on_tpu(jax.lax.dynamic_update_slice(buffer, window, start))


def _pinned_on_tpu(x: Array) -> Array:
    """x as it is, and for the TPU's compiler in the layout in which a cache comes and goes.

    It would otherwise lay all slots out as the few new rows happen to lie, and back, every cycle.
    """
    pin = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.lax.platform_dependent(x, tpu=pin, default=lambda x: x)
