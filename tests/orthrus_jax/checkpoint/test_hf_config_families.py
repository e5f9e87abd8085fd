"""config.json of each family: its switches, its defaults, its rotary scaling, its refusals."""

import dataclasses
import json

import pytest

from orthrus_jax.checkpoint import config_from_hf, config_to_hf
from orthrus_jax.checkpoint.hf_config import FAMILIES
from orthrus_jax.config import Llama3Rope
from orthrus_jax.errors import UserError
from tests.support.hf_configs import of_family

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("model_type", "qk_norm", "attention_bias"),
    [
        ("qwen3", True, False),
        ("orthrus", True, False),
        ("qwen2", False, True),
        ("llama", False, False),
        ("mistral", False, False),
    ],
)
def test_family_sets_its_switches(model_type: str, qk_norm: bool, attention_bias: bool) -> None:
    config = config_from_hf(of_family(model_type))
    assert (config.qk_norm, config.attention_bias) == (qk_norm, attention_bias)
    assert config.rope_scaling is None
    assert config.model_type == {"orthrus": "qwen3"}.get(model_type, model_type)
    orthrus = of_family(model_type) | {"architectures": ["OrthrusLM"], "block_size": 8}
    assert config_from_hf(orthrus) == dataclasses.replace(config, block_size=8)


def test_every_family_is_tested() -> None:
    assert {"qwen3", "orthrus", "qwen2", "llama", "mistral"} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "absent", "null"),
    [
        ("llama", ("head_dim",), {}),
        ("llama", ("num_key_value_heads",), {}),
        ("llama", (), {"head_dim": None, "num_key_value_heads": None}),
        ("qwen2", ("head_dim",), {}),
        ("mistral", ("head_dim",), {}),
        ("mistral", (), {"head_dim": None}),
    ],
)
def test_missing_size_is_that_of_transformers(family: str, absent: tuple, null: dict) -> None:
    transformers = pytest.importorskip("transformers")
    raw = of_family(family, *absent) | null
    theirs, ours = transformers.AutoConfig.for_model(**raw), config_from_hf(raw)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 96 // 8)


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen3", "head_dim"), *((f, "num_key_value_heads") for f in ("qwen3", "qwen2", "mistral"))],
)
def test_missing_size_without_a_sure_default_is_refused(family: str, name: str) -> None:
    with pytest.raises(UserError, match=f"lacks {name}"):
        config_from_hf(of_family(family, name))


def test_head_dim_that_does_not_divide_is_refused() -> None:
    raw = of_family("llama", "head_dim") | {"num_attention_heads": 7, "num_key_value_heads": 7}
    with pytest.raises(UserError, match="lacks head_dim, and hidden_size=96 is no multiple of"):
        config_from_hf(raw)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
    ],
)
def test_scaling_of_llama3_is_read_in_both_spellings(spelling: dict) -> None:
    config = config_from_hf(of_family("llama", "rope_theta", "rope_scaling") | spelling)
    assert config.rope_scaling == Llama3Rope(32.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 5e5
    written = json.loads(json.dumps(config_to_hf(config, orthrus=True)))
    assert config_from_hf(written) == dataclasses.replace(config, block_size=32)
    assert written["rope_parameters"] == {"rope_theta": 5e5, **LLAMA3}
    assert written["rope_scaling"] == LLAMA3


REFUSED_BY_FAMILY = [
    ("qwen3", {"rope_scaling": LLAMA3}, "rope_scaling="),
    (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_scaling={'rope_type",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling={'type': 'linear'",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "longrope"}},
        "rope_parameters={'rope_type': 'long",
    ),
    (
        "llama",
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling=",
    ),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters={'full",
    ),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"architectures": ["MistralForCausalLM"]}, "architectures="),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling="),
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("mistral", {"rope_scaling": LLAMA3}, "rope_scaling="),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
]


@pytest.mark.parametrize(("family", "change", "shown"), REFUSED_BY_FAMILY)
def test_setting_that_a_family_lacks_is_refused_by_name(family: str, change: dict, shown) -> None:
    with pytest.raises(UserError, match="not supported: ") as error:
        config_from_hf(of_family(family) | change)
    assert shown in str(error.value)


def test_mistral_that_names_no_window_has_one() -> None:
    raw = of_family("mistral")
    del raw["sliding_window"]
    with pytest.raises(UserError, match="not supported: sliding_window=4096"):
        config_from_hf(raw)


def test_scaling_that_is_no_object_is_refused() -> None:
    with pytest.raises(UserError, match="rope_scaling='yarn': expected an object"):
        config_from_hf(of_family("llama") | {"rope_scaling": "yarn"})


def test_incomplete_scaling_is_refused() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    with pytest.raises(UserError, match="lacks high_freq_factor, original_max_position_embeddings"):
        config_from_hf(of_family("llama") | {"rope_scaling": scaling})


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "orthrus"])
def test_transformers_reads_the_same_model_from_config_to_hf(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = config_from_hf(of_family(family))
    theirs = transformers.AutoConfig.for_model(**config_to_hf(config, orthrus=False))
    names = [field.name for field in dataclasses.fields(config)]
    apart = ("dtype", "rope_theta", "rope_scaling")
    same = [n for n in names if hasattr(theirs, n) and n not in apart]
    assert {n: getattr(theirs, n) for n in same} == {n: getattr(config, n) for n in same}
    assert {"head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size"} <= set(same)
    assert theirs.rope_parameters == {"rope_theta": 500_000.0, "rope_type": "default"}
    assert set(getattr(theirs, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    assert getattr(theirs, "sliding_window", None) is None
