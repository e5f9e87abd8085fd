"""Who sees which slots: a range per row, and the ancestors of a row in a tree of drafts.

Visibility follows from positions alone, and on a tree from ancestors. Knows no keys and no weights.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


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


def visible_slots(
    slots: Array, start: Array | None, end: Array, repeat: int, branches: Branches | None = None
) -> Array:
    """bool[B, 1, T * repeat, S]: which of `slots` [S] each of T rows sees."""
    inside = slots < end[..., None]
    if start is not None:
        inside &= slots >= start[..., None]
    if branches is not None:
        inside |= branches.among(slots)
    return jnp.repeat(inside, repeat, axis=1)[:, None]
