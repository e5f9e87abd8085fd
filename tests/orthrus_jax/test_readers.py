"""Damaged files are refused in one line: no reader raises anything but a UserError."""

import json
import pathlib

from orthrus_jax.checkpoint import read_config
from orthrus_jax.checkpoint.directory import weight_files
from orthrus_jax.engine import planner
from orthrus_jax.files import read_jsonl, read_prompts
from tests.support.fuzzing import both_profiles, check_reader, damaged_json, damaged_lines

PROMPTS = [{"prompt": "Hi"}, {"prompt": "What is 2+2?", "id": 3}]
CONFIG = {
    "architectures": ["OrthrusLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    "rope_scaling": None,
    "layer_types": ["full_attention"] * 2,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "eos_token_id": [151_645, 151_643],
    "mask_token_id": 151_669,
    "block_size": 32,
    "dtype": "bfloat16",
}
CALIBRATION = {
    "about": {"prompts": 20, "digest": "x"},
    "trust": 1.25,
    "earned": [
        {
            "cycle": "one-forward",
            "draft_length": 32,
            "tree_nodes": 15,
            "early_blocks": 4,
            "fresh_blocks": 0,
            "rows": 160,
            "tokens_per_forward": 3.5,
            "interval": [3.2, 3.8],
            "pooled": 3.5,
            "accepted": 2.5,
            "hits": 0.9,
        }
    ],
    "cost": {"cpu": {"1": [[1, 2.5], [32, 4.0]]}},
    "draft_length": {"cpu": {"draft_length": 8, "tokens_per_second": {"8": 70.0, "16": 60.5}}},
}
INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a.weight": "model-1.safetensors"}}


def planned(path: pathlib.Path) -> None:
    """Read a calibration and choose by it, as a model's user does."""
    calibration = planner.load(path.parent)
    planner.preferred_draft_length(calibration, 32, "cpu")
    planner.choose(calibration, 160, 1, 32, "cpu")


@both_profiles
def test_prompts_are_read_or_refused(tmp_path: pathlib.Path, slow: bool) -> None:
    contents = damaged_lines(PROMPTS)
    check_reader(read_prompts, slow=slow, path=tmp_path / "prompts.jsonl", contents=contents)


@both_profiles
def test_json_lines_are_read_or_refused(tmp_path: pathlib.Path, slow: bool) -> None:
    read = lambda path: list(read_jsonl(path))
    check_reader(read, slow=slow, path=tmp_path / "x.jsonl", contents=damaged_lines(PROMPTS))


@both_profiles
def test_config_is_read_or_refused(tmp_path: pathlib.Path, slow: bool) -> None:
    read = lambda path: hash(read_config(path.parent).config)  # a static argument of programs
    contents = damaged_json(CONFIG)
    check_reader(read, slow=slow, path=tmp_path / "config.json", contents=contents)


@both_profiles
def test_generation_config_is_read_or_refused(tmp_path: pathlib.Path, slow: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    read = lambda path: hash(read_config(path.parent).config)
    contents = damaged_json({"eos_token_id": [151_645, 151_643], "temperature": 0.6})
    check_reader(read, slow=slow, path=tmp_path / "generation_config.json", contents=contents)


@both_profiles
def test_calibration_is_read_or_refused(tmp_path: pathlib.Path, slow: bool) -> None:
    contents = damaged_json(CALIBRATION)
    check_reader(planned, slow=slow, path=tmp_path / planner.FILE, contents=contents)


@both_profiles
def test_index_of_weights_is_read_or_refused(tmp_path: pathlib.Path, slow: bool) -> None:
    read = lambda path: weight_files(path.parent)
    path = tmp_path / "model.safetensors.index.json"
    check_reader(read, slow=slow, path=path, contents=damaged_json(INDEX))
