"""The measurements of a device at hand: a tiny shape on a CPU, where little is installed."""

import json
import os
import pathlib

import pytest

from eval import accelerator
from eval.accelerator_page import page
from orthrus_jax.errors import UserError
from tests.support.commands import run
from tests.support.paths import ROOT

ABSENT = ("datasets", "grain", "math_verify", "ml_collections", "pyarrow", "sympy", "torch")
TINY = ("--sizes", "tiny", "--batches", "1,2", "--contexts", "64,128")
POINT = {"size": "tiny", "batch": 1, "context": 64, "ar_floor_ms": 0.5}


def test_time_that_is_spent_ends_what_is_left_and_the_rest_is_written(
    monkeypatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(accelerator.Session, "over", lambda _: True)
    accelerator.main(["--out", str(tmp_path), *TINY])
    result = json.loads((tmp_path / "accelerator.json").read_text())
    assert {entry["why"] for entry in result["failed"]} == {"the time was spent"}
    assert [entry["part"] for entry in result["failed"]] == [
        *("bandwidth", "cycles", "rows", "exact", "training", "cycles")
    ]


def test_part_that_fails_is_noted_and_the_next_begins(monkeypatch, tmp_path: pathlib.Path) -> None:
    def refuse(*_) -> None:
        raise RuntimeError("no such kernel\nand a page of it")

    monkeypatch.setattr(accelerator, "measure_cycles", refuse)
    monkeypatch.setattr(accelerator, "copy_bandwidth", lambda: 1e9)
    accelerator.main(["--out", str(tmp_path), *TINY, "--parts", "cycles"])
    result = json.loads((tmp_path / "accelerator.json").read_text())
    why = [entry["why"] for entry in result["failed"]]
    assert why == ["RuntimeError: no such kernel"] * 2
    assert "RuntimeError: no such kernel" in (tmp_path / "accelerator.md").read_text()


def test_page_has_cycles_in_ar_steps() -> None:
    cycles = [POINT | {"cycle": "ar", "ms": 2.0}, POINT | {"cycle": "paper", "ms": 5.0}]
    about = {"device": "a device", "jax": "1.2.3"}
    text = page({"about": about, "cycles": cycles})
    assert "# a device, jax 1.2.3" in text
    assert "| tiny | 1 | 64 | paper | 5.000 | 2.500 | 0.500 |" in text


@pytest.mark.parametrize(("flag", "value"), [("--sizes", "9b"), ("--parts", "cycles,all")])
def test_unknown_names_are_refused(flag: str, value: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"^{flag} names .*: expected some of "):
        accelerator.main(["--out", str(tmp_path), flag, value])


def test_machine_and_place_are_checked_before_anything_is_written(tmp_path, monkeypatch) -> None:
    def refuse() -> None:
        raise UserError("JAX_PLATFORMS=bogus finds no device")

    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*file/out: .*file is no directory"):
        accelerator.main(["--out", str(tmp_path / "file" / "out"), *TINY])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(accelerator, "check_devices", refuse)
    with pytest.raises(UserError, match="finds no device"):
        accelerator.main(["--out", str(tmp_path / "out"), *TINY])
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_every_part_runs_with_decoding_s_packages_and_optax_alone(tmp_path: pathlib.Path) -> None:
    blocked = tmp_path / "absent"
    blocked.mkdir()
    for name in ABSENT:
        (blocked / f"{name}.py").write_text("raise ImportError('not installed here')\n")
    out = tmp_path / "out"
    first = {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    ended = run(["eval.accelerator", "--out", str(out), *TINY], environment=first)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads((out / "accelerator.json").read_text())
    assert not result.get("failed")
    assert [entry["rows"] for entry in result["rows"]] == list(accelerator.ROWS)
    assert len(result["cycles"]) == 2 * 2 * 4
    assert {entry["same_text_as_ar"] for entry in result["exact"]} == {16}
    assert result["training"][0]["ms"] > 0
    assert result["programs"][0]["kernels"] > 0
