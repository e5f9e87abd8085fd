"""The breakdown of a training step: its parts, its floor, and where it is written."""

import json

import jax
import pytest

from configs import small
from orthrus_jax.errors import UserError
from train import bench


@pytest.fixture
def config(tmp_path):
    c = small.get_config()
    c.run = str(tmp_path / "run")
    c.model.update(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    c.model.update(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    c.train.update(block_size=4, row_length=32, anchors=3, batch_size=4, accumulate=2)
    return c


def test_the_parts_are_the_step_and_the_floor_is_its_arithmetic(config, monkeypatch, capsys):
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype: 1e9)
    bench.main(config, overwrite=False)
    found = json.loads((bench.pathlib.Path(config.run) / "step.json").read_text())
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"])
    assert (found["rows"], found["row_length"], found["anchors"]) == (2, 32, 3)
    assert found["floor_ms"] == pytest.approx(sum(found["work_gflop"].values()) * 1e3)
    assert found["over_floor"] == pytest.approx(found["step_ms"] / found["floor_ms"])
    assert found["mfu"] is None  # this CPU's peak is in no table
    assert "| teacher |" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"step\.json exists"):
        bench.main(config, overwrite=False)


def test_the_parts_compute_what_the_step_computes(config):
    """The first step's loss is that of the parts put one behind the other."""
    parts = bench.Parts(config)
    calls = parts.calls()
    loss, _ = calls["vocabulary"]()
    _, metrics = calls["step"]()
    supervised = int(parts.blocks.supervised.sum())
    assert parts.blocks.supervised.all(), "or loss, over all rows, is not what the step means"
    assert float(loss) / supervised == pytest.approx(float(metrics["loss"]), rel=1e-5)
    (_, teacher), gradient = calls["views"]()
    assert teacher.shape == (2, 32, 32)
    assert jax.tree.structure(gradient) == jax.tree.structure(parts.diffusion)
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_sizes_come_from_the_configuration_or_its_base(config):
    assert bench.sizes_of(config).hidden_size == 32
    del config.model
    config.base = "Qwen/Qwen3-1.7B"
    assert bench.sizes_of(config).num_hidden_layers == 28
    config.base = "somewhere/else"
    with pytest.raises(UserError, match=r"'somewhere/else' is not of qwen3-0\.6b"):
        bench.sizes_of(config)
