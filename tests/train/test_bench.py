"""The breakdown of a training step: its parts, its floor, its file."""

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


def test_parts_add_up_to_the_step_and_floor_is_its_arithmetic(config, monkeypatch, capsys):
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype: 1e9)
    bench.main(config, overwrite=False)
    result = json.loads((bench.pathlib.Path(config.run) / "step.json").read_text())
    assert sum(result["parts_ms"].values()) == pytest.approx(result["step_ms"])
    assert (result["rows"], result["row_length"], result["anchors"]) == (2, 32, 3)
    assert result["floor_ms"] == pytest.approx(sum(result["work_gflop"].values()) * 1e3)
    assert result["over_floor"] == pytest.approx(result["step_ms"] / result["floor_ms"])
    assert result["mfu"] is None  # a CPU has no entry in flops.PEAK
    assert "| teacher |" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"step\.json exists"):
        bench.main(config, overwrite=False)


def test_parts_give_the_loss_of_the_step(config):
    """The parts run in sequence give the first step's loss."""
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
