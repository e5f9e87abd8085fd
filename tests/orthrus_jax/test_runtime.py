"""Where compiled programs are kept, and what --mesh takes."""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from orthrus_jax import cli
from orthrus_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys, jax
from jax import monitoring
from orthrus_jax import cli, runtime

found = []
monitoring.register_event_listener(lambda name, **more: found.append(name))
runtime.LEAST_SECONDS = 0
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


def test_the_directory_can_be_moved_and_turned_off(tmp_path):
    other = tmp_path / "other"
    assert hits(tmp_path, other) == 0
    assert hits(tmp_path, other) > 0
    assert hits(tmp_path, "off") == 0
    assert not (tmp_path / "orthrus_jax").exists()


def test_a_directory_that_jax_was_told_stays(tmp_path):
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    mine |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert hits(tmp_path, **mine) == 0
    assert hits(tmp_path, **mine) > 0
    assert not (tmp_path / "orthrus_jax").exists()


def test_a_mesh_is_read_as_it_is_written():
    assert cli.parse_mesh(None) is None
    assert dict(cli.parse_mesh("data=-1").shape) == {
        "data": jax.device_count(),
        "fsdp": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "expected something like data=2,tensor=4"),
        ("data=x", "expected something like data=2,tensor=4"),
        ("fsdp=2", "expected something like data=2,tensor=4"),
        ("data=3,tensor=5", "is of 15 devices, and there are|does not fit"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        cli.parse_mesh(text)


def test_what_is_told_is_what_load_takes(monkeypatch):
    kept = []
    monkeypatch.setattr(cli, "enable_compilation_cache", kept.append)
    parser = argparse.ArgumentParser()
    cli.add_runtime(parser)
    told = cli.runtime_options(parser.parse_args(["--dtype", "float32", "--compile-cache", "off"]))
    assert told == {"dtype": "float32", "mesh": None}
    assert kept == ["off"]
