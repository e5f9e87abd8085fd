"""config.json in and out: what is read, in every spelling, and what is refused by name."""

import dataclasses
import json

import pytest

from orthrus_jax.config import PRESETS, QWEN3_MASK_TOKEN_ID, ModelConfig, read_json
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config
from tests.support.paths import DATA

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
FACTS, CONFIGS = DATA / "qwen3_configs.json", DATA / "qwen3_configs"
needs_data = pytest.mark.skipif(not FACTS.exists(), reason="the shared data is not here")
SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
CONFIG_FILES = (
    ("Qwen3-4B.config.json", "4b", "bfloat16"),
    ("Qwen3-8B.config.json", "8b", "bfloat16"),
    ("Qwen3-14B.config.json", "14b", "bfloat16"),
    ("Qwen3-32B.config.json", "32b", "bfloat16"),
    ("Qwen3-8B.saved-by-transformers-4.57.1.config.json", "8b", "float32"),
    ("Qwen3-1.7B.saved-by-transformers-4.57.1.config.json", "1.7b", "float16"),
    ("Orthrus-Qwen3-1.7B.config.json", "1.7b", "bfloat16"),
)


def without(*names: str) -> dict:
    return {name: value for name, value in RAW.items() if name not in names}


def test_from_hf_reads_every_field_of_a_qwen3() -> None:
    assert ModelConfig.from_hf(RAW) == ModelConfig(
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
def test_from_hf_reads_an_orthrus_in_both_model_types(model_type: str) -> None:
    config = ModelConfig.from_hf(ORTHRUS | {"model_type": model_type})
    assert config == dataclasses.replace(ModelConfig.from_hf(RAW), block_size=16, mask_token_id=990)


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
    assert ModelConfig.from_hf(without("rope_theta") | spelling).rope_theta == theta


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
def test_eos_ids_come_from_generation_config_where_it_names_them(raw, generation, ids) -> None:
    assert ModelConfig.from_hf(RAW | {"eos_token_id": raw}, generation).eos_token_ids == ids


@pytest.mark.parametrize(
    ("vocab", "given", "mask"),
    [(1000, None, None), (1000, 0, 0), (151_936, None, QWEN3_MASK_TOKEN_ID), (151_936, 8, 8),
     (QWEN3_MASK_TOKEN_ID, None, None)],
)  # fmt: skip
def test_mask_is_the_named_id_or_qwens_unused_row_where_there_is_one(vocab, given, mask) -> None:
    raw = RAW | {"vocab_size": vocab, "mask_token_id": given}
    assert ModelConfig.from_hf(raw).mask_token_id == mask


@pytest.mark.parametrize("value", ["96", 96.0, None, True])
def test_a_size_that_is_no_whole_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(UserError, match=f"expected whole numbers, found hidden_size={value!r}"):
        ModelConfig.from_hf(RAW | {"hidden_size": value})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_both_spellings_and_defaults_to_bfloat16(key: str) -> None:
    bare = without("torch_dtype")
    assert ModelConfig.from_hf(bare | {key: "float16"}).dtype == "float16"
    assert ModelConfig.from_hf(bare).dtype == "bfloat16"


REFUSED = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "attention_bias": True,
    "mlp_bias": True,
    "model_type": "llama",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name_and_value(name: str) -> None:
    value = REFUSED[name]
    shown = ["sliding_attention"] if name == "layer_types" else value
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(RAW | {name: value})
    assert str(error.value).endswith(f"not supported: {name}={shown!r}")


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"model_type": None},
        {"quantization_config": {}},
    ],
)
def test_other_spellings_of_the_unsupported_are_refused(raw: dict) -> None:
    with pytest.raises(UserError, match="not supported"):
        ModelConfig.from_hf(RAW | raw)


def test_all_refusals_are_told_at_once() -> None:
    names = [name for name in REFUSED if name != "rope_parameters"]
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(RAW | {name: REFUSED[name] for name in names})
    assert [name for name in names if f"{name}=" not in str(error.value)] == []


def test_a_sliding_window_that_is_switched_off_is_not_refused() -> None:
    raw = RAW | {"sliding_window": 4096, "use_sliding_window": False}
    assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(RAW)


def test_all_missing_keys_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"lacks hidden_size, num_hidden_layers$"):
        ModelConfig.from_hf(without("hidden_size", "num_hidden_layers"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"block_size": 1}, "block_size=1"),
        ({"mask_token_id": 64}, "mask_token_id=64 .* 64 rows"),
        ({"mask_token_id": -1}, "mask_token_id=-1"),
        ({"dtype": "float8"}, "dtype='float8'"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_config(**change)


@pytest.mark.parametrize("raw", [RAW, ORTHRUS], ids=["qwen3", "orthrus"])
@pytest.mark.parametrize("eos", [7, [7, 8]])
def test_to_hf_and_back_is_the_same_config(raw: dict, eos) -> None:
    config = ModelConfig.from_hf(raw | {"eos_token_id": eos})
    written = config.to_hf(orthrus=raw is ORTHRUS)
    assert ModelConfig.from_hf(json.loads(json.dumps(written))) == config
    assert written["eos_token_id"] == eos


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_orthrus_layout(name: str) -> None:
    assert ModelConfig.from_hf(PRESETS[name].to_hf(orthrus=True)) == PRESETS[name]


def test_to_hf_writes_each_layouts_own_keys() -> None:
    config = ModelConfig.from_hf(ORTHRUS)
    qwen3, orthrus = config.to_hf(orthrus=False), config.to_hf(orthrus=True)
    assert qwen3["architectures"] == ["Qwen3ForCausalLM"]
    assert orthrus["architectures"] == ["OrthrusLM"]
    assert qwen3["model_type"] == orthrus["model_type"] == "qwen3"
    assert (orthrus["block_size"], orthrus["mask_token_id"]) == (16, 990)
    assert "block_size" not in qwen3
    for raw in (qwen3, orthrus):
        assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500_000.0


def test_transformers_reads_the_same_qwen3_from_what_to_hf_writes() -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_hf(RAW)
    theirs = transformers.Qwen3Config(**config.to_hf(orthrus=False))
    names = [field.name for field in dataclasses.fields(config)]
    same = [n for n in names if hasattr(theirs, n) and n not in ("dtype", "rope_theta")]
    assert {n: getattr(theirs, n) for n in same} == {n: getattr(config, n) for n in same}
    assert {"head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size"} <= set(same)
    assert theirs.rope_parameters == {"rope_theta": 500_000.0, "rope_type": "default"}
    assert set(theirs.layer_types) == {"full_attention"}


@pytest.mark.parametrize(("name", "heads"), [("head_dim", 8), ("num_key_value_heads", 64)])
def test_a_key_left_out_means_what_transformers_takes_it_to_mean(name: str, heads: int) -> None:
    """A guess of another size is a silently different model; refusing the file is right too."""
    transformers = pytest.importorskip("transformers")
    raw = without(name) | {"num_attention_heads": heads, "hidden_size": 512}
    theirs = getattr(transformers.Qwen3Config(**raw), name)
    try:
        ours = getattr(ModelConfig.from_hf(raw), name)
    except UserError as error:
        ours = theirs if f"lacks {name}" in str(error) else error
    assert ours == theirs


def test_from_directory_reads_both_files_and_names_the_directory(tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert ModelConfig.from_directory(str(tmp_path)).eos_token_ids == (7, 8)
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"attention_bias": True}))
    with pytest.raises(UserError, match=f"{tmp_path.name}: .*attention_bias=True"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize(("text", "told"), [("[1]", "holds a list"), ("{", "cannot be read")])
def test_read_json_refuses_what_is_not_an_object(tmp_path, text: str, told: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=told):
        read_json(tmp_path / "config.json")


@needs_data
@pytest.mark.parametrize("size", SIZES)
def test_presets_have_every_published_dimension(size: str) -> None:
    facts = read_json(FACTS)["models"][f"Qwen3-{size}"]
    preset = PRESETS[f"qwen3-{size.lower()}"]
    compared = set(facts) & {field.name for field in dataclasses.fields(preset)}
    assert len(compared) == 11
    assert {n: getattr(preset, n) for n in compared} == {n: facts[n] for n in compared}
    assert list(preset.eos_token_ids) == facts["generation_eos_token_ids"]
    assert preset.dtype == facts["torch_dtype"]


@needs_data
@pytest.mark.parametrize("size", ["1.7B", "4B", "8B"])
def test_presets_have_the_orthrus_releases_block_and_mask(size: str) -> None:
    facts = read_json(FACTS)["models"][f"Orthrus-Qwen3-{size}"]
    preset = PRESETS[f"qwen3-{size.lower()}"]
    assert preset.block_size == facts["block_size"]
    assert preset.mask_token_id == facts["mask_token_id"]


def test_every_published_size_has_a_preset() -> None:
    assert set(PRESETS) == {f"qwen3-{size.lower()}" for size in SIZES}


@needs_data
@pytest.mark.parametrize(("file", "size", "dtype"), CONFIG_FILES)
def test_real_config_files_read_as_the_preset(file: str, size: str, dtype: str) -> None:
    expected = dataclasses.replace(PRESETS[f"qwen3-{size}"], eos_token_ids=(151_645,), dtype=dtype)
    assert ModelConfig.from_hf(read_json(CONFIGS / file)) == expected


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
    assert ModelConfig.from_hf(raw, generation).eos_token_ids == ids
