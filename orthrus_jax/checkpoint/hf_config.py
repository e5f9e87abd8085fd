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
from orthrus_jax.config import QWEN3_MASK_TOKEN_ID, SIZES, Llama3Rope, ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.values import check_type

Raw = dict[str, Any]  # a config.json
ORTHRUS = "OrthrusLM"  # in `architectures`: the checkpoint holds a diffusion view
_MISTRAL_WINDOW = 4096  # of a Mistral whose config.json names none


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is read and written.

    Attributes:
      architectures: those accepted; the first is written for a base model.
      switches: the fields of ModelConfig that this family sets, with their values.
      rope_types: the scalings of the rotary frequencies that it may name.
      refused: by name of a setting, whether a config.json gives it an unsupported value.
      defaults: by name, what transformers takes for a size that is absent or null, of the others.
      mask_token_id: a row past the tokenizer of its releases, where the embedding reaches that far.
    """

    architectures: tuple[str, ...]
    switches: Mapping[str, bool]
    refused: Mapping[str, Callable[[Raw], bool]]
    rope_types: tuple[str, ...] = ("default",)
    defaults: Mapping[str, Callable[[Raw], int]] = dataclasses.field(default_factory=dict)
    mask_token_id: int | None = None


def _is_set(name: str, default: Any = None) -> Callable[[Raw], bool]:
    return lambda raw: bool(raw.get(name, default))


_REFUSED: dict[str, Callable[[Raw], bool]] = {
    "partial_rotary_factor": lambda raw: _rotary_factor(raw) != 1.0,
    "layer_types": lambda raw: bool(_other_layer_types(raw)),
    "attention_bias": _is_set("attention_bias"),  # with one on the o projection too
    "mlp_bias": _is_set("mlp_bias"),
    "hidden_act": lambda raw: raw.get("hidden_act", "silu") != "silu",
    "quantization_config": lambda raw: raw.get("quantization_config") is not None,
}
_WINDOWED = {"use_sliding_window": _is_set("use_sliding_window")}
_HEADS: dict[str, Callable[[Raw], int]] = {"head_dim": lambda sizes: _heads_part(sizes)}
_QWEN3 = Family(
    architectures=("Qwen3ForCausalLM", ORTHRUS),
    switches={"qk_norm": True, "attention_bias": False},
    refused=_REFUSED | _WINDOWED,
    mask_token_id=QWEN3_MASK_TOKEN_ID,
)
FAMILIES: dict[str, Family] = {
    "qwen3": _QWEN3,
    "orthrus": _QWEN3,
    "qwen2": Family(
        architectures=("Qwen2ForCausalLM", ORTHRUS),
        switches={"qk_norm": False, "attention_bias": True},
        refused={k: v for k, v in _REFUSED.items() if k != "attention_bias"} | _WINDOWED,
        defaults=_HEADS,
        mask_token_id=QWEN3_MASK_TOKEN_ID,
    ),
    "llama": Family(
        architectures=("LlamaForCausalLM", ORTHRUS),
        switches={"qk_norm": False, "attention_bias": False},
        rope_types=("default", "llama3"),
        refused=_REFUSED,
        defaults=_HEADS | {"num_key_value_heads": lambda sizes: sizes["num_attention_heads"]},
    ),
    "mistral": Family(
        architectures=("MistralForCausalLM", ORTHRUS),
        switches={"qk_norm": False, "attention_bias": False},
        refused=_REFUSED | {"sliding_window": _is_set("sliding_window", _MISTRAL_WINDOW)},
        defaults=_HEADS,
    ),
}
"""Every family that is read, by `model_type`. Orthrus releases use "qwen3" or "orthrus"."""


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
    model_type = str(raw.get("model_type"))
    family = FAMILIES.get(model_type)
    refused = _unsupported(raw, family)
    if refused or family is None:
        raise UserError("config.json asks for what is not supported: " + "; ".join(refused))
    sizes = _sizes(raw, family)
    mask, unused = raw.get("mask_token_id"), family.mask_token_id
    if mask is None and unused is not None and unused < sizes["vocab_size"]:
        mask = unused
    theta: Any = _rope(raw).get("rope_theta", raw.get("rope_theta", 10_000.0))
    fields: dict[str, Any] = {**sizes, **family.switches}
    return ModelConfig(
        **fields,
        rope_theta=float(theta) if type(theta) is int else theta,
        rope_scaling=_llama3(_rope(raw)) if "llama3" in _rope_types(raw).values() else None,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=raw.get("max_position_embeddings", 40_960),
        eos_token_ids=_eos_ids(generation or {}) or _eos_ids(raw),
        block_size=raw.get("block_size", 32),
        mask_token_id=mask,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        model_type="qwen3" if family is _QWEN3 else model_type,
    )


def config_to_hf(config: ModelConfig, *, orthrus: bool) -> Raw:
    """Return the dictionary of a config.json: a base model's, or the published Orthrus layout.

    `rope_theta` is written in both spellings: transformers before 5 reads only the old one and
    would silently fall back to another base.

    Raises:
      UserError: when no family in the table has the config's switches.
    """
    family = _family_of(config)
    eos, rope = config.eos_token_ids, {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
    raw: Raw = {
        "architectures": [ORTHRUS if orthrus else family.architectures[0]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SIZES},
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_scaling": rope if config.rope_scaling else None,
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


def _family_of(config: ModelConfig) -> Family:
    """The family that a config names, if a config.json of it describes the config's switches."""
    family = FAMILIES.get(config.model_type)
    rope = "llama3" if config.rope_scaling else "default"
    if (
        family is not None
        and rope in family.rope_types
        and all(getattr(config, name) == value for name, value in family.switches.items())
    ):
        return family
    names = sorted({name for family in FAMILIES.values() for name in family.switches})
    values = ", ".join(f"{name}={getattr(config, name)!r}" for name in [*names, "rope_scaling"])
    raise UserError(f"no config.json of {config.model_type} describes a model with {values}")


def _sizes(raw: Raw, family: Family) -> dict[str, int]:
    """Return the sizes, whole numbers, with the family's defaults for those absent or null."""
    sizes = {name: raw[name] for name in SIZES if name in raw}
    defaults = [name for name in family.defaults if sizes.get(name) is None]
    missing = [name for name in SIZES if name not in sizes and name not in defaults]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    wrong = [f"{k}={v!r}" for k, v in sizes.items() if k not in defaults and type(v) is not int]
    if wrong:
        raise UserError(f"config.json: expected whole numbers, found {', '.join(wrong)}")
    return sizes | {name: family.defaults[name](sizes) for name in defaults}


def _heads_part(sizes: Raw) -> int:
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if heads < 1 or width % heads:
        raise UserError(
            f"config.json lacks head_dim, and hidden_size={width} is no multiple of "
            f"num_attention_heads={heads}"
        )
    return width // heads


def _llama3(rope: Raw) -> Llama3Rope:
    names = [field.name for field in dataclasses.fields(Llama3Rope)]
    if missing := [name for name in names if name not in rope]:
        raise UserError(f"config.json: rope_scaling lacks {', '.join(missing)}")
    return Llama3Rope(**{name: rope[name] for name in names})


def _unsupported(raw: Raw, family: Family | None) -> list[str]:
    """List, as `name=value`, every setting whose meaning this code does not implement."""
    names = [] if family else ["model_type"]
    family = family or _QWEN3  # one message names every obstacle, not the type alone
    if any(name not in family.architectures for name in raw.get("architectures") or []):
        names.append("architectures")
    types = _rope_types(raw)
    names += [name for name, kind in types.items() if kind not in family.rope_types]
    if len(set(types.values())) > 1 and not set(names) & set(types):
        names += types  # they contradict each other
    names += [name for name, is_unsupported in family.refused.items() if is_unsupported(raw)]
    shown = {
        "layer_types": _other_layer_types(raw),
        "partial_rotary_factor": _rotary_factor(raw),
        "sliding_window": raw.get("sliding_window", _MISTRAL_WINDOW),
    }
    values = {**raw, **shown}
    return [f"{name}={values.get(name)!r}" for name in names]


def _rope(raw: Raw) -> Raw:
    """The rotary settings; `rope_scaling`, the older spelling, prevails as in transformers."""
    return (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})


def _rope_types(raw: Raw) -> dict[str, Any]:
    """The scaling that each spelling names; settings per layer type are none that is known."""
    types: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if isinstance(value, dict) and not any(isinstance(v, dict) for v in value.values()):
            types[name] = value.get("rope_type", value.get("type", "default"))
        elif value:
            types[name] = None
    return {name: kind for name, kind in types.items() if raw[name]}


def _rotary_factor(raw: Raw) -> Any:
    if None in _rope_types(raw).values():  # refused by itself
        return 1.0
    return _rope(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))


def _other_layer_types(raw: Raw) -> list[str]:
    return sorted(set(raw.get("layer_types") or []) - {"full_attention"})


def _eos_ids(raw: Raw) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
