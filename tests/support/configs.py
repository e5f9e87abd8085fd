"""The tiny configuration of most tests, its families, and end tokens that no vocabulary has."""

import jax.numpy as jnp

from orthrus_jax.config import Llama3Rope, ModelConfig

NO_EOS = jnp.array([-1, -1, -1], jnp.int32)
# By name, the changes of tiny_config that make it one of a family.
FAMILIES: dict[str, dict] = {
    "qwen3": {},
    "qwen2": {"model_type": "qwen2", "qk_norm": False, "attention_bias": True},
    "llama": {"model_type": "llama", "qk_norm": False},
    "llama3": {  # of 8 frequencies one stays, some are interpolated, some divided
        "model_type": "llama",
        "qk_norm": False,
        "rope_theta": 500.0,
        "rope_scaling": Llama3Rope(8.0, 1.0, 4.0, 48),
    },
    "mistral": {"model_type": "mistral", "qk_norm": False},
}


def tiny_config(**changes) -> ModelConfig:
    """Two layers, 64 tokens, float32; K = 4."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "eos_token_ids": (),
        "block_size": 4,
        "mask_token_id": 63,
        "dtype": "float32",
    }
    return ModelConfig(**(sizes | changes))


def text_config(**changes) -> ModelConfig:
    """One narrow layer for a `small_tokenizer` of 400 ids: 256 positions, float32; K = 5."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_ids": (2,),
        "block_size": 5,
        "mask_token_id": 399,
        "dtype": "float32",
    }
    return ModelConfig(**(sizes | changes))
