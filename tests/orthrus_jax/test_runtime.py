"""Devices that are not there; where compiled programs are kept."""

import json
import subprocess
import sys
import types

import pytest

from orthrus_jax import runtime
from orthrus_jax.errors import UserError
from tests.support.paths import ROOT

PROGRAM = """
import json, sys, jax
from jax import monitoring
from orthrus_jax import cli, runtime

found = []
monitoring.register_event_listener(lambda name, **more: found.append(name))
runtime.MIN_COMPILE_SECONDS = 0
runtime.enable_compilation_cache(sys.argv[1] if len(sys.argv) > 1 else None)
jax.jit(lambda x: x * 3 + 1)(2.0)
print(json.dumps([name.endswith("cache_hits") for name in found]))
"""


def hits(tmp_path, *where, **environment):
    """Programs that a process found in its cache."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, where)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)} | environment,
    )
    assert run.returncode == 0, run.stderr
    return sum(json.loads(run.stdout))


def test_programs_are_found_again_in_a_directory_of_the_user(tmp_path):
    assert hits(tmp_path) == 0
    assert hits(tmp_path) > 0
    assert list(tmp_path.glob("orthrus_jax/programs/*/*"))


def test_directory_can_be_moved_and_turned_off(tmp_path):
    other = tmp_path / "other"
    assert hits(tmp_path, other) == 0
    assert hits(tmp_path, other) > 0
    assert hits(tmp_path, "off") == 0
    assert not (tmp_path / "orthrus_jax").exists()


def test_directory_configured_in_jax_stays(tmp_path):
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    mine |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert hits(tmp_path, **mine) == 0
    assert hits(tmp_path, **mine) > 0
    assert not (tmp_path / "orthrus_jax").exists()


@pytest.mark.parametrize(
    ("installed", "tpu", "platforms", "expected"),
    [
        ({"libtpu"}, False, None, ["cpu"]),
        ({"libtpu"}, True, None, []),
        ({"libtpu", "jax_cuda13_plugin"}, False, None, []),
        ({"libtpu"}, False, "tpu", []),
        (set(), False, None, []),
    ],
)
def test_libtpu_without_a_tpu_leaves_the_cpu(monkeypatch, installed, tpu, platforms, expected):
    chosen = []
    config = types.SimpleNamespace(
        jax_platforms=platforms,
        jax_disable_jit=False,
        update=lambda name, value: chosen.append(value),
    )
    monkeypatch.setattr(runtime, "jax", types.SimpleNamespace(config=config, devices=list))
    monkeypatch.setattr(runtime, "has_tpu", lambda: tpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    runtime.check_devices()
    assert chosen == expected


@pytest.mark.parametrize("error", [RuntimeError("no such\nbackend"), AssertionError()])
def test_platform_that_is_not_there_is_refused(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"JAX_PLATFORMS=cuda finds no device \(.*\): set") as info:
        runtime.check_devices()
    assert "\n" not in str(info.value)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(UserError, match="JAX finds no device"):
        runtime.check_devices()


@pytest.fixture
def settings(monkeypatch):
    """What would be set in jax.config."""
    kept = {}
    monkeypatch.setattr("jax.config.update", kept.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return kept


def test_cache_directory_that_cannot_be_written_is_refused(tmp_path, settings):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", "\0"):
        with pytest.raises(UserError, match=r"--compile-cache .* cannot be written"):
            runtime.enable_compilation_cache(str(where))
    assert not settings
    runtime.enable_compilation_cache(str(tmp_path / "new" / "one"))
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "new" / "one")
    assert not list((tmp_path / "new" / "one").iterdir())


def test_home_that_cannot_be_written_keeps_no_programs(tmp_path, settings, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runtime.enable_compilation_cache()
    assert settings == {"jax_enable_compilation_cache": False}
    assert "note: compiled programs are not kept" in capsys.readouterr().err
