"""Who sees what, and the shared KV cache. Knows no weights."""

from orthrus_jax.attention.attend import MANY_SLOTS, SLOT_STEP, Branches, attend, attend_blocks
from orthrus_jax.attention.cache import KVCache, LayerCache

__all__ = [
    "MANY_SLOTS",
    "SLOT_STEP",
    "Branches",
    "KVCache",
    "LayerCache",
    "attend",
    "attend_blocks",
]
