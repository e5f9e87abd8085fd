"""Ahead-of-time compilation for TPU: sizes, refusals, and (slow, with libtpu) the real programs."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from orthrus_jax import aot, sharding
from orthrus_jax.config import PRESETS
from orthrus_jax.decoding import Strategy
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config

STRATEGIES = {
    "two-forward": Strategy("orthrus-2f", tree_nodes=5),
    "one-forward": Strategy("orthrus-1f", tree_nodes=5, early_blocks=2),
}
DECODE = ["--preset", "qwen3-0.6b", "--topology", "v5e:1x1", "--program", "orthrus"]


@pytest.mark.parametrize("program", aot.PROGRAMS)
def test_lowered_program_compiles_and_its_parts_are_counted(program: str) -> None:
    config = tiny_config()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    strategy = STRATEGIES.get(program)
    made = aot.lower_decoding(program, config, mesh, batch=2, context=64, strategy=strategy)
    found = aot.compile_report(made, limit=1.0)
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
    assert not aot.compile_report(made, limit=1e-6)["fits"]


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
    monkeypatch.setattr(aot, "tpu_devices", lambda _: jax.devices()[:1])
    monkeypatch.setattr(aot, "lower_decoding", lower)
    monkeypatch.setattr(aot, "compile_report", lambda *_: result | {"fits": sizes[-1][0] <= 8})
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
    "both axes": (
        [*DECODE, "--tensor", "3"],
        "mesh data=1, fsdp=1, tensor=3 does not fit 1 devices",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line(name: str, monkeypatch) -> None:
    options, message = BAD[name]
    if name != "no such slice":
        monkeypatch.setattr(aot, "tpu_devices", lambda _: jax.devices()[:1])
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(UserError) as error:
        aot.main(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_libtpu_is_refused_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install libtpu"):
        aot.tpu_devices("v5e:1x1")


CALLED = re.compile(r"(?:body|condition|to_apply|branch_computations)=\{?((?:%[\w.\-]+,? ?)+)")
MADE = re.compile(r" = (.*?) ([\w\-]+)\(")
ARRAY = re.compile(r"\w+\[([\d,]+)\](\{[^}]*\})?")
# What makes no array: names, what is written into an array where it lies, a copy only begun.
MAKES_NONE = {"parameter", "tuple", "get-tuple-element", "while", "conditional", "bitcast"}
MAKES_NONE |= {"dynamic-update-slice", "copy-start", "slice-start", "async-start"}


def made_in_loops(program: str, least: int) -> list[str]:
    """Lines inside the loops of a compiled TPU program that make an array of `least` elements.

    What is fetched to the chip's own fast memory, S(1), is not counted.
    """
    found = re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{\n((?:  .*\n)+)", program, re.M)
    lines = {name: text.splitlines() for name, text in found}
    todo = re.findall(r" while\(.*body=%([\w.\-]+)", program)
    assert todo, "no loop in the text"
    inside: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo += re.findall(r"[\w.\-]+", " ".join(CALLED.findall("\n".join(lines[name]))))

    def large(line: str) -> bool:
        made = MADE.search(line)
        if made is None or made[2] in MAKES_NONE:
            return False
        arrays = [dims for dims, layout in ARRAY.findall(made[1]) if "S(1)" not in layout]
        return any(math.prod(map(int, dims.split(","))) >= least for dims in arrays)

    return [line.strip() for name in inside for line in lines[name] if large(line)]


def copied(program: str, least: int) -> list[str]:
    """Sizes of what is copied anywhere in it, of `least` elements or more."""
    found = re.findall(r"^.* = \w+\[([\d,]+)\]\{[^}]*\} copy\(.*$", program, re.M)
    return [dims for dims in found if math.prod(map(int, dims.split(","))) >= least]


def test_large_array_made_in_a_loop_is_reported() -> None:
    text = """HloModule m
%step (p: (f32[8,8])) -> (f32[8,8]) {
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=0
  %fetched = f32[8,8]{1,0:T(8,128)S(1)} copy-done(%x)
  %turned = f32[8,8]{0,1:T(8,128)} copy(%fetched)
  ROOT %y = (f32[8,8]{1,0}) tuple(%turned)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %before = f32[8,8]{1,0} copy(%a)
  %t = (f32[8,8]{1,0}) tuple(%before)
  %w = (f32[8,8]{1,0}) while(%t), condition=%more, body=%step
}
"""
    assert [line.split()[0] for line in made_in_loops(text, 64)] == ["%turned"]
    assert copied(text, 64) == ["8,8", "8,8"]
    assert copied(text, 65) == []
    assert made_in_loops(text, 65) == []


def aot_alone(*options: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own: libtpu stays loaded for good."""
    command = [sys.executable, "-m", "orthrus_jax.aot", *options]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, text=True, capture_output=True, env=plain, check=False)


def compiled(*options: str) -> dict:
    ended = aot_alone(*options, "--json")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu")
class TestForTPU:
    @pytest.mark.parametrize(
        "options",
        [
            ["orthrus"],
            ["two-forward"],
            ["one-forward"],
            ["one-forward", "--tree-nodes", "31"],
            ["ar", "--batch", "4"],
        ],
        ids=" ".join,
    )
    def test_0_6b_decodes_on_one_v5e_and_copies_no_cache_and_no_weight(
        self, options: list[str], tmp_path
    ) -> None:
        where = str(tmp_path / "program")
        found = compiled(*DECODE[:-1], *options, "--context", "4096", "--text", where)
        assert found["fits"]
        assert 1.3 < found["weights_gib"] < 1.6
        rows = found["batch"]
        cache_gib = rows * 2 * 28 * 8 * 128 * 2 * 4096 / 2**30
        assert found["cache_gib"] == pytest.approx(cache_gib, rel=0.02)
        assert found["results_gib"] < 0.01
        smallest = 8 * 128 * 1024  # elements of a key projection; a layer's keys have four times
        program = (tmp_path / "program").read_text()
        assert made_in_loops(program, smallest) == []
        assert copied(program, smallest) == []

    def test_8b_does_not_fit_one_v5e_and_the_compiler_s_word_is_given(self) -> None:
        config = PRESETS["qwen3-8b"]
        assert config.num_hidden_layers == 36
        ended = aot_alone("--preset", "qwen3-8b", *DECODE[2:])
        assert ended.returncode == 1
        assert "does not fit 16 GiB" in ended.stdout
