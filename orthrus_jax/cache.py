"""KVCache: the AR view's keys and values, one fixed buffer a layer, shared by both views.

Slot s of a row holds position s of that row. The cache knows no lengths: what may be read follows
from the positions of the rows that read, so rolling a rejected draft back moves nothing, and a
stale slot is overwritten before any position is high enough to see it.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention import MANY_SLOTS, SLOT_STEP
from orthrus_jax.config import ModelConfig
from orthrus_jax.layers import rotary_angles
from orthrus_jax.sharding import of_rows

Array = jax.Array


class KVCache(struct.PyTreeNode):
    """Keys [B, G, D, S] and values [B, G, S, D], one array a layer.

    Keys lie transposed so that scores (q @ k) and output (weights @ v) are plain batched matmuls:
    the compiler then turns no cache round (measured 1.3-3.3x per attention on CPU). Leading axes of
    size 1 (a batch of one, then a single key head) are dropped at rest: XLA's CPU compiler drops
    them in the matmul anyway, and when only that side of the update loses an axis it updates two
    copies of the cache (AR step 1.4x).

    `rotary` holds cos and sin, float32[S, D/2], of every slot's position: a table that the loop
    reads where XLA would otherwise recompute the angles for every head of every layer.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    rotary: tuple[Array, Array]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, slots: int) -> "KVCache":
        """An empty cache of `slots` positions for `batch` rows, in the config's dtype.

        Many slots are rounded up to what attention walks in whole steps.
        """
        if slots > MANY_SLOTS:
            slots = -(-slots // SLOT_STEP) * SLOT_STEP
        c, layers = config, range(config.num_hidden_layers)
        lead = tuple(itertools.dropwhile(lambda n: n == 1, (batch, c.num_key_value_heads)))
        cos, sin = rotary_angles(jnp.arange(slots), c.head_dim, c.rope_theta)
        return cls(
            k=tuple(jnp.zeros((*lead, c.head_dim, slots), c.dtype) for _ in layers),
            v=tuple(jnp.zeros((*lead, slots, c.head_dim), c.dtype) for _ in layers),
            rotary=(cos, sin),
        )

    def shardings(self, mesh: Mesh) -> "KVCache":
        """Where each array lies on a mesh: rows and key heads shared out, the table whole."""
        heads = lambda x: of_rows(x.shape, mesh, heads=True)
        whole = NamedSharding(mesh, P())
        return self.replace(
            k=tuple(map(heads, self.k)), v=tuple(map(heads, self.v)), rotary=(whole, whole)
        )

    def compact(self, first: Array, rows: Array) -> "KVCache":
        """Move what lies in slots first[b] + rows[b, j] to first[b] + j, for all j at once.

        Args:
          first: int32[B].
          rows: int32[B, R], each below R.
        """

        def move(buffer: Array, axis: int) -> Array:
            def of_row(x: Array, first: Array, rows: Array) -> Array:
                window = jax.lax.dynamic_slice_in_dim(x, first, rows.shape[0], axis)
                window = jnp.take(window, rows, axis=axis, mode="clip")
                return jax.lax.dynamic_update_slice_in_dim(x, window, first, axis)

            if buffer.ndim == 4:
                return jax.vmap(of_row)(buffer, first, rows)
            return of_row(buffer, first[0], rows[0])

        return self.replace(
            k=tuple(move(k, -1) for k in self.k), v=tuple(move(v, -2) for v in self.v)
        )

    def insert(self, row: "KVCache", at: Array) -> "KVCache":
        """Put a batch of one with as many slots in place of row `at`."""

        def put(old: Array, new: Array) -> Array:
            if old.ndim < 4:  # a batch of one itself
                return new
            new = new.reshape((1,) * (old.ndim - new.ndim) + new.shape)
            return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)

        return self.replace(k=tuple(map(put, self.k, row.k)), v=tuple(map(put, self.v, row.v)))


def as_slots(k: Array, v: Array) -> tuple[Array, Array]:
    """Turn k and v [B, T, G, D], as projections make them, to [B, G, D, T] and [B, G, T, D]."""
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


def seen(kv: tuple[Array, Array], span: int | None) -> tuple[Array, Array]:
    """Return one layer's keys [B, G, D, S] and values [B, G, S, D], the first `span` slots."""
    k, v = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in kv)
    return k[..., :span], v[:, :, :span]


def write(kv: tuple[Array, Array], k: Array, v: Array, start: Array) -> tuple[Array, Array]:
    """Write k and v [B, T, G, D] of one layer at slots start[b] ... start[b] + T - 1 of row b.

    The caller keeps start + T <= S: like every dynamic update, one that runs over the end would be
    moved back over live slots.
    """
    new_k, new_v = as_slots(k, v)
    return _update(kv[0], new_k, start, axis=-1), _update(kv[1], new_v, start, axis=-2)


def _update(buffer: Array, new: Array, start: Array, axis: int) -> Array:
    new = new.astype(buffer.dtype)
    update = lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n, s, axis)
    if buffer.ndim == 4:
        return jax.vmap(update)(buffer, new, start)
    return update(buffer, new.reshape(new.shape[4 - buffer.ndim :]), start[0])
