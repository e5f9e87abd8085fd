"""Compilation of a training step for TPU: sizes, refusals and, with libtpu, the real step."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from configs import paper, qwen3_0_6b, tiny
from orthrus_jax import sharding
from orthrus_jax.aot import CHIPS, compile_report, report
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config
from train import aot

FLAGS = {"topology": "v5e:1x1", "largest": None, "text": None, "json": False}
RESULT = {"fits": True, "total_gib": 3.0, "seconds": 0.0, "processor_seconds": 0.0}


def config_with(**changes):
    config = qwen3_0_6b.get_config()
    config.train.update(changes)
    return config


@pytest.fixture
def one_chip(monkeypatch):
    monkeypatch.setattr(aot, "devices_of", lambda _: jax.devices()[:1])


def test_training_step_is_lowered_from_a_recipe() -> None:
    recipe = paper.recipe().train
    recipe.update(batch_size=4, accumulate=2, row_length=64, anchors=4, block_size=4)
    recipe.dtype = "float32"
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    result = compile_report(aot.lower_training(tiny_config(), mesh, recipe), CHIPS["h100"])
    assert result["fits"]
    assert result["training_state_gib"] > 0
    assert result["results_gib"] * 2**30 < 4096  # metrics: the state is donated


def test_largest_micro_batch_is_searched_up_to_the_rows_of_a_step(
    one_chip, monkeypatch, capsys
) -> None:
    accumulated = []
    lower = lambda sizes, mesh, recipe: accumulated.append(recipe.accumulate)
    up_to_4 = lambda *_: RESULT | {"fits": accumulated[-1] > 4}
    search = FLAGS | {"largest": "batch"}
    monkeypatch.setattr(aot, "lower_training", lower)
    for module in (aot, report):
        monkeypatch.setattr(module, "compile_report", up_to_4)
    aot.main(config_with(accumulate=16), **search | {"json": True})
    assert accumulated == [16, 8, 4]  # of 128 rows
    output = capsys.readouterr()
    printed = json.loads(output.out)
    assert printed["largest_batch"] == 16
    assert (printed["accumulate"], printed["fsdp"], printed["program"]) == (16, -1, "train")
    assert output.err.splitlines()[-2:] == ["batch 16: 3.00 GiB", "batch 32: 3.00 GiB"]
    for module in (aot, report):
        monkeypatch.setattr(module, "compile_report", lambda *_: RESULT)
    aot.main(config_with(accumulate=2), **search)
    assert "largest batch that fits: 128" in capsys.readouterr().out
    accumulated.clear()
    aot.main(config_with(accumulate=32), **search)
    assert accumulated == [32, 16, 8, 4, 2, 1]


BAD = {
    "no topology": (config_with(), {"topology": None}, "--topology KIND:SHAPE is required"),
    "no preset": (tiny.get_config(), {}, "the base 'runs/demo/base' is not of qwen3-0.6b"),
    "micro-batches": (
        config_with(accumulate=7),
        {},
        "train.batch_size=128 does not divide into train.accumulate=7 micro-batches over 1 device",
    ),
    "context": (config_with(), {"largest": "context"}, "--largest context: the only choice is"),
    "objective": (config_with(divergence="l2"), {}, "train.divergence='l2' is not one of kl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str, one_chip) -> None:
    config, flags, message = BAD[name]
    with pytest.raises(UserError) as error:
        aot.main(config, **FLAGS | flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def run_alone(*options: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own: libtpu stays loaded for good."""
    command = [sys.executable, "-m", "train.aot", *options]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, text=True, capture_output=True, env=plain, check=False)


def test_help_names_the_flags_and_exits_with_0() -> None:
    process = run_alone("--help")
    assert (process.returncode, process.stderr) == (0, "")
    for flag in ("--config.NAME=VALUE", "--topology", "--largest", "--text", "--[no]json"):
        assert flag in process.stdout
    assert "overwrite" not in process.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu")
def test_0_6b_step_fits_one_v5e() -> None:
    config = ("--config", "configs/qwen3_0_6b.py", "--topology", "v5e:1x1", "--json")
    process = run_alone(*config)
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["fits"]
    assert result["results_gib"] < 0.01
