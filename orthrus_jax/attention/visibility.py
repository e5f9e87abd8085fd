"""Who sees which slots: a range per row, and the ancestors of a row in a tree of drafts.

Visibility follows from positions alone, and in a tree from ancestors. Knows no keys and no weights.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class TreeMask(struct.PyTreeNode):
    """Slots that are visible one by one, in addition to a range: a tree attention mask.

    Attributes:
      first: int32[B], the first of W consecutive slots.
      mask: bool[B, T, W], which of the W slots each of T rows (or blocks) sees.
    """

    first: Array
    mask: Array

    def for_slots(self, slots: Array) -> Array:
        """bool[B, T, S]: which of the consecutive `slots` [S] each row sees."""
        count, width = slots.shape[0], self.mask.shape[2]
        padded = jnp.pad(self.mask, ((0, 0), (0, 0), (count, count)))
        begin = jnp.clip(count + slots[0] - self.first, 0, count + width)
        window = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, count, axis=1)
        return jax.vmap(window)(padded, begin)


def visible_slots(
    slots: Array, start: Array | None, end: Array, repeat: int, tree_mask: TreeMask | None = None
) -> Array:
    """bool[B, 1, T * repeat, S]: which of `slots` [S] each of T rows sees, per query head."""
    visible = slots < end[..., None]
    if start is not None:
        visible &= slots >= start[..., None]
    if tree_mask is not None:
        visible |= tree_mask.for_slots(slots)
    return jnp.repeat(visible, repeat, axis=1)[:, None]
