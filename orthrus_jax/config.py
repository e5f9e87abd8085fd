"""ModelConfig: the sizes and switches of one network, and the released sizes of Qwen3.

Refuses values that no network can have. Knows no files: checkpoint/hf_config.py reads and writes
config.json.
"""

import dataclasses
import math
from typing import Any

from orthrus_jax.errors import UserError

QWEN3_MASK_TOKEN_ID = 151_669  # the first id past Qwen3's tokenizer: a row no text ever uses
INT32 = 2**31 - 1  # sizes and ids are int32 on a device
LAYERS_LIMIT = 1024  # a program names every layer's weights: more would take minutes to trace
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's scaling of the rotary frequencies, for contexts beyond those of the pretraining.

    A frequency whose wavelength is under original_max_position_embeddings / high_freq_factor
    positions stays; one over original_max_position_embeddings / low_freq_factor is divided by
    `factor`; those between are interpolated (Llama 3.1's model card; transformers' "llama3").
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """Refuse values that give no frequencies.

        Raises:
          UserError: naming the field and its value.
        """
        for field in dataclasses.fields(self):
            _check_positive(f"rope_scaling's {field.name}", getattr(self, field.name))
        if not self.high_freq_factor > self.low_freq_factor:
            raise UserError(
                f"rope_scaling's high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes, switches and constants of one network. Hashable: a static argument of every program.

    Fields that config.json has too bear its names. Families of models differ in switches alone:
      qk_norm: whether each head's queries and keys pass an RMSNorm before the rotation.
      attention_bias: whether the q, k and v projections add a bias; the o projection never does.
      rope_scaling: how the rotary frequencies are scaled; None leaves them.
    `model_type` names the family for config.json; nothing is computed from it.

    `block_size` is K, the rows of a diffusion block (K - 1 drafts per cycle). `mask_token_id` is
    None for a base model whose vocabulary has no row known to be unused; drafting then is refused.
    `dtype` is the type of weights and activations; rotary angles, norm statistics, softmax and
    logits are always float32.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    attention_bias: bool = False
    rope_scaling: Llama3Rope | None = None
    max_position_embeddings: int = 40_960
    eos_token_ids: tuple[int, ...] = (151_645, 151_643)
    block_size: int = 32
    mask_token_id: int | None = QWEN3_MASK_TOKEN_ID
    dtype: str = "bfloat16"
    model_type: str = "qwen3"

    def __post_init__(self) -> None:
        """Refuse values that no model can have.

        Raises:
          UserError: naming the field, its value and what it must satisfy.
        """
        _check_types(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.block_size < 2:
            raise UserError(f"block_size={self.block_size}: a block needs an anchor and one mask")
        if self.block_size > self.max_position_embeddings:
            raise UserError(
                f"block_size={self.block_size} is over max_position_embeddings="
                f"{self.max_position_embeddings}: a block lies within the positions"
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(
                f"mask_token_id={self.mask_token_id} has no row in an embedding of "
                f"{self.vocab_size} rows (vocab_size)"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            _check_positive(name, getattr(self, name))
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def mask_id(self) -> int:
        """The id of the MASK token, which the diffusion view reads in place of unknown tokens.

        Raises:
          UserError: when the vocabulary has no row for it.
        """
        if self.mask_token_id is None:
            raise UserError(
                "config.json names no mask_token_id, which drafting needs: name a token with "
                "orthrus_jax.convert --mask-token, or use mode ar (strategy='ar')"
            )
        return self.mask_token_id


def _check_positive(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{name}={value!r}: expected a positive finite number")


def _check_types(config: ModelConfig) -> None:
    """Refuse fields of a wrong type, and sizes that no program can have."""
    is_whole = lambda value, least: type(value) is int and least <= value <= INT32
    names = {int: f"a whole number from 1 to {INT32}", bool: "True or False", str: "a string"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in names:
            holds = is_whole(value, 1) if field.type is int else isinstance(value, field.type)
            if not holds:
                raise UserError(f"{field.name}={value!r:.60}: expected {names[field.type]}")
    mask, ends = config.mask_token_id, config.eos_token_ids
    if mask is not None and type(mask) is not int:
        raise UserError(f"mask_token_id={mask!r:.60}: expected a whole number or None")
    if not isinstance(ends, tuple) or not all(is_whole(i, 0) for i in ends):
        raise UserError(f"eos_token_ids={ends!r:.60}: expected a tuple of token ids")
    if config.num_hidden_layers > LAYERS_LIMIT:
        raise UserError(f"num_hidden_layers={config.num_hidden_layers} is over {LAYERS_LIMIT}")


def _qwen3(width: int, mlp: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )


PRESETS: dict[str, ModelConfig] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, tied=False),
}
"""The dense Qwen3 family. Source: the released config.json files; tests compare every dimension."""


def preset_of(base: str) -> ModelConfig:
    """Return the preset named by the last part of a directory or hub id.

    Raises:
      UserError: when no preset has that name.
    """
    name = base.split("/")[-1].lower()
    if name not in PRESETS:
        raise UserError(f"the base {base!r} is not of {', '.join(PRESETS)}")
    return PRESETS[name]
