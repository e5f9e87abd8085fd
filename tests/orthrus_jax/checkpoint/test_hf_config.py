"""config.json in and out: every spelling is read, every unsupported setting refused by name."""

import dataclasses
import json

import pytest

from orthrus_jax.checkpoint import config_from_hf, config_to_hf, read_config
from orthrus_jax.checkpoint.directory import read_json
from orthrus_jax.config import PRESETS, QWEN3_MASK_TOKEN_ID, ModelConfig
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config
from tests.support.hf_configs import ORTHRUS, RAW, without
from tests.support.paths import DATA

CONFIGS = DATA / "qwen3_configs"
needs_data = pytest.mark.skipif(not CONFIGS.exists(), reason="the shared data is not here")
CONFIG_FILES = (
    ("Qwen3-4B.config.json", "4b", "bfloat16"),
    ("Qwen3-8B.config.json", "8b", "bfloat16"),
    ("Qwen3-14B.config.json", "14b", "bfloat16"),
    ("Qwen3-32B.config.json", "32b", "bfloat16"),
    ("Qwen3-8B.saved-by-transformers-4.57.1.config.json", "8b", "float32"),
    ("Qwen3-1.7B.saved-by-transformers-4.57.1.config.json", "1.7b", "float16"),
    ("Orthrus-Qwen3-1.7B.config.json", "1.7b", "bfloat16"),
)


def test_config_from_hf_reads_every_field_of_a_qwen3() -> None:
    assert config_from_hf(RAW) == ModelConfig(
        vocab_size=1000,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        eos_token_ids=(7,),
        block_size=32,
        mask_token_id=None,
        dtype="float32",
    )


@pytest.mark.parametrize("model_type", ["qwen3", "orthrus"])
def test_config_from_hf_reads_an_orthrus_in_both_model_types(model_type: str) -> None:
    config = config_from_hf(ORTHRUS | {"model_type": model_type})
    assert config == dataclasses.replace(config_from_hf(RAW), block_size=16, mask_token_id=990)


@pytest.mark.parametrize(
    ("spelling", "theta"),
    [
        ({"rope_theta": 250_000}, 250_000.0),
        ({"rope_parameters": {"rope_theta": 250_000, "rope_type": "default"}}, 250_000.0),
        ({"rope_theta": 1, "rope_parameters": {"rope_theta": 250_000}}, 250_000.0),
        ({"rope_theta": 250_000, "rope_parameters": {"rope_type": "default"}}, 250_000.0),
        ({"rope_theta": 250_000, "rope_parameters": None}, 250_000.0),
        ({"rope_theta": 250_000, "rope_scaling": {"rope_type": "default"}}, 250_000.0),
    ],
)
def test_rope_base_is_read_in_both_spellings(spelling: dict, theta: float) -> None:
    assert config_from_hf(without("rope_theta") | spelling).rope_theta == theta


@pytest.mark.parametrize(
    ("raw", "generation", "ids"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (0, None, (0,)),
        (5, {"eos_token_id": [5, 9]}, (5, 9)),
        (5, {"eos_token_id": 9}, (9,)),
        (5, {"eos_token_id": 0}, (0,)),
        (5, {}, (5,)),
        (5, {"eos_token_id": None}, (5,)),
        (None, {"eos_token_id": [5, 9]}, (5, 9)),
        (None, None, ()),
    ],
)
def test_eos_ids_come_from_generation_config_if_it_names_them(raw, generation, ids) -> None:
    assert config_from_hf(RAW | {"eos_token_id": raw}, generation).eos_token_ids == ids


@pytest.mark.parametrize(
    ("vocab", "given", "mask"),
    [(1000, None, None), (1000, 0, 0), (151_936, None, QWEN3_MASK_TOKEN_ID), (151_936, 8, 8),
     (QWEN3_MASK_TOKEN_ID, None, None)],
)  # fmt: skip
def test_mask_is_the_named_id_or_the_unused_row_of_qwen3(vocab, given, mask) -> None:
    raw = RAW | {"vocab_size": vocab, "mask_token_id": given}
    assert config_from_hf(raw).mask_token_id == mask


@pytest.mark.parametrize("value", ["7", [7, None], 7.0, {"id": 7}])
def test_end_token_that_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"eos_token_id=.*: expected a token id, or a list"):
        config_from_hf(RAW | {"eos_token_id": value})


@pytest.mark.parametrize("value", ["96", 96.0, None, True])
def test_size_that_is_no_whole_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(UserError, match=f"expected whole numbers, found hidden_size={value!r}"):
        config_from_hf(RAW | {"hidden_size": value})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_both_spellings_and_defaults_to_bfloat16(key: str) -> None:
    bare = without("torch_dtype")
    assert config_from_hf(bare | {key: "float16"}).dtype == "float16"
    assert config_from_hf(bare).dtype == "bfloat16"


REFUSED = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "attention_bias": True,
    "mlp_bias": True,
    "model_type": "gemma2",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_setting_is_refused_by_name_and_value(name: str) -> None:
    value = REFUSED[name]
    shown = ["sliding_attention"] if name == "layer_types" else value
    with pytest.raises(UserError) as error:
        config_from_hf(RAW | {name: value})
    assert str(error.value).endswith(f"not supported: {name}={shown!r}")


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"model_type": None},
        {"quantization_config": {}},
    ],
)
def test_other_spellings_of_unsupported_settings_are_refused(raw: dict) -> None:
    with pytest.raises(UserError, match="not supported"):
        config_from_hf(RAW | raw)


def test_refusals_are_listed_in_one_message() -> None:
    names = [name for name in REFUSED if name != "rope_parameters"]
    with pytest.raises(UserError) as error:
        config_from_hf(RAW | {name: REFUSED[name] for name in names})
    assert [name for name in names if f"{name}=" not in str(error.value)] == []


def test_sliding_window_that_is_switched_off_is_not_refused() -> None:
    raw = RAW | {"sliding_window": 4096, "use_sliding_window": False}
    assert config_from_hf(raw) == config_from_hf(RAW)


def test_missing_keys_are_listed_in_one_message() -> None:
    with pytest.raises(UserError, match=r"lacks hidden_size, num_hidden_layers$"):
        config_from_hf(without("hidden_size", "num_hidden_layers"))


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "0", "-1", "null", '"1e6"'])
def test_constant_that_is_no_positive_number_is_refused_when_read(tmp_path, name, value) -> None:
    text = json.dumps(RAW | {name: "HERE"}).replace('"HERE"', value)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path.name}: {name}=.*: expected a positive finite"):
        read_config(tmp_path)


@pytest.mark.parametrize("switches", [{"attention_bias": True}, {"qk_norm": False}])
def test_switches_of_no_family_are_not_written(switches: dict) -> None:
    """A config.json without them would be read as another model."""
    with pytest.raises(UserError, match=r"no config\.json of qwen3 describes") as error:
        config_to_hf(tiny_config(**switches), orthrus=True)
    for name, value in switches.items():
        assert f"{name}={value}" in str(error.value)


@pytest.mark.parametrize("raw", [RAW, ORTHRUS], ids=["qwen3", "orthrus"])
@pytest.mark.parametrize("eos", [7, [7, 8]])
def test_config_to_hf_and_back_is_the_same_config(raw: dict, eos) -> None:
    config = config_from_hf(raw | {"eos_token_id": eos})
    written = config_to_hf(config, orthrus=raw is ORTHRUS)
    assert config_from_hf(json.loads(json.dumps(written))) == config
    assert written["eos_token_id"] == eos


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_orthrus_layout(name: str) -> None:
    assert config_from_hf(config_to_hf(PRESETS[name], orthrus=True)) == PRESETS[name]


def test_config_to_hf_writes_the_keys_of_each_layout() -> None:
    config = config_from_hf(ORTHRUS)
    qwen3, orthrus = config_to_hf(config, orthrus=False), config_to_hf(config, orthrus=True)
    assert qwen3["architectures"] == ["Qwen3ForCausalLM"]
    assert orthrus["architectures"] == ["OrthrusLM"]
    assert qwen3["model_type"] == orthrus["model_type"] == "qwen3"
    assert (orthrus["block_size"], orthrus["mask_token_id"]) == (16, 990)
    assert "block_size" not in qwen3
    for raw in (qwen3, orthrus):
        assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500_000.0


def test_read_config_reads_both_files_and_names_the_directory(tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert read_config(tmp_path).config.eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_config(str(tmp_path)).config.eos_token_ids == (7, 8)
    assert not read_config(tmp_path).orthrus
    (tmp_path / "config.json").write_text(json.dumps(ORTHRUS))
    assert read_config(tmp_path).orthrus
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"attention_bias": True}))
    with pytest.raises(UserError, match=f"{tmp_path.name}: .*attention_bias=True"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("[1]", "holds a list"), ("{", "cannot be read")])
def test_read_json_refuses_all_but_an_object(tmp_path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "config.json")


@needs_data
@pytest.mark.parametrize(("file", "size", "dtype"), CONFIG_FILES)
def test_real_config_files_read_as_the_preset(file: str, size: str, dtype: str) -> None:
    expected = dataclasses.replace(PRESETS[f"qwen3-{size}"], eos_token_ids=(151_645,), dtype=dtype)
    assert config_from_hf(read_json(CONFIGS / file)) == expected


@needs_data
def test_no_real_config_file_is_left_untested() -> None:
    assert {path.name for path in CONFIGS.glob("*.config.json")} == {f for f, _, _ in CONFIG_FILES}


@needs_data
@pytest.mark.parametrize(
    ("model", "ids"),
    [("Qwen3-8B", (151_645, 151_643)), ("Orthrus-Qwen3-1.7B", (151_645,))],
)
def test_real_generation_configs_give_the_eos_ids(model: str, ids: tuple[int, ...]) -> None:
    raw = read_json(CONFIGS / f"{model}.config.json")
    generation = read_json(CONFIGS / f"{model}.generation_config.json")
    assert config_from_hf(raw, generation).eos_token_ids == ids
