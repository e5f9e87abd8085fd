"""Who sees what, and the shared KV cache. Knows no weights."""

from orthrus_jax.attention.attend import attend, attend_blocks
from orthrus_jax.attention.cache import KVCache, LayerCache
from orthrus_jax.attention.kv_config import KVCacheConfig
from orthrus_jax.attention.quantised import QuantisedCache, QuantisedLayer
from orthrus_jax.attention.visibility import TreeMask

__all__ = [
    "KVCache",
    "KVCacheConfig",
    "LayerCache",
    "QuantisedCache",
    "QuantisedLayer",
    "TreeMask",
    "attend",
    "attend_blocks",
]
