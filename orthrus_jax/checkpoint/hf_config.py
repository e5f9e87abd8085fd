"""config.json, read and written: Hugging Face's spelling of a ModelConfig, family by family.

Decides which families are read. Refuses by name every setting that this code does not compute: a
setting that is silently ignored gives silently wrong text. Knows no tensors.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from orthrus_jax.checkpoint.directory import read_json
from orthrus_jax.checkpoint.settings import check_types
from orthrus_jax.config import QWEN3_MASK_TOKEN_ID, ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.values import check_type

Raw = dict[str, Any]  # a config.json
ORTHRUS = "OrthrusLM"  # in `architectures`: the checkpoint holds a diffusion view
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is read and written.

    Attributes:
      architectures: those accepted; the first is written for a base model.
      switches: the fields of ModelConfig that this family sets, with their values.
      refused: by name of a setting, whether a config.json gives it an unsupported value.
    """

    architectures: tuple[str, ...]
    switches: Mapping[str, bool]
    refused: Mapping[str, Callable[[Raw], bool]]


_QWEN3 = Family(
    architectures=("Qwen3ForCausalLM", ORTHRUS),
    switches={"qk_norm": True, "attention_bias": False},
    refused={
        "rope_scaling": lambda raw: (
            bool(raw.get("rope_scaling")) and _rope_types(raw) != {"default"}
        ),
        "rope_parameters": lambda raw: (
            not raw.get("rope_scaling") and _rope_types(raw) != {"default"}
        ),
        "partial_rotary_factor": lambda raw: _rotary_factor(raw) != 1.0,
        "use_sliding_window": lambda raw: bool(raw.get("use_sliding_window")),
        "layer_types": lambda raw: bool(_other_layer_types(raw)),
        "attention_bias": lambda raw: bool(raw.get("attention_bias")),
        "mlp_bias": lambda raw: bool(raw.get("mlp_bias")),
        "hidden_act": lambda raw: raw.get("hidden_act", "silu") != "silu",
        "quantization_config": lambda raw: raw.get("quantization_config") is not None,
    },
)
FAMILIES: dict[str, Family] = {"qwen3": _QWEN3, "orthrus": _QWEN3}
"""Every family that is read, by `model_type`. Orthrus releases use either of the two."""


class ConfigFile(NamedTuple):
    """A config.json that was read.

    Attributes:
      config: sizes and switches.
      orthrus: whether its architecture has a diffusion view.
    """

    config: ModelConfig
    orthrus: bool


def read_config(directory: str | pathlib.Path) -> ConfigFile:
    """Read config.json, and generation_config.json if present, of a checkpoint directory.

    Raises:
      UserError: naming the directory, when a file is missing or damaged or a setting is refused.
    """
    directory = pathlib.Path(directory)
    generation = directory / "generation_config.json"
    try:
        raw = read_json(directory / "config.json")
        config = config_from_hf(raw, read_json(generation) if generation.exists() else None)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    return ConfigFile(config, ORTHRUS in (raw.get("architectures") or []))


def config_from_hf(raw: Raw, generation: Raw | None = None) -> ModelConfig:
    """Turn the dictionary of a config.json into a ModelConfig.

    Args:
      raw: config.json. Both spellings of the rotary base (`rope_theta`, `rope_parameters`) and both
        `model_type`s of Orthrus releases ("qwen3", "orthrus") are read.
      generation: generation_config.json, if there is one. Its EOS ids take precedence: a base Qwen3
        names both of its EOS ids only there.

    Raises:
      UserError: naming every unsupported or missing setting at once.
    """
    check_type("config.json", raw, dict, "an object")
    check_types(raw)
    check_types(generation or {}, "generation_config.json: ")
    family = FAMILIES.get(str(raw.get("model_type")))
    refused = _unsupported(raw, family)
    if refused or family is None:
        raise UserError("config.json asks for what is not supported: " + "; ".join(refused))
    missing = [name for name in SIZES if name not in raw]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    wrong = [f"{name}={raw[name]!r}" for name in SIZES if type(raw[name]) is not int]
    if wrong:
        raise UserError(f"config.json: expected whole numbers, found {', '.join(wrong)}")
    mask = raw.get("mask_token_id")
    if mask is None and raw["vocab_size"] > QWEN3_MASK_TOKEN_ID:
        mask = QWEN3_MASK_TOKEN_ID
    theta: Any = _rope(raw).get("rope_theta", raw.get("rope_theta", 10_000.0))
    return ModelConfig(
        **{name: raw[name] for name in SIZES},
        **family.switches,
        rope_theta=float(theta) if type(theta) is int else theta,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=raw.get("max_position_embeddings", 40_960),
        eos_token_ids=_eos_ids(generation or {}) or _eos_ids(raw),
        block_size=raw.get("block_size", 32),
        mask_token_id=mask,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
    )


def config_to_hf(config: ModelConfig, *, orthrus: bool) -> Raw:
    """Return the dictionary of a config.json: a base model's, or the published Orthrus layout.

    `rope_theta` is written in both spellings: transformers before 5 reads only the old one and
    would silently fall back to another base.

    Raises:
      UserError: when no family in the table has the config's switches.
    """
    model_type, family = _family_of(config)
    eos = config.eos_token_ids
    raw: Raw = {
        "architectures": [ORTHRUS if orthrus else family.architectures[0]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in SIZES},
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "dtype": config.dtype,
        "mask_token_id": config.mask_token_id,
    }
    if orthrus:
        raw["block_size"] = config.block_size
    return raw


def _family_of(config: ModelConfig) -> tuple[str, Family]:
    for model_type, family in FAMILIES.items():
        if all(getattr(config, name) == value for name, value in family.switches.items()):
            return model_type, family
    switches = sorted({name for family in FAMILIES.values() for name in family.switches})
    values = ", ".join(f"{name}={getattr(config, name)!r}" for name in switches)
    raise UserError(f"no config.json of {', '.join(FAMILIES)} describes a model with {values}")


def _unsupported(raw: Raw, family: Family | None) -> list[str]:
    """List, as `name=value`, every setting whose meaning this code does not implement."""
    names = [] if family else ["model_type"]
    family = family or _QWEN3  # one message names every obstacle, not the type alone
    if any(name not in family.architectures for name in raw.get("architectures") or []):
        names.append("architectures")
    names += [name for name, is_unsupported in family.refused.items() if is_unsupported(raw)]
    shown = {"layer_types": _other_layer_types(raw), "partial_rotary_factor": _rotary_factor(raw)}
    values = {**raw, **shown}
    return [f"{name}={values.get(name)!r}" for name in names]


def _rope(raw: Raw) -> dict[str, Any]:
    return raw.get("rope_parameters") or {}


def _rope_types(raw: Raw) -> set[str]:
    spellings = (raw.get("rope_scaling") or {}, _rope(raw))
    return {spelling.get("rope_type", spelling.get("type", "default")) for spelling in spellings}


def _rotary_factor(raw: Raw) -> Any:
    return _rope(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))


def _other_layer_types(raw: Raw) -> list[str]:
    return sorted(set(raw.get("layer_types") or []) - {"full_attention"})


def _eos_ids(raw: Raw) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
