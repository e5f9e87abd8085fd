"""The cache of the fake models: it keeps the tokens themselves. Knows no model."""

import jax
import jax.numpy as jnp
from flax import struct


class TokenCache(struct.PyTreeNode):
    """int32[B, S]: the token whose keys and values each slot would hold; -1 where never written."""

    tokens: jax.Array

    @classmethod
    def empty(cls, batch: int, slots: int) -> "TokenCache":
        return cls(jnp.full((batch, slots), -1, jnp.int32))

    def compact(self, first: jax.Array, rows: jax.Array) -> "TokenCache":
        def move(tokens, first, rows):
            window = jax.lax.dynamic_slice_in_dim(tokens, first, rows.shape[0])
            return jax.lax.dynamic_update_slice_in_dim(tokens, window[rows], first, 0)

        return TokenCache(jax.vmap(move)(self.tokens, first, rows))

    def commit(self, position: jax.Array) -> "TokenCache":
        del position
        return self

    def insert(self, row: "TokenCache", at: jax.Array) -> "TokenCache":
        put = jax.lax.dynamic_update_slice_in_dim
        return TokenCache(put(self.tokens, row.tokens, at, axis=0))

    def extract(self, at: jax.Array) -> "TokenCache":
        return TokenCache(jax.lax.dynamic_slice_in_dim(self.tokens, at, 1))


def seen_tokens(cache: TokenCache, ends: jax.Array, tree_mask) -> tuple[jax.Array, jax.Array]:
    """What T rows or blocks see, in the order of positions: int32[B, T, S], and how many [B, T].

    `ends` [B, T] is the slot up to which each sees all, where there is no `tree_mask`.
    """
    slots = jnp.arange(cache.tokens.shape[1])
    seen = slots < ends[..., None]
    if tree_mask is not None:  # slot by slot, without the code of attention/ that this may test
        first = tree_mask.first[:, None, None]
        mark = lambda seen, marks, at: jax.lax.dynamic_update_slice(seen, marks, (0, at))
        seen = jnp.broadcast_to(slots < first, seen.shape)
        seen = jax.vmap(mark)(seen, tree_mask.mask, tree_mask.first)
    order = jnp.argsort(~seen, axis=2, stable=True)
    tokens = jnp.broadcast_to(cache.tokens[:, None], seen.shape)
    return jnp.take_along_axis(tokens, order, axis=2), seen.sum(axis=2)
