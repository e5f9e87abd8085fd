"""Where compiled programs are kept."""

import json
import subprocess
import sys

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
