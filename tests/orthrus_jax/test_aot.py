"""Ahead-of-time compilation: sizes, time, refusals, and what the command prints."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from orthrus_jax import aot, sharding
from orthrus_jax.aot import command, report
from orthrus_jax.decoding import Strategy
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config

STRATEGIES = {
    "two-forward": Strategy("orthrus-2f", tree_nodes=5),
    "one-forward": Strategy("orthrus-1f", tree_nodes=5, early_blocks=2),
}
CHIP = aot.CHIPS["v5e"]._replace(gib=1.0)
GPU = aot.CHIPS["h100"]
DECODE = ["--preset", "qwen3-0.6b", "--topology", "v5e:1x1", "--program", "orthrus"]


@pytest.mark.parametrize("program", aot.PROGRAMS)
def test_lowered_program_compiles_and_its_parts_are_counted(program: str) -> None:
    config = tiny_config()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    strategy = STRATEGIES.get(program)
    made = aot.lower_decoding(program, config, mesh, batch=2, context=64, strategy=strategy)
    found = aot.compile_report(made, CHIP)
    assert found["fits"]
    leaves = jax.tree.leaves(aot.weights(config, mesh))
    assert found["weights_gib"] * 2**30 == sum(x.size * x.dtype.itemsize for x in leaves)
    if program != "prefill":
        slots = 2 * 64 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        table = 2 * 64 * config.head_dim // 2
        bytes_each = jnp.dtype(config.dtype).itemsize
        assert found["cache_gib"] * 2**30 == 2 * slots * bytes_each + 4 * table
        # Donated: the state that comes out lies where the one that went in was.
        assert found["results_gib"] * 2**30 < 1024
    assert not aot.compile_report(made, CHIP._replace(gib=1e-6))["fits"]


def test_largest_is_the_last_size_that_fits() -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 5000

    assert aot.largest(fits, 1024, 40_960) == 4096
    assert tried == [1024, 2048, 4096, 8192]
    assert aot.largest(fits, 8192, 40_960) == 0
    assert aot.largest(lambda _: True, 8192, 40_960) == 32_768


def test_largest_doubles_the_size_until_one_does_not_fit(monkeypatch, capsys) -> None:
    sizes = []

    def lower(program, config, mesh, *, batch, context, strategy):
        sizes.append((batch, context))

    result = {"fits": True, "total_gib": 3.0, "seconds": 0.0, "processor_seconds": 0.0}
    monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])
    monkeypatch.setattr(command, "lower_decoding", lower)
    monkeypatch.setattr(report, "compile_report", lambda *_: result | {"fits": sizes[-1][0] <= 8})
    aot.main([*DECODE, "--batch", "2", "--largest", "batch", "--json"])
    assert sizes == [(2, 4096), (4, 4096), (8, 4096), (16, 4096)]
    output = capsys.readouterr()
    assert json.loads(output.out)["largest_batch"] == 8
    assert output.err.splitlines()[-2:] == ["batch 8: 3.00 GiB", "batch 16: 3.00 GiB"]
    with pytest.raises(SystemExit):
        aot.main([*DECODE, "--batch", "16", "--largest", "batch"])
    assert "largest batch that fits: 0" in capsys.readouterr().out


def test_training_is_refused_and_its_command_is_named_in_the_help(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        aot.main([*DECODE[:5], "train"])
    assert error.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        aot.main(["--help"])
    assert "python -m train.aot" in capsys.readouterr().out


BAD = {
    "no such slice": ([*DECODE[:3], "v9:1x1", *DECODE[4:]], "--topology v9:1x1 is not KIND:SHAPE"),
    "no number of GPUs": ([*DECODE[:3], "h100:2x2", *DECODE[4:]], "expected a number of GPUs"),
    "both axes": (
        [*DECODE, "--tensor", "3"],
        "mesh data=1, fsdp=1, tensor=3 does not fit 1 devices",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line(name: str, monkeypatch) -> None:
    options, message = BAD[name]
    if name == "both axes":
        monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(UserError) as error:
        aot.main(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_libtpu_is_refused_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install libtpu"):
        aot.devices_of("v5e:1x1")


def test_missing_cuda_plugin_is_refused_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^[^\n]*pip install 'orthrus-jax\[aot-gpu\]'$"):
        aot.devices_of("h100:1")


def lowered(program: str, **options):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    options = {"batch": 1, "context": 64} | options
    return aot.lower_decoding(program, tiny_config(), mesh, **options)


def test_gpu_report_has_kernels_loops_copies_and_a_sum_for_time() -> None:
    result = aot.compile_report(lowered("orthrus"), GPU)
    names = {"kernels_per_forward", "inner_loops", "large_copies", "temporaries_gib"}
    assert names | {"estimated_ms", "floor_ms", "launch_ms"} <= result.keys()
    assert (result["inner_loops"], result["large_copies"]) == (0, 0)
    assert result["kernels_per_forward"] == result["kernels"] / 2
    assert result["launch_ms"] == pytest.approx(result["kernels"] * 2.5e-3)
    longer = max(result["memory_ms"], result["arithmetic_ms"])
    assert result["estimated_ms"] == pytest.approx(longer + result["launch_ms"])
    assert result["estimate"] == "estimated by the compiler, never run"


def test_long_cache_s_loops_are_counted_with_their_turns() -> None:
    few, long = (aot.compile_report(lowered("ar", context=n), GPU) for n in (1024, 4096))
    layers = tiny_config().num_hidden_layers
    assert (few["inner_loops"], long["inner_loops"]) == (0, layers)
    assert long["kernels_per_forward"] > 8 * layers + few["kernels_per_forward"]


def test_floor_reads_each_forward_s_weights_and_live_cache_once() -> None:
    config = tiny_config()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    tree = aot.weights(config, mesh)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    layers = [tree[f"layers_{i}"] for i in range(config.num_hidden_layers)]
    item = jnp.dtype(config.dtype).itemsize
    slots = 2 * 2 * 64 * config.num_key_value_heads * config.head_dim * len(layers) * item
    ar = size(tree) - size([layer["self_attn_diff"] for layer in layers]) + slots
    assert lowered("ar", batch=2).read_bytes == ar
    draft = ar + size([layer["self_attn_diff"] for layer in layers])
    draft -= size([layer["self_attn"] for layer in layers])
    assert lowered("orthrus", batch=2).read_bytes == ar + draft
    assert lowered("forward", batch=2, rows=4).read_bytes == ar
    assert lowered("forward", rows=8).flops > 7.9 * lowered("forward").flops


def test_estimate_by_depth_equals_the_whole() -> None:
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def lower(layers: int):
        config = tiny_config(num_hidden_layers=layers)
        return aot.lower_decoding("ar", config, mesh, batch=1, context=64)

    whole = aot.compile_report(lower(6), GPU)
    result = report.estimate_by_depth(lower, 6, GPU)
    assert result["floor_ms"] == pytest.approx(whole["floor_ms"])
    assert result["kernels_per_forward"] == pytest.approx(whole["kernels_per_forward"], abs=2)
    assert result["estimate"] == "estimated by the compiler, never run, from 2 and 4 layers"


def test_forward_is_estimated_by_rows_and_every_line_is_labelled(monkeypatch, capsys) -> None:
    point = {
        "estimated_ms": 2.0,
        "floor_ms": 1.5,
        "arithmetic_ms": 0.1,
        "estimate": report.NEVER_RUN,
    }
    monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])
    monkeypatch.setattr(report, "estimate_by_depth", lambda *_: point)
    forward = [*DECODE[:-1], "forward"]
    aot.main([*forward, "--json"])
    printed = json.loads(capsys.readouterr().out)["rows"]
    assert list(printed) == ["1", "8", "16", "32", "64", "128", "256"]
    assert printed["8"] == point
    aot.main(forward)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all("estimated by the compiler, never run" in line for line in lines)


def test_whole_program_s_flags_are_refused_for_an_estimate() -> None:
    for flags in (["--text", "x"], ["--largest", "batch"]):
        with pytest.raises(UserError, match=f"^{flags[0]} {flags[1]} needs a whole program"):
            aot.main([*DECODE, "--estimate-only", *flags])
