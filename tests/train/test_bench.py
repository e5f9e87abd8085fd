"""The breakdown of a training step: its parts, its arithmetic, its floor, its file."""

import json

import jax
import pytest

from configs import small
from orthrus_jax.errors import UserError
from train import bench, flops
from train.divergence import head_of


@pytest.fixture
def config(tmp_path):
    c = small.get_config()
    c.run = str(tmp_path / "run")
    c.model.update(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    c.model.update(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    c.train.update(block_size=4, row_length=32, anchors=3, batch_size=4, accumulate=2)
    return c


SECONDS = {
    "step": [0.105, 0.110, 0.150],
    "teacher": [0.020, 0.010, 0.009],
    "forward": [0.030, 0.031, 0.032],
    "views": [0.070, 0.080, 0.060],
    "vocabulary": [0.020, 0.020, 0.021],
    "optimizer": [0.005, 0.004, 0.006],
}


def test_parts_are_medians_and_the_teacher_is_no_part_of_the_blocks(config, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_seconds", lambda calls: {name: SECONDS[name] for name in calls})
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(flops, "per_row", lambda *_: {"teacher": 2e6, "blocks": 3e6})
    bench.main(config, overwrite=False)
    result = json.loads((bench.pathlib.Path(config.run) / "step.json").read_text())
    expected = {"teacher": 10, "blocks": 60, "vocabulary": 20, "optimizer": 5, "rest": 15}
    assert result["parts_ms"] == pytest.approx(expected)
    assert result["step_ms_range"] == pytest.approx([105, 150])
    assert (result["rows"], result["row_length"], result["anchors"]) == (2, 32, 3)
    assert result["tokens_per_second"] == pytest.approx(2 * 32 / 0.110)
    assert result["floor_ms"] == pytest.approx(10)  # 2 rows of 5e6 operations at 1e9 per second
    assert result["mfu"] is None  # a CPU has no entry in flops.PEAK
    printed = capsys.readouterr().out
    assert "| blocks | 60.0 | 55% | 0.0 | 0 |" in printed
    assert "11.00 times the floor" in printed
    with pytest.raises(UserError, match=r"step\.json exists"):
        bench.main(config, overwrite=False)


def test_work_is_what_the_compiler_counts(config):
    """One row, so that no loop hides arithmetic from the compiler's count."""
    config.model.update(vocab_size=1024, hidden_size=128, intermediate_size=512)
    config.model.update(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config.train.update(block_size=8, row_length=128, anchors=16, batch_size=1, accumulate=1)
    parts = bench.Parts(config)
    trees, batch = (parts.diffusion, parts.frozen), (parts.rows, parts.blocks)
    student, teacher = bench._hidden(*trees, *batch, parts.model)
    views = _compiled_flops(bench._gradient, *trees, *batch, parts.model)
    forward = _compiled_flops(bench._teacher, *trees[::-1], parts.rows, parts.model)
    vocabulary = _compiled_flops(
        bench._vocabulary,
        *(student, teacher, head_of(parts.frozen), parts.blocks),
        model=parts.model,
        objective=parts.objective,
    )
    counted = {"teacher": forward, "blocks": views - forward, "vocabulary": vocabulary}
    assert flops.per_row(parts.model, parts.objective, 128) == pytest.approx(counted, rel=0.15)


def _compiled_flops(function, *arguments, **options):
    cost = function.lower(*arguments, **options).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


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
