"""GGUF files of small models, by the gguf library's own writer."""

import pathlib

import gguf
import jax.numpy as jnp
import numpy as np

from orthrus_jax.checkpoint import tensor_specs
from orthrus_jax.checkpoint.gguf_model import hf_name
from orthrus_jax.config import ModelConfig

SCALES = {10: (80, 84), 11: (108, 110), 12: (0, 4), 13: (0, 4), 14: (208, 210)}  # bytes of float16
PLAIN = {  # a byte-level vocabulary of the 256 bytes and two control tokens
    "model": "gpt2",
    "pre": "gpt-2",
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of a base under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=spec.shape) / spec.shape[-1] ** 0.5).astype(np.float32)
        if len(spec.shape) > 1
        else rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        for name, spec in tensor_specs(config, diffusion=False).items()
    }


def gguf_name(name: str) -> str:
    """The inverse of `hf_name`, found among the names of a file."""
    parts = name.split(".")
    blocks = ["token_embd", "output_norm", "output"]
    if "layers" in parts:
        kinds = ["attn_norm", "ffn_norm", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        kinds += [f"attn_{x}{norm}" for x in "qkv" for norm in ("", "_norm")]
        blocks = [f"blk.{parts[2]}.{kind}" for kind in kinds]
    every = [f"{block}.{kind}" for block in blocks for kind in ("weight", "bias")]
    return next(candidate for candidate in every if hf_name(candidate) == name)


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in llama.cpp's order: a head's halves become pairs."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def encoded(array: np.ndarray, kind: int, rng: np.random.Generator) -> np.ndarray:
    """A tensor's bytes; of K-quants, which the library does not write, random blocks."""
    if kind not in SCALES:
        return gguf.quantize(array, gguf.GGMLQuantizationType(kind))
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    blocks = rng.integers(0, 256, (array.size // elements, size), dtype=np.uint8)
    first, last = SCALES[kind]
    scales = rng.uniform(0.0005, 0.001, (len(blocks), (last - first) // 2)).astype(np.float16)
    blocks[:, first:last] = scales.view(np.uint8)
    return blocks.reshape(*array.shape[:-1], -1)


def bytes_alphabet() -> list[str]:
    """The 256 bytes as byte-level BPE writes them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]


def write_gguf(
    path: pathlib.Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    kinds: tuple[int, ...] = (0,),
    *,
    settings: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    tokenizer: dict[str, object] | None = None,
    template: str | None = "{{ messages[0]['content'] }}",
) -> pathlib.Path:
    """Write a model as llama.cpp's converter does.

    Args:
      path: of the file.
      config: of the model; a Mistral is written as a Llama.
      tensors: under Hugging Face's names.
      kinds: of the matrices, in turn.
      settings: metadata after the architecture's name; None as a value leaves one out.
      extra: float32 tensors under the file's own names.
      tokenizer: metadata after tokenizer.ggml; None is PLAIN with the bytes as tokens.
      template: the chat template.
    """
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    own: dict[str, object] = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    for key, value in (own | (settings or {})).items():
        if value is not None:
            add(writer, f"{architecture}.{key}", value)
    plain = PLAIN | {
        "tokens": [*bytes_alphabet(), "<|begin|>", "<|end|>", "<|spare|>", "ab"],
        "token_type": [1] * 256 + [3] * 3 + [1],
        "merges": ["a b"],
    }
    for key, value in (plain if tokenizer is None else tokenizer).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    if template is not None:
        add(writer, "tokenizer.chat_template", template)
    rng, matrices = np.random.default_rng(1), 0
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, array in tensors.items():
        kind = 0
        if array.ndim > 1:
            kind, matrices = kinds[matrices % len(kinds)], matrices + 1
            if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                array = permuted(array, heads[name[-13]])
        data = encoded(np.ascontiguousarray(array), kind, rng)
        dtype = gguf.GGMLQuantizationType(kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=None if kind in (0, 1) else dtype)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add a value of metadata with the type that llama.cpp gives it."""
    method = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{method[type(value)]}")(key, value)


def rope_factors(config: ModelConfig) -> np.ndarray:
    """llama.cpp's rope_freqs of a Llama 3: by what each frequency is divided."""
    from orthrus_jax.attention.rotary import rope_frequencies

    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return np.asarray(jnp.asarray(plain / scaled), np.float32)
