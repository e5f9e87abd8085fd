"""The tiny configuration of most tests, and end tokens that no vocabulary has."""

import jax.numpy as jnp

from orthrus_jax.config import ModelConfig

NO_EOS = jnp.array([-1, -1, -1], jnp.int32)


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
