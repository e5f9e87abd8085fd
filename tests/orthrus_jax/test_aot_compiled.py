"""The real programs, compiled for a TPU and a GPU that are not attached: what their text shows."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest

from orthrus_jax.aot.text import Text, nbytes
from orthrus_jax.config import PRESETS

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


CUDA = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
READ_MS = {"h100:1": 0.36, "h200:1": 0.25, "a100-80g:1": 0.58, "l4:1": 4.0}  # weights of 0.6B


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="pip install 'orthrus-jax[aot-gpu]'")
@pytest.mark.parametrize("topology", READ_MS)
def test_ar_step_compiles_for_each_gpu(topology: str) -> None:
    ar = ("--preset", "qwen3-0.6b", "--topology", topology, "--program", "ar")
    result = compiled(*ar, "--context", "1024")
    assert result["fits"]
    assert result["inner_loops"] == result["large_copies"] == 0
    assert READ_MS[topology] < result["floor_ms"] < 1.2 * READ_MS[topology]
    assert result["kernels_per_forward"] > 28


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="pip install 'orthrus-jax[aot-gpu]'")
class TestForH100:
    @pytest.mark.parametrize(
        "options",
        [
            ["ar"],
            ["ar", "--context", "32768"],
            ["orthrus"],
            ["orthrus", "--batch", "4"],
            ["two-forward"],
            ["one-forward", "--context", "32768"],
            ["one-forward", "--tree-nodes", "31"],
        ],
        ids=" ".join,
    )
    def test_0_6b_has_no_loop_in_a_forward_and_copies_no_cache_and_no_weight(
        self, options: list[str], tmp_path
    ) -> None:
        where = tmp_path / "program"
        arguments = ("--preset", "qwen3-0.6b", "--topology", "h100:1", "--program", *options)
        result = compiled(*arguments, "--text", str(where))
        assert result["fits"]
        program = where.read_text()
        text = Text(program)
        loops = [i for i in text.computations[text.loop()] if i.opcode == "while"]
        assert not [loop.origin for loop in loops if "DualViewTransformer" in loop.origin]
        assert result["inner_loops"] == len(loops) == ("--tree-nodes" in options)
        assert program.count("attention/pallas_call") >= 28  # one kernel per layer and segment
        smallest = 2 * 8 * 128 * 1024  # bytes of a key projection
        copies = [made for made in result["large_copies_made"] if nbytes(made) >= smallest]
        assert not [made for made in copies if "f32" not in made]  # float32: logits of a cycle

    def test_ar_step_writes_no_product_of_a_whole_weight(self, tmp_path) -> None:
        where = tmp_path / "program"
        ar = ("--preset", "qwen3-0.6b", "--topology", "h100:1", "--program", "ar")
        result = compiled(*ar, "--text", str(where))
        text = Text(where.read_text())
        made = [nbytes(i.shape) for i in text.computations[text.loop()] if i.opcode == "fusion"]
        written = sorted(size for size in made if size > 2 * 1024 * 1024)
        cache, logits = 2 * 8 * 4096 * 128, 4 * 8 * 151_936
        assert set(written) <= {cache, logits}
        assert result["memory_ms"] < 1.2 * result["floor_ms"]


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
        found = compiled(
            "--preset",
            "qwen3-0.6b",
            "--topology",
            "v5e:1x1",
            "--program",
            *options,
            "--context",
            "4096",
            "--text",
            where,
        )
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
        ended = aot_alone("--preset", "qwen3-8b", "--topology", "v5e:1x1", "--program", "orthrus")
        assert ended.returncode == 1
        assert "does not fit 16 GiB" in ended.stdout
