"""QuantisedCache: a long context in tiles of a few bits, its sink and its newest slots exact.

The exact slots are a KVCache of fixed size: the sink, then the tail, whose first slot is `base`.
Slots are written there and nowhere else; `encode` turns final slots into tiles, between passes and
not in them. Which of the two a row reads follows from its position alone (KVCacheConfig), so AR
decoding, every other loop and a prompt read in any pieces see the same bytes. Knows no attention.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from orthrus_jax.attention import kvarn
from orthrus_jax.attention.cache import KV_CHUNK, KVCache, LayerCache
from orthrus_jax.attention.kv_config import KVCacheConfig
from orthrus_jax.attention.kvarn import Half
from orthrus_jax.attention.rotary import rope_cos_sin
from orthrus_jax.config import ModelConfig
from orthrus_jax.sharding import batch_sharding, to_host

Array = jax.Array


class QuantisedLayer(struct.PyTreeNode):
    """One layer's slots as they are stored; see QuantisedCache.

    Attributes:
      exact: sink and tail.
      k, v: tiles [B, G, T, ...] of the slots from the sink on.
      base, encoded: int32[B].
    """

    exact: LayerCache
    k: Half
    v: Half
    base: Array
    encoded: Array
    config: KVCacheConfig = struct.field(pytree_node=False)

    @property
    def kv_heads(self) -> int:
        """G, the number of key heads."""
        return self.k.codes.shape[1]

    @property
    def num_slots(self) -> int:
        """S, slots of a sequence that have a place."""
        return self.config.sink + self.k.codes.shape[2] * self.config.tile

    def write(self, k: Array, v: Array, start: Array) -> "QuantisedLayer":
        """Write k and v [B, T, G, D] at slots start[b] ... of sequence b; see LayerCache.write.

        They lie in the tail, or before its first move anywhere below its end.
        """
        return self.replace(exact=self.exact.write(k, v, start - self.base + self.config.sink))


class QuantisedCache(struct.PyTreeNode):
    """All layers' slots; the verbs of KVCache, and those between passes: `ready` and `encode`.

    Attributes:
      exact: of config.exact_slots slots: the sink, then slots `base`, base + 1, ... Its table of
        rotary angles is of all slots.
      k, v: per layer the tiles [B, G, T, ...]; tile t holds slots sink + t * tile and on.
      base: int32[B], the tail's first slot: sink, or q of the position at the last `encode`.
      encoded: int32[B], the end of the tiles that are written.
      position: int32[B], slots below are final (`commit`).
    """

    exact: KVCache
    k: tuple[Half, ...]
    v: tuple[Half, ...]
    base: Array
    encoded: Array
    position: Array
    config: KVCacheConfig = struct.field(pytree_node=False)

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        batch: int,
        slots: int,
        kv_cache: KVCacheConfig,
        *,
        mesh: Mesh | None = None,
        keys_transposed: bool | None = None,
    ) -> "QuantisedCache":
        """An empty cache of `slots` positions per sequence; arguments as of KVCache.zeros."""
        c, tile = config, kv_cache.tile
        exact = KVCache.zeros(
            c, batch, kv_cache.exact_slots, mesh=mesh, keys_transposed=keys_transposed
        )
        rotary = rope_cos_sin(jnp.arange(slots), c.head_dim, c.rope_theta, c.rope_scaling)
        count, piece = kv_cache.tiles(slots), tiles_per_chunk(kv_cache, kv_cache.tiles(slots))
        lead = (batch, c.num_key_value_heads, -(-count // piece) * piece)
        vector = lambda size: jnp.zeros((*lead, size), kvarn.SCALE_TYPE)

        def half(bits: int, rows: int, columns: int) -> Half:
            codes = jnp.zeros((*lead, tile * bits // 8, c.head_dim), jnp.uint8)
            return Half(codes, vector(rows), vector(rows), vector(columns))

        layers = range(c.num_hidden_layers)
        sink = lambda: jnp.full(batch, kv_cache.sink, jnp.int32)
        return cls(
            exact=exact.replace(rotary=rotary),
            k=tuple(half(kv_cache.key_bits, c.head_dim, tile) for _ in layers),
            v=tuple(half(kv_cache.value_bits, tile, c.head_dim) for _ in layers),
            base=sink(),
            encoded=sink(),
            position=jnp.zeros(batch, jnp.int32),
            config=kv_cache,
        )

    @property
    def rotary(self) -> tuple[Array, Array]:
        """cos and sin, float32[S, D/2], of every slot's position."""
        return self.exact.rotary

    @property
    def layers(self) -> list[QuantisedLayer]:
        """Each layer's part."""
        parts = zip(self.exact.layers, self.k, self.v, strict=True)
        return [QuantisedLayer(*part, self.base, self.encoded, self.config) for part in parts]

    def with_layers(self, layers: Sequence[QuantisedLayer]) -> "QuantisedCache":
        """The cache with each layer's exact part replaced: a pass writes no tiles."""
        return self.replace(exact=self.exact.with_layers([layer.exact for layer in layers]))

    def shardings(self) -> "QuantisedCache":
        """Where each array lies on the mesh: batch and key heads shared out."""
        mesh = self.exact.mesh
        assert mesh is not None, "made for one device"
        by_head = lambda x: batch_sharding(x.shape, mesh, heads=True)
        by_row = batch_sharding(self.base.shape, mesh)
        k, v = jax.tree.map(by_head, (self.k, self.v))
        return self.replace(
            exact=self.exact.shardings(), k=k, v=v, base=by_row, encoded=by_row, position=by_row
        )

    # The verbs that a KVCache has too

    def commit(self, position: Array) -> "QuantisedCache":
        """Declare the slots below position int32[B] final; `encode` may turn them into tiles."""
        return self.replace(position=position)

    def compact(self, first: Array, rows: Array) -> "QuantisedCache":
        """Move slot first[b] + rows[b, j] to slot first[b] + j; see KVCache.compact."""
        first = first - self.base + self.config.sink
        return self.replace(exact=self.exact.compact(first, rows))

    def insert(self, row: "QuantisedCache", at: Array) -> "QuantisedCache":
        """Replace sequence `at` int32[] by `row`, a batch of one with as many slots."""
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)
        rest = jax.tree.map(put, self.replace(exact=None), row.replace(exact=None))
        return rest.replace(exact=self.exact.insert(row.exact, at))

    def extract(self, at: Array) -> "QuantisedCache":
        """A copy of sequence `at` int32[] as a batch of one."""
        take = lambda x: jnp.copy(jax.lax.dynamic_slice_in_dim(x, at, 1, axis=0))
        rest = jax.tree.map(take, self.replace(exact=None))
        return rest.replace(exact=self.exact.extract(at))

    # Between passes

    def resume(self, start: Array) -> "QuantisedCache":
        """Go back to int32[B] live slots each: `resumable` ones. Later tiles are written anew."""
        c = self.config
        return self.replace(
            base=jnp.minimum(self.base, c.quantised_end(start)),
            encoded=jnp.clip(start // c.tile * c.tile, c.sink, self.encoded),
            position=start,
        )

    def ready(self, reach: int) -> Array:
        """bool[]: whether all tiles are written that a cycle over `reach` slots may read.

        Such a cycle's rows are at position ... position + reach - 1, and it also fits the tail.

        Raises:
          ValueError: for more slots than config.longest_pass, which would read tiles not final.
        """
        if reach > self.config.longest_pass:
            raise ValueError(f"a pass of {reach} slots is over {self.config.longest_pass}")
        return (self.config.quantised_end(self.position + reach - 1) <= self.encoded).all()

    def settle(self, reach: int) -> "QuantisedCache":
        """The cache, ready for a cycle over `reach` slots; a loop of 0, 1 or 2 turns."""
        return jax.lax.while_loop(lambda x: ~x.ready(reach), lambda x: x.encode(), self)

    def encode(self) -> "QuantisedCache":
        """Write the next tile of each sequence that has a final one, and move the tails down."""
        c = self.config
        final = self.encoded + c.tile <= self.position
        encoded = jnp.where(final, self.encoded + c.tile, self.encoded)
        rows = self._exact_rows(self.encoded - self.base + c.sink)
        tiles = jax.lax.map(
            lambda kv: (kvarn.encode_keys(kv[0], c), kvarn.encode_values(kv[1], c)), rows
        )
        tile = (self.encoded - c.sink) // c.tile

        def put(halves: tuple[Half, ...], new: Half) -> tuple[Half, ...]:
            of_layer = lambda i: jax.tree.map(lambda x: x[i], new)
            write = lambda old, new: _put_tile(old, new, tile, final)
            return tuple(jax.tree.map(write, x, of_layer(i)) for i, x in enumerate(halves))

        base = jnp.maximum(self.base, jnp.minimum(c.quantised_end(self.position), encoded))
        shift = (base - self.base)[:, None]
        kept = jnp.minimum(jnp.arange(c.tail) + shift, c.tail - 1)
        exact = self.exact.compact(jnp.full_like(base, c.sink), kept)
        k, v = put(self.k, tiles[0]), put(self.v, tiles[1])
        return self.replace(exact=exact, k=k, v=v, base=base, encoded=encoded)

    def _exact_rows(self, first: Array) -> tuple[Array, Array]:
        """A tile of all layers from places first[b] of the exact slots: k, v [L, B, G, tile, D]."""
        c = self.config

        def cut(x: Array, axis: int) -> Array:
            one = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, c.tile, axis)
            return jax.vmap(one)(x, first)

        slots = [layer.read(0, c.exact_slots) for layer in self.exact.layers]
        if self.exact.keys_transposed:
            k = [cut(x.k, -1).swapaxes(-1, -2) for x in slots]
        else:
            k = [cut(x.k, -2) for x in slots]
        return jnp.stack(k), jnp.stack([cut(x.v, -2) for x in slots])


def tiles_per_chunk(config: KVCacheConfig, tiles: int) -> int:
    """How many of a cache's tiles attention reads at a time."""
    return max(1, min(KV_CHUNK // config.tile, tiles))


def resumable(cache: Any, at: int, length: int) -> int:
    """How many of `length` slots of sequence `at` a prefill can continue: all, or fewer.

    Of a quantised cache the exact slots before that position must still be there. Where they are
    not, the sink is.
    """
    if not isinstance(cache, QuantisedCache):
        return length
    c, base = cache.config, int(to_host(cache.base)[at])
    return length if c.quantised_end(length) >= base else min(length, c.sink)


def _put_tile(old: Array, new: Array, tile: Array, final: Array) -> Array:
    """old [B, G, T, ...] with new [B, G, ...] as tile int32[B], where final bool[B]."""

    def one(old: Array, new: Array, tile: Array, final: Array) -> Array:
        there = jax.lax.dynamic_slice_in_dim(old, tile, 1, axis=1)
        new = jnp.where(final, new[:, None], there)
        return jax.lax.dynamic_update_slice_in_dim(old, new, tile, axis=1)

    return jax.vmap(one)(old, new, tile, final)
