"""A GGUF file's metadata as a config.json, its tensors under Hugging Face's names and in its order.

Refuses by name every setting that this code does not compute. Knows no tokenizers; gguf_file.py
knows the bytes.
"""

import re
from typing import Any

import numpy as np

from orthrus_jax.attention.rotary import rope_frequencies
from orthrus_jax.checkpoint.gguf_file import KINDS, GgufFile
from orthrus_jax.checkpoint.hf_config import Raw, config_from_hf
from orthrus_jax.config import Llama3Rope, ModelConfig
from orthrus_jax.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3")  # of general.architecture; a Mistral is a llama there
SETTINGS = {  # after the architecture's name -> in a config.json
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
SAME_AS_HEAD = ("rope.dimension_count", "attention.value_length")
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # settings, and the values that change nothing
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling: by what each frequency is divided
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufTensors:
    """The tensors of a file under Hugging Face's names, with the methods of a safetensors file."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self.names = {hf_name(name): name for name in file.tensors if name != ROPE_FACTORS}

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(self._file.tensors[self.names[name]].shape)

    def get_tensor(self, name: str) -> np.ndarray:
        """A tensor, float32; llama's q and k rows in the order in which heads are rotated here."""
        array = self._file.read(self.names[name])
        heads = {"q": self._config.num_attention_heads, "k": self._config.num_key_value_heads}
        projection = re.search(r"\.attn_([qk])\.", self.names[name])
        if projection is None or self._file.metadata["general.architecture"] != "llama":
            return array
        # There a head's pairs lie side by side, here in its two halves.
        pairs = array.reshape(heads[projection[1]], -1, 2, *array.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


class _Slice:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"


def hf_name(name: str) -> str:
    """The name in a Hugging Face checkpoint; unknown names stay, and are then unexpected."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def gguf_config(file: GgufFile) -> ModelConfig:
    """Read a file's ModelConfig.

    Its dtype is that of all matrices if they are in one of 16 bits, else float32.

    Raises:
      UserError: naming the file and every setting that is missing or not computed.
    """
    try:
        return config_from_hf(_raw(file))
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def _raw(file: GgufFile) -> Raw:
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise UserError(
            f"general.architecture={architecture!r} is not one of {', '.join(FAMILIES)}"
        )
    own = {
        key.removeprefix(f"{architecture}."): _decimal(value)
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    raw: Raw = {SETTINGS[key]: own[key] for key in own if key in SETTINGS}
    if "head_dim" not in raw and "rope.dimension_count" in own:
        raw["head_dim"] = own["rope.dimension_count"]
    refused = [
        f"{architecture}.{key}={value!r}"
        for key, value in own.items()
        if key not in SETTINGS
        and key != "vocab_size"  # the embedding says how many rows it has
        and not (key in SAME_AS_HEAD and value == raw.get("head_dim"))
        and value not in WITHOUT_EFFECT.get(key, ())
    ]
    if refused:
        raise UserError(f"the file asks for what is not supported: {'; '.join(refused)}")
    if "token_embd.weight" not in tensors:
        raise UserError("the file holds no token_embd.weight: it is no language model")
    ids = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    raw |= {
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": list(dict.fromkeys(metadata[key] for key in ids if key in metadata)),
        "dtype": _dtype(file),
    }
    if ROPE_FACTORS in tensors:
        raw["rope_scaling"] = _llama3(file.read(ROPE_FACTORS), raw)
    return raw


def _decimal(value: Any) -> Any:
    """A float32 as the decimal number that was stored: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _dtype(file: GgufFile) -> str:
    kinds = {KINDS[tensor.kind] for tensor in file.tensors.values() if len(tensor.shape) > 1}
    one = kinds.pop() if len(kinds) == 1 else ""
    return {"F16": "float16", "BF16": "bfloat16"}.get(one, "float32")


def _llama3(factors: np.ndarray, raw: Raw) -> Raw:
    """The settings that give these divisors of the frequencies; all releases differ in one."""
    scaling = {"factor": _decimal(float(factors.max())), **LLAMA3}
    width = 2 * factors.size
    theta = raw.get("rope_theta", 10_000.0)
    if type(theta) is not float or theta <= 0:
        return scaling  # refused with the rest
    plain = rope_frequencies(width, theta, None)
    if factors.max() > 1:
        scaled = rope_frequencies(width, theta, Llama3Rope(**scaling))
        if np.allclose(plain / scaled, factors, rtol=1e-4):
            return {"rope_type": "llama3", **scaling}
    raise UserError(f"{ROPE_FACTORS} is not Llama 3's scaling of the rotary frequencies")
