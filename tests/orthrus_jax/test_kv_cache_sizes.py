"""Bytes of a quantised cache: by the compiler's own account, by shapes, and by the formula."""

import jax
import jax.numpy as jnp
import pytest

from orthrus_jax import decoding
from orthrus_jax.attention.kv_config import PRESETS as KINDS
from orthrus_jax.config import PRESETS, ModelConfig
from orthrus_jax.memory import decoding_bytes
from orthrus_jax.model import Model
from tests.support.configs import tiny_config

TOKEN = {"k4v4": 140, "k4v2": 108, "k2v2": 76}  # bytes per token and head, keys and values


def formula(config: ModelConfig, kind: str, batch: int, slots: int) -> int:
    """Tiles (in fours), 512 exact slots, the table of rotary angles, three counters."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    tiles = -(-(slots // 128 - 1) // 4) * 4
    exact = 512 * 2 * config.head_dim * jnp.dtype(config.dtype).itemsize
    per_sequence = heads * (tiles * 128 * TOKEN[kind] + exact) + 3 * 4
    return batch * per_sequence + slots * config.head_dim * 4


@pytest.mark.parametrize("kind", TOKEN)
@pytest.mark.parametrize("size", ["qwen3-0.6b", "qwen3-8b"])
def test_shapes_have_the_bytes_of_the_formula(kind: str, size: str) -> None:
    config = PRESETS[size]
    for batch, slots in ((1, 40_960), (4, 32_768), (2, 1024)):
        cache = jax.eval_shape(
            lambda b=batch, s=slots: Model(config, kv_cache=KINDS[kind]).init_cache(b, s)
        )
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert held == formula(config, kind, batch, slots)
    rows = 32
    needed = decoding_bytes(Model(config, kv_cache=KINDS[kind]), 1, 32_768, rows)
    assert needed == formula(config, kind, 1, 32_768) + rows * (4 * config.vocab_size + rows)


def test_gibibytes_of_qwen3_8b_are_those_of_the_design() -> None:
    for kind, gib in {"k4v4": 1.30, "k4v2": 1.02, "k2v2": 0.74}.items():
        assert formula(PRESETS["qwen3-8b"], kind, 1, 32_768) / 2**30 == pytest.approx(gib, abs=0.02)


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_loop_holds_the_bytes_of_the_formula(batch: int) -> None:
    config, slots = tiny_config(head_dim=128, num_hidden_layers=1, dtype="bfloat16"), 1024
    model = Model(config, kv_cache=KINDS["k4v2"])
    vector = jax.ShapeDtypeStruct((batch,), jnp.int32)
    ids = lambda width: jax.ShapeDtypeStruct((batch, width), jnp.int32)
    weights = jax.eval_shape(model.init, jax.random.key(0))
    read = lambda *args: decoding.prefill(model, *args, slots=slots, max_new_tokens=8)
    state = jax.eval_shape(read, weights, ids(16), vector, vector, ids(2))
    memory = decoding.ar_decode.lower(model, weights, state).compile().memory_analysis()
    of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    rest = (
        of(weights) - of(weights.get("layers_0")["self_attn_diff"]) + of(state.replace(cache=None))
    )
    held = memory.argument_size_in_bytes - rest
    expected = formula(config, "k4v2", batch, slots)
    assert abs(held - expected) < 0.02 * expected  # arrays are padded to whole lines
