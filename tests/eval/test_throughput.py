"""Throughput at concurrency: requests of equal length, refusals, and the figures' form."""

import json

import numpy as np
import pytest

from eval import speed, throughput
from orthrus_jax import memory
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

TEXTS = ["How many apples are 12 and 30?", "They are 42 apples. The answer is \\boxed{42}."] * 20
SIZES = {"vocab_size": 400, "mask_token_id": 399, "num_hidden_layers": 1, "block_size": 4,
         "max_position_embeddings": 1024}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model whose answers end at once, if end tokens end them."""
    config = tiny_config(**SIZES, eos_token_ids=tuple(range(200)))
    path = tmp_path_factory.mktemp("model") / "tiny"
    weights = random_params(config, 3, gain=3.0)
    save_checkpoint(path, config, weights, tokenizer=small_tokenizer(TEXTS, 400))
    return str(path)


def test_prompts_of_fixed_length_end_with_the_given_ones() -> None:
    prompts = [[1, 2], [3, 4, 5], [6]]
    assert throughput.fixed_length(prompts, 4, 4, 99) == [
        [5, 6, 1, 2],
        [2, 3, 4, 5],
        [3, 4, 5, 6],
        [5, 6, 1, 2],
    ]
    assert throughput.fixed_length(prompts, 2, 2, 99) == [[1, 2], [4, 5]]


def test_random_prompts_are_the_same_each_time() -> None:
    first = throughput.fixed_length([], 3, 5, 7)
    assert np.shape(first) == (3, 5)
    assert np.max(first) < 7
    assert first == throughput.fixed_length([], 3, 5, 7)


def test_all_loops_are_measured_side_by_side(directory, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How many?"}\n{"prompt": "12 and 30 apples"}\n')
    arguments = ["--model", directory, "--prompts", str(prompts), "--throughput"]
    arguments += ["--batch-sizes", "1,2", "--contexts", "24", "--max-new-tokens", "20"]
    speed.main([*arguments, "--repeats", "2", "--json", str(out)])
    result, captured = json.loads(out.read_text()), capsys.readouterr()
    assert "throughput" in captured.err, "a progress bar"
    assert [(s["batch"], s["requests"]) for s in result["throughput"]] == [(1, 2), (2, 4)]
    for shape in result["throughput"]:
        assert (shape["input_tokens"], shape["output_tokens"]) == (24, 20)
        assert list(shape["modes"]) == ["ar", "orthrus", "one-forward", "auto"]
        for name, figures in shape["modes"].items():
            low, high = figures["range"]
            assert 0 < low <= figures["tokens_per_second"] <= high
            assert figures["per_request"] > 0
            assert figures["same_text"] == 1.0
            assert f"| {shape['batch']} | 24 | 20 | {name} | " in captured.out
        steps = shape["modes"]["ar"]["strategies"]
        assert steps == [{"mode": "ar", "cycles": 19 * shape["requests"]}], "no end token ends"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "a.png"), "--plot does not go with --throughput"),
        (("--refill",), "--refill does not go with --throughput"),
        (("--modes", "ar,hf"), "--modes names hf: expected some of .*, auto"),
        (("--contexts", "64", "--max-new-tokens", "2000"), r"--contexts 64 with --max-new-tokens"),
        (("--contexts", "9999"), r"--contexts 9999: the model has \d+ positions"),
    ],
)
def test_what_does_not_fit_is_refused(directory, options, message, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "_time", None)
    with pytest.raises(UserError, match=message):
        speed.main(["--model", directory, "--throughput", *options])


def test_modes_of_throughput_need_its_flag(directory) -> None:
    with pytest.raises(UserError, match="--modes names auto: expected"):
        speed.main(["--model", directory, "--modes", "ar,auto"])


def test_sizes_over_the_memory_are_refused_before_anything_is_measured(
    directory, monkeypatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 3 * 10**6)
    monkeypatch.setattr(throughput, "_time", None)
    arguments = ["--model", directory, "--throughput", "--contexts", "16", "--max-new-tokens", "40"]
    with pytest.raises(UserError, match=r"--batch-sizes 64 with --contexts 16.* needs about"):
        speed.main([*arguments, "--batch-sizes", "1,64"])
