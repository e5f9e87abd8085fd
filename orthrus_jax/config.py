"""ModelConfig: the sizes of a Qwen3 with a diffusion view, read from and written to config.json.

Field names are Hugging Face's. Everything a config.json can ask for that this code does not compute
is refused by name: a setting that is silently ignored gives silently wrong text.
"""

import dataclasses
import json
import pathlib
from typing import Any

from orthrus_jax.errors import UserError

QWEN3_MASK_TOKEN_ID = 151_669  # the first id past Qwen3's tokenizer: a row no text ever uses
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model. Hashable: a static argument of every compiled program.

    `block_size` is K, the rows of a diffusion block (K - 1 drafts a cycle). `mask_token_id` is None
    for a base model whose vocabulary has no row known to be unused; drafting then is refused.
    `dtype` is that of weights and activations; rotary angles, norm statistics, softmax and logits
    are float32 whatever it is.
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
    max_position_embeddings: int = 40_960
    eos_token_ids: tuple[int, ...] = (151_645, 151_643)
    block_size: int = 32
    mask_token_id: int | None = QWEN3_MASK_TOKEN_ID
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have.

        Raises:
          UserError: naming the field, its value and what it must satisfy.
        """
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.block_size < 2:
            raise UserError(f"block_size={self.block_size}: a block needs an anchor and one mask")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(
                f"mask_token_id={self.mask_token_id} has no row in an embedding of "
                f"{self.vocab_size} rows (vocab_size)"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")

    @classmethod
    def from_hf(
        cls, raw: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """Read the dictionary of a config.json, of a Qwen3 or of an Orthrus checkpoint.

        Args:
          raw: config.json. Both spellings of the rotary base (`rope_theta`, `rope_parameters`) and
            both `model_type`s of Orthrus releases ("qwen3", "orthrus") are read.
          generation: generation_config.json where there is one; its EOS ids win, because a base
            Qwen3 names both of its EOS ids only there.

        Raises:
          UserError: naming every unsupported or missing setting at once.
        """
        refused = _unsupported(raw)
        if refused:
            raise UserError("config.json asks for what is not supported: " + "; ".join(refused))
        missing = [name for name in _REQUIRED if name not in raw]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        wrong = [f"{name}={raw[name]!r}" for name in _REQUIRED if type(raw[name]) is not int]
        if wrong:
            raise UserError(f"config.json: expected whole numbers, found {', '.join(wrong)}")
        mask = raw.get("mask_token_id")
        if mask is None and raw["vocab_size"] > QWEN3_MASK_TOKEN_ID:
            mask = QWEN3_MASK_TOKEN_ID
        return cls(
            **{name: raw[name] for name in _REQUIRED},
            rope_theta=float(_rope(raw).get("rope_theta", raw.get("rope_theta", 10_000.0))),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=raw.get("max_position_embeddings", 40_960),
            eos_token_ids=_eos_ids(generation or {}) or _eos_ids(raw),
            block_size=raw.get("block_size", 32),
            mask_token_id=mask,
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        )

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "ModelConfig":
        """Read config.json, and generation_config.json where present, of a checkpoint directory."""
        directory = pathlib.Path(directory)
        generation = directory / "generation_config.json"
        try:
            return cls.from_hf(
                read_json(directory / "config.json"),
                read_json(generation) if generation.exists() else None,
            )
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None

    def to_hf(self, *, orthrus: bool) -> dict[str, Any]:
        """Return the dictionary of a config.json: a plain Qwen3's, or the published Orthrus layout.

        `rope_theta` is written in both spellings: transformers before 5 reads only the old one and
        would fall back to another base without a word.
        """
        eos = self.eos_token_ids
        raw: dict[str, Any] = {
            "architectures": ["OrthrusLM" if orthrus else "Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **{name: getattr(self, name) for name in _REQUIRED},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            "dtype": self.dtype,
            "mask_token_id": self.mask_token_id,
        }
        if orthrus:
            raw["block_size"] = self.block_size
        return raw


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
      UserError: when the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: expected a Hugging Face checkpoint there"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("rope_parameters") or {}


def _eos_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _unsupported(raw: dict[str, Any]) -> list[str]:
    """List, as `name=value`, every setting whose meaning this code does not implement."""
    scaling = raw.get("rope_scaling") or {}
    rope_types = {d.get("rope_type", d.get("type", "default")) for d in (scaling, _rope(raw))}
    layer_types = set(raw.get("layer_types") or []) - {"full_attention"}
    checks = {
        "model_type": raw.get("model_type") not in ("qwen3", "orthrus"),
        "architectures": bool(
            set(raw.get("architectures") or []) - {"Qwen3ForCausalLM", "OrthrusLM"}
        ),
        "rope_scaling": bool(scaling) and rope_types != {"default"},
        "rope_parameters": rope_types != {"default"} and not scaling,
        "partial_rotary_factor": _rope(raw).get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "layer_types": bool(layer_types),
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "quantization_config": raw.get("quantization_config") is not None,
    }
    shown = {**raw, "layer_types": sorted(layer_types)}
    return [f"{name}={shown.get(name)!r}" for name, bad in checks.items() if bad]


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
    """The preset that a directory or hub id is named after.

    Raises:
      UserError: when it is named after none.
    """
    name = base.split("/")[-1].lower()
    if name not in PRESETS:
        raise UserError(f"the base {base!r} is not of {', '.join(PRESETS)}")
    return PRESETS[name]
