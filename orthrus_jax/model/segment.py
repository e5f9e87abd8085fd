"""Segments: the rows of one forward pass. A run of token rows, and the view they attend by.

Decoding, drafting, training and evaluation describe a forward by its segments; only the transformer
knows how one is computed.
"""

import enum

import jax
import jax.numpy as jnp
from flax import struct

from orthrus_jax.attention.visibility import TreeMask

Array = jax.Array


class View(enum.Enum):
    """Whose attention weights a segment uses, and what its rows may see."""

    AR = "ar"
    DIFFUSION = "diffusion"


class Segment(struct.PyTreeNode):
    """A run of token rows with one view.

    Attributes:
      tokens: int32[B, T].
      positions: int32[B, T], the rotary position of each row. An AR segment's rows lie in
        consecutive cache slots from its first row's position on; without a `tree_mask` the
        positions are those slots. A diffusion segment's are consecutive within a block.
      view: whose attention.
      block: rows of a diffusion block; T is a multiple of it. Unused by AR segments.
      start: int32[B, T] or None: the first slot each row may see, where several documents are
        packed into a row. None is slot 0.
      max_kv_len: an upper bound, static, on the slots these rows see; None is the whole cache. It
        saves work and never changes a result.
      padding: rows at the end that stand for no token: they see what the row before them sees, and
        their keys and values are not written.
      tree_mask: in a tree of drafts. Each row, or block, sees the slots below `tree_mask.first` and
        those marked; an AR row marks itself.
    """

    tokens: Array
    positions: Array
    view: View = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False, default=0)
    start: Array | None = None
    max_kv_len: int | None = struct.field(pytree_node=False, default=None)
    padding: int = struct.field(pytree_node=False, default=0)
    tree_mask: TreeMask | None = None


def padded(segment: Segment, rows: int) -> Segment:
    """An AR segment without a tree, its last row repeated up to `rows` rows: see `padding`."""
    more = rows - segment.tokens.shape[1]
    repeat = lambda x: jnp.pad(x, ((0, 0), (0, more)), mode="edge")
    start = None if segment.start is None else repeat(segment.start)
    tokens, positions = repeat(segment.tokens), repeat(segment.positions)
    return segment.replace(tokens=tokens, positions=positions, start=start, padding=more)


def ar_segment(tokens: Array, first: Array, *, max_kv_len: int | None = None) -> Segment:
    """AR rows `tokens` [B, T] at consecutive positions from `first` [B]."""
    positions = first[:, None] + jnp.arange(tokens.shape[1])
    return Segment(tokens, positions, View.AR, max_kv_len=max_kv_len)


def block_segment(anchor: Array, first: Array, block: int, mask_token_id: int) -> Segment:
    """One block per sequence: [anchor, MASK x (block - 1)] at positions from `first` [B] on."""
    masks = jnp.full((anchor.shape[0], block - 1), mask_token_id, anchor.dtype)
    positions = first[:, None] + jnp.arange(block)
    tokens = jnp.concatenate([anchor[:, None], masks], axis=1)
    return Segment(tokens, positions, View.DIFFUSION, block=block)
