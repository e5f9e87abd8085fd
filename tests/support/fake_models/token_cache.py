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

    def insert(self, row: "TokenCache", at: jax.Array) -> "TokenCache":
        put = jax.lax.dynamic_update_slice_in_dim
        return TokenCache(put(self.tokens, row.tokens, at, axis=0))


def seen_tokens(cache: TokenCache, ends: jax.Array, branches) -> tuple[jax.Array, jax.Array]:
    """What T rows or blocks see, in the order of positions: int32[B, T, S], and how many [B, T].

    `ends` [B, T] is the slot up to which each sees all, where there are no `branches`.
    """
    slots = jnp.arange(cache.tokens.shape[1])
    seen = slots < ends[..., None]
    if branches is not None:  # its own slots one by one, so that attention.py is not needed to test
        first = branches.first[:, None, None]
        mark = lambda seen, marks, at: jax.lax.dynamic_update_slice(seen, marks, (0, at))
        seen = jnp.broadcast_to(slots < first, seen.shape)
        seen = jax.vmap(mark)(seen, branches.seen, branches.first)
    order = jnp.argsort(~seen, axis=2, stable=True)
    tokens = jnp.broadcast_to(cache.tokens[:, None], seen.shape)
    return jnp.take_along_axis(tokens, order, axis=2), seen.sum(axis=2)
