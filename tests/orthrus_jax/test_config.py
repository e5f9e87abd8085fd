"""ModelConfig: impossible values are refused by name, presets have the published sizes."""

import dataclasses

import pytest

from orthrus_jax.checkpoint.directory import read_json
from orthrus_jax.config import PRESETS, Llama3Rope
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config
from tests.support.paths import DATA

FACTS = DATA / "qwen3_configs.json"
needs_data = pytest.mark.skipif(not FACTS.exists(), reason="the shared data is not here")
SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: expected a whole number from 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: expected a whole number"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"block_size": 1}, "block_size=1"),
        ({"mask_token_id": 64}, "mask_token_id=64 .* 64 rows"),
        ({"mask_token_id": -1}, "mask_token_id=-1"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: expected a positive finite number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: expected a positive finite number"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_theta": None}, "rope_theta=None"),
    ],
)
def test_impossible_values_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1.0, 4.0, 8192), "rope_scaling's factor=0: expected a positive"),
        ((8.0, "1", 4.0, 8192), "rope_scaling's low_freq_factor='1': expected a positive"),
        ((8.0, 4.0, 4.0, 8192), r"high_freq_factor=4\.0 must be above low_freq_factor=4\.0"),
        ((8.0, 1.0, 4.0, -1), "rope_scaling's original_max_position_embeddings=-1"),
    ],
)
def test_impossible_scalings_of_the_rotary_frequencies_are_refused(values, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Llama3Rope(*values)


@needs_data
@pytest.mark.parametrize("size", SIZES)
def test_presets_have_every_published_dimension(size: str) -> None:
    facts = read_json(FACTS)["models"][f"Qwen3-{size}"]
    preset = PRESETS[f"qwen3-{size.lower()}"]
    compared = set(facts) & {field.name for field in dataclasses.fields(preset)}
    assert len(compared) == 13
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
