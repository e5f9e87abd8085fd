"""A small config.json of Qwen3, of an Orthrus, and of other families."""

RAW = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "eos_token_id": 7,
    "torch_dtype": "float32",
}
ORTHRUS = RAW | {"architectures": ["OrthrusLM"], "block_size": 16, "mask_token_id": 990}


def without(*names: str) -> dict:
    """RAW without some keys."""
    return {name: value for name, value in RAW.items() if name not in names}


def of_family(name: str, *absent: str) -> dict:
    """RAW as a config.json of another family, without some keys."""
    raw = without("architectures", *absent) | {"model_type": name}
    return raw | ({"sliding_window": None} if name == "mistral" else {})
