"""What fits a device beside the weights, by shapes alone: contexts and batches per kind of cache.

Nothing is compiled. Weights, the cache and the logits of the largest forward are counted, as when a
queue is opened (memory.py); a compiler's temporaries come on top.
"""

import bisect
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from orthrus_jax.aot.chips import Chip
from orthrus_jax.aot.programs import local_bytes, weights, with_shardings
from orthrus_jax.attention.kv_config import NAMES, kv_cache_of
from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Model

STEP = 512  # slots by which contexts are tried
MOST_SEQUENCES = 1 << 16


def room_by_cache(
    config: ModelConfig, mesh: Mesh, chip: Chip, *, batch: int, context: int
) -> dict[str, dict[str, Any]]:
    """What fits with each kind of cache.

    Returns:
      By name: "context", the longest of `batch` sequences; "batch", the largest with `context`
      slots (0 where none fits); "cache_gib", of `batch` sequences with `context` slots.
    """
    taken, limit = local_bytes(weights(config, mesh)), chip.gib * 2**30
    by_kind = {}
    for name in NAMES:
        model = Model(config, mesh, kv_cache=kv_cache_of(name))
        too_long = partial(_exceeds, model, limit - taken, batch)
        too_many = partial(_exceeds, model, limit - taken, context=context)
        contexts = range(STEP, config.max_position_embeddings + 1, STEP)
        by_kind[name] = {
            "cache_gib": cache_bytes(model, batch, context) / 2**30,
            "context": STEP * bisect.bisect_left(contexts, True, key=too_long),
            "batch": bisect.bisect_left(range(1, MOST_SEQUENCES), True, key=too_many),
        }
    return by_kind


def _exceeds(model: Model, free: float, batch: int, context: int) -> bool:
    config = model.config
    logits = 4 * batch * config.block_size * config.vocab_size
    return cache_bytes(model, batch, context) + logits > free


def cache_bytes(model: Model, batch: int, slots: int) -> int:
    """Bytes of a cache on one device."""
    cache = jax.eval_shape(lambda: model.init_cache(batch, slots))
    return local_bytes(with_shardings(cache, cache.shardings()))


def lines_of(by_kind: dict[str, dict[str, Any]]) -> list[str]:
    """The table as text."""
    lines = ["by shapes alone, without a compiler's temporaries:"]
    for name, row in by_kind.items():
        lines.append(
            f"{name:>5}: longest context {row['context']:6d}, largest batch {row['batch']:5d}, "
            f"cache {row['cache_gib']:.2f} GiB"
        )
    return lines
