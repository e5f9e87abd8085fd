"""eval.kv_cache: errors fall with bits, exact caches have none, a report is written."""

import json

import numpy as np
import pytest

from eval import kv_cache
from eval.kv_cache import EXACT, kinds_of, measure
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.weights import random_params

TOKENS = 96


@pytest.fixture(scope="module")
def result() -> dict:
    config = tiny_config(num_hidden_layers=1)
    model = LLM(config, random_params(config, 1, gain=2.0))
    ids = np.random.default_rng(0).integers(0, 63, TOKENS).tolist()
    kinds = {name: kind for name, kind in kinds_of(8).items() if "k4v2" not in name}
    return measure(model, ids, kinds)


def test_errors_fall_with_bits_and_an_exact_cache_has_none(result) -> None:
    kinds = result["kinds"]
    assert result["contexts"] == [48, 96]
    assert max(kinds[EXACT]["kl"]) < 1e-6
    assert min(kinds[EXACT]["same_token"]) == 1
    for key in ("kl", "kl_without_accumulation", "scores", "outputs"):
        for few, many in (("k2v2", "k4v4"), ("plain k2v2", "plain k4v4")):
            assert kinds[few][key][-1] > kinds[many][key][-1] > 1e-6
    assert kinds["k2v2"]["bytes_per_token"] < kinds["k4v4"]["bytes_per_token"]


def test_report_is_written(result, tmp_path) -> None:
    text = kv_cache.table(result)
    assert all(f"| {name} |" in text for name in result["kinds"])
    kv_cache.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_command_reads_prompts_of_a_checkpoint(tiny_base, tmp_path, capsys) -> None:
    prompts = tmp_path / "prompts.jsonl"
    line = json.dumps({"prompt": "Tom has 12 apples and buys 30 more. How many has he now?"})
    prompts.write_text(line + "\n")
    args = ["--model", str(tiny_base), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the first 384 are read exactly"):
        kv_cache.main([*args, "--compile-cache", "off"])
