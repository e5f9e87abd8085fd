"""The types of config.json's settings, checked before any of them is read.

Decides which JSON value a setting may be. Knows neither families nor the meaning of a setting:
hf_config.py does.
"""

from collections.abc import Callable, Mapping
from typing import Any

from orthrus_jax.config import INT32
from orthrus_jax.errors import UserError


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= INT32


def _is_number(value: Any) -> bool:  # NaN passes: ModelConfig refuses it with the range
    return type(value) in (int, float) and not abs(value) > 1e300


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_TEXT = (lambda value: isinstance(value, str), "a text")
_TEXTS = (_is_texts, "a list of texts")
_SWITCH = (lambda value: isinstance(value, bool), "true or false")
_NUMBER = (_is_number, "a positive finite number")
_ID = (_is_id, f"a whole number from 0 to {INT32}")
_OBJECT = (lambda value: isinstance(value, dict), "an object")
_IDS = (
    lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value))),
    f"a token id, or a list of ids, from 0 to {INT32}",
)
TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": _TEXT,
    "architectures": _TEXTS,
    "layer_types": _TEXTS,
    "hidden_act": _TEXT,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "tie_word_embeddings": _SWITCH,
    "use_sliding_window": _SWITCH,
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "partial_rotary_factor": _NUMBER,
    "rope_type": _TEXT,
    "type": _TEXT,
    "rope_scaling": _OBJECT,
    "rope_parameters": _OBJECT,
    "max_position_embeddings": _ID,
    "block_size": _ID,
    "mask_token_id": _ID,
    "eos_token_id": _IDS,
}


def check_types(raw: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse settings of a wrong type, in a JSON object and in its rotary parts.

    A setting that is null counts as absent; one that this table does not name is not read. The
    message begins with `prefix`.

    Raises:
      UserError: naming each of them, its value and what it may be.
    """
    rotary = [raw.get(name) for name in ("rope_scaling", "rope_parameters")]
    wrong = [
        f"{name}={part[name]!r:.60}: expected {expected}"
        for part in (raw, *(part for part in rotary if isinstance(part, dict)))
        for name, (holds, expected) in TYPES.items()
        if part.get(name) is not None and not holds(part[name])
    ]
    if wrong:
        raise UserError(prefix + "; ".join(wrong))
