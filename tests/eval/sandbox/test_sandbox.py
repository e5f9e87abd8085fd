"""How programs end, well or not: within limits, in an empty surrounding, with nothing left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from eval import sandbox
from eval.sandbox import SandboxResult, Suite, run_program
from orthrus_jax.errors import UserError
from tests.support.sandbox import WEAKER, needs_linux, needs_posix, own_processes, require, run

pytestmark = needs_posix


def test_program_that_ends_has_passed():
    assert run("print('hello')\nassert sorted([2, 1]) == [1, 2]") == SandboxResult("passed")
    assert run("").passed


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import numpy", "No module named 'numpy'"),
        ("input()", "EOFError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise SystemExit", "exited before its end"),
        ("import sys; sys.exit(0)", "exited before its end"),
        ("import os; os._exit(0)", "without a verdict"),
        ("import os; os.abort()", "without a verdict"),
        ("x = '\ud800'\nassert 0", "Error"),
        ("\x00", "Error"),
        ("(" * 5000, "Error"),
    ],
)
def test_program_that_does_not_end_well_has_failed(source, output):
    result = run(source)
    assert result.status == "failed"
    assert output in result.stderr


def test_trace_shows_the_program_and_not_the_sandbox():
    result = run("def f():\n    assert False\nf()")
    assert '"<program>", line 3' in result.stderr
    assert "sandbox" not in result.stderr
    assert "confined" not in result.stderr


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "9 ** 9 ** 9",
        "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        "import signal, time\nfor n in 2, 15: signal.signal(n, signal.SIG_IGN)\ntime.sleep(99)",
        "from threading import Thread\nThread(target=print).start()\nwhile 1: 0",
    ],
)
def test_endless_program_is_stopped(source):
    begin = time.monotonic()
    assert run(source, seconds=1).status == "timeout"
    assert time.monotonic() - begin < 60


def test_running_thread_does_not_delay_the_end():
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()"
    assert run(source) == SandboxResult("passed")


@needs_linux
@pytest.mark.parametrize(
    "source",
    [
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = bytearray(1 << 40)",
        "x = 'x'\nwhile True: x += x",
        "x = list(range(10 ** 9))",
    ],
)
def test_memory_use_is_limited(source):
    assert run(source, memory_mb=200).status == "memory"


def test_memory_limit_is_the_given_one():
    source = "x = bytearray(300 << 20)"
    assert run(source, memory_mb=600).status == "passed"
    if sys.platform == "linux":
        assert run(source, memory_mb=200).status == "memory"


def test_working_directory_is_writable_and_deleted():
    source = """
        import os, pathlib, shutil, sqlite3, tempfile
        pathlib.Path("a").write_text("x")
        assert open(os.path.abspath("a")).read() == "x"
        os.makedirs("deep/er")
        os.rename("a", "deep/er/a")
        shutil.rmtree("deep")
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "b").touch()
        with tempfile.NamedTemporaryFile("w+") as file:
            file.write("x")
        sqlite3.connect("base").execute("create table t (a)")
        sqlite3.connect(":memory:")
        open("/dev/null", "w").write("x")
        os.mkdir("left", mode=0)
    """
    assert run(source) == SandboxResult("passed")


def test_output_is_capped():
    assert run("for _ in range(100): print('x' * 1_000_000)") == SandboxResult("passed")
    result = run("import sys\nfor _ in range(9): sys.stderr.write('x' * 1_000_000)\n1 / 0")
    assert result.status == "failed"
    assert len(result.stderr) <= sandbox.TAIL_BYTES
    assert result.stderr.endswith("ZeroDivisionError: division by zero")
    assert run("import sys\nwhile True: sys.stderr.write('x' * 1_000_000)").status == "failed"
    assert run("import os\nos.write(2, bytes(range(256)))\n1 / 0").status == "failed"


def test_program_has_no_environment_no_input_and_no_packages(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    source = """
        import os, sys
        assert "SECRET" not in os.environ and "PATH" not in os.environ
        assert sys.stdin.read() == ""
        assert not any("site-packages" in path for path in sys.path)
        assert __name__ != "__main__"
        import collections, dataclasses, datetime, decimal, functools, heapq, itertools, json, math
        import random, re, statistics, string, typing, uuid, zoneinfo

        @dataclasses.dataclass
        class Point:
            x: "int"

        assert Point(1).x == 1
    """
    assert run(source) == SandboxResult("passed")


def test_order_of_sets_is_the_same_in_all_runs():
    source = "assert 0, list({'one', 'two', 'three', 'four', 'five'})"
    assert run_program(source).stderr == run_program(source).stderr


@pytest.mark.parametrize("layers", [sandbox.LAYERS, *WEAKER], ids="+".join)
def test_program_ends_with_its_caller(layers, tmp_path):
    """Even where nobody is left to kill it: killed callers cannot clean up."""
    require(*layers)
    caller = (
        "import pathlib; from eval import sandbox\n"
        f"sandbox.START = pathlib.Path({str(sandbox.START)!r})\n"
        f"sandbox.layers = lambda: {layers}\nprint('on', flush=True)\n"
        "sandbox.run_program('import time; time.sleep(600)', seconds=600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", caller],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )
    assert process.stdout
    assert process.stdout.readline() == b"on\n"
    end = time.monotonic() + 60
    while not own_processes() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    while own_processes() and time.monotonic() < end:
        time.sleep(0.1)
    assert not own_processes()


def test_sandbox_that_cannot_start_is_an_error_not_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "START", tmp_path / "absent.py")
    with pytest.raises(RuntimeError, match="did not start"):
        sandbox._run([[""]], Suite(), 20, 1024, ())


def test_system_without_limits_is_refused_in_one_line(monkeypatch):
    sandbox.layers.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.os, "name", "nt")
        with pytest.raises(UserError, match="Linux or macOS"):
            run_program("")
