"""The two signatures of attention, and the table of their implementations.

Two shapes of visibility cover the whole project: a row that sees a range of slots (prefill, AR
decoding, verification), and a block that sees a range of slots and itself (drafting, training). In
a tree of drafts, either also sees its ancestors. Knows no weights, no views and no cache layout.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from orthrus_jax.attention import pallas, xla
from orthrus_jax.attention.cache import LayerCache
from orthrus_jax.attention.quantised import QuantisedLayer
from orthrus_jax.attention.visibility import TreeMask
from orthrus_jax.errors import UserError

Array = jax.Array


class Implementation(NamedTuple):
    """`attend` and `attend_blocks` of one implementation: all arguments positional."""

    attend: Callable[..., Array]
    attend_blocks: Callable[..., Array]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(xla.attend, xla.attend_blocks),  # the reference
    "pallas": Implementation(pallas.attend, pallas.attend_blocks),  # a GPU's
}


def default_implementation(mesh: Mesh | None) -> str:
    """The implementation that is best on the devices of a mesh, or on this machine's."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return "pallas" if device.platform in ("gpu", "cuda") else "xla"


def implementation_of(name: str) -> Implementation:
    """Look up an implementation.

    Raises:
      UserError: for an unknown name; lists the known ones.
    """
    if name not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise UserError(f"attention={name} is unknown; known: {known}")
    return IMPLEMENTATIONS[name]


def _implementation_for(name: str, slots: LayerCache | QuantisedLayer) -> Implementation:
    """Tiles are read by the reference; no kernel unpacks them yet."""
    of_name = implementation_of(name)
    return IMPLEMENTATIONS["xla"] if isinstance(slots, QuantisedLayer) else of_name


def attend(
    q: Array,
    slots: LayerCache | QuantisedLayer,
    start: Array | None,
    end: Array,
    kv_len: Array | None = None,
    *,
    max_kv_len: int | None = None,
    tree_mask: TreeMask | None = None,
    mesh: Mesh | None = None,
    implementation: str = "xla",
) -> Array:
    """Each query row sees the slots start <= s < end, and those that `tree_mask` marks.

    Scores and softmax are float32. Two implementations may differ by rounding, but slots that a row
    does not see must not change a bit of its output.

    Args:
      q: [B, T, H, D]; its H heads read the G key heads in order, H/G per key head.
      slots: S slots of G key heads.
      start: int32[B, T], or None for 0.
      end: int32[B, T], at least start + 1 unless `tree_mask` marks a slot.
      kv_len: int32[], no row sees a slot from here on. Known at run time only: the length of the
        longest live sequence, which the work should follow. None is S and means training: the
        result must then have a gradient for q, and needs none for the slots.
      max_kv_len: the same bound, static; None is S.
      tree_mask: for each of the T rows, with a `kv_len`.
      mesh: the devices that the arrays are shared out over, if there are several.
      implementation: a name in IMPLEMENTATIONS, static.

    Returns:
      [B, T, H, D] in q's dtype.

    Raises:
      UserError: for an unknown implementation.
    """
    function = _implementation_for(implementation, slots).attend
    return function(q, slots, start, end, kv_len, max_kv_len, tree_mask, mesh)


def attend_blocks(
    q: Array,
    slots: LayerCache | QuantisedLayer,
    own_k: Array,
    own_v: Array,
    start: Array | None,
    end: Array,
    kv_len: Array | None = None,
    *,
    max_kv_len: int | None = None,
    tree_mask: TreeMask | None = None,
    mesh: Mesh | None = None,
    implementation: str = "xla",
) -> Array:
    """Each row of a block sees what `attend` shows the block, and every row of its own block.

    Slots and block share one softmax. No score between two blocks is ever formed.

    Args:
      q: [B, A, K, H, D]: A blocks of K rows.
      slots: S slots of G key heads, which all blocks choose from.
      own_k, own_v: [B, A, K, G, D], the blocks' own keys and values.
      start: int32[B, A], or None for 0.
      end: int32[B, A]; end = start is a block that sees only itself.
      kv_len: as of `attend`; without it, own_k and own_v have gradients too.
      max_kv_len, mesh, implementation: as of `attend`.
      tree_mask: for each of the A blocks, with a `kv_len`.

    Returns:
      [B, A, K, H, D] in q's dtype.

    Raises:
      UserError: for an unknown implementation.
    """
    function = _implementation_for(implementation, slots).attend_blocks
    return function(q, slots, own_k, own_v, start, end, kv_len, max_kv_len, tree_mask, mesh)
