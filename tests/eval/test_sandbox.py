"""Programs that try everything they may not: each is stopped and reported, nothing of it remains,
and the next one runs. The kernel's layers are also tried alone, with the audit hook off."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from eval import sandbox
from eval.sandbox import Outcome, check_humaneval, check_mbpp, program_of, run_program
from orthrus_jax.errors import UserError
from tests.support.paths import DATA

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no limits to set here")
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
needs_filter = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"),
    reason="no system call filter here",
)


@pytest.fixture
def namespaces():
    if not sandbox.has_namespaces():
        pytest.skip("no namespaces here")


def own_processes() -> list[str]:
    """The command lines of sandboxed programs still alive; zombies have none."""
    found = []
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(sandbox.CHILD) in line:
            found.append(line)
    return found


def own_folders() -> list[pathlib.Path]:
    return list(pathlib.Path(tempfile.gettempdir()).glob("orthrus-*"))


@pytest.fixture(autouse=True)
def nothing_remains():
    before = set(own_folders())
    yield
    assert set(own_folders()) <= before
    end = time.monotonic() + 5
    while own_processes() and time.monotonic() < end:  # the last ones are being reaped
        time.sleep(0.05)
    assert not own_processes()


def run(source: str, **limits) -> Outcome:
    """Run a program, and after it one that must not notice."""
    found = run_program(textwrap.dedent(source), **{"seconds": 20} | limits)
    assert run_program("assert 1 + 1 == 2", seconds=60) == Outcome("passed")
    return found


def test_a_program_that_ends_has_passed():
    assert run("print('hello')\nassert sorted([2, 1]) == [1, 2]") == Outcome("passed")
    assert run("").passed


@pytest.mark.parametrize(
    ("source", "said"),
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
def test_a_program_that_does_not_end_well_has_failed(source, said):
    found = run(source)
    assert found.status == "failed"
    assert said in found.stderr


def test_the_trace_shows_the_program_and_not_the_sandbox():
    found = run("def f():\n    assert False\nf()")
    assert '"<program>", line 3' in found.stderr
    assert "sandbox" not in found.stderr


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
def test_a_program_without_end_is_stopped(source):
    begin = time.monotonic()
    assert run(source, seconds=1).status == "timeout"
    assert time.monotonic() - begin < 60


def test_a_thread_left_behind_does_not_hold_up_the_end():
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()"
    assert run(source) == Outcome("passed")


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
def test_a_memory_balloon_bursts(source):
    assert run(source, memory_mb=200).status == "memory"


def test_the_memory_limit_is_the_one_asked_for():
    source = "x = bytearray(300 << 20)"
    assert run(source, memory_mb=600).status == "passed"
    if sys.platform == "linux":
        assert run(source, memory_mb=200).status == "memory"


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ("import os\nwhile True: os.fork()", "os.fork"),
        ("import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass", "os.fork"),
        ("import pty\npty.fork()", "os.forkpty"),
        ("import os\nos.system('true')", "os.system"),
        ("import os\nos.posix_spawn('/bin/true', ['true'], {})", "os.posix_spawn"),
        ("import os\nos.execv('/bin/true', ['true'])", "os.exec"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
        ("import os\nos.popen('true')", "subprocess.Popen"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "os.fork"),
        ("import multiprocessing as m\nm.get_context('spawn').Process(target=print).start()", ""),
        ("import os\nos.kill(os.getppid(), 0)", "os.kill"),
        ("import ctypes\nctypes.CDLL(None).fork()", "ctypes.dlopen"),
        ("import _ctypes\n_ctypes.dlopen(None, 0)", "ctypes.dlopen"),
    ],
)
def test_a_fork_bomb_does_not_go_off(source, event):
    found = run(source)
    assert found.status == "blocked"
    assert f"not allowed: {event}" in found.stderr


@needs_filter
@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import os\nos.forkpty()",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.execv('/bin/true', ['true'])",
        "import subprocess\nsubprocess.run(['true'])",
        "import multiprocessing as m\nm.get_context('spawn').Process(target=print).start()",
        "import os\nos.kill(os.getpid(), 0)",
        "import socket\nsocket.socket()",
        "import asyncio\nasyncio.run(asyncio.sleep(0))",  # opens a pair of sockets
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0, 'PermissionError'",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'PermissionError'",
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_the_kernel_refuses_processes_and_sockets_by_itself(source, within):
    if within and not sandbox.has_namespaces():
        pytest.skip("no namespaces here")
    found = sandbox._run(source, 20, 1024, namespaces=within, audit=False)
    assert found.status == "failed"
    assert "PermissionError" in found.stderr


@needs_filter
def test_the_kernel_still_lets_threads_run():
    source = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert run(source).passed


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ("open({file!r}, 'w')", "open"),
        ("open({file!r}, 'a')", "open"),
        ("open({file!r}, 'r+')", "open"),
        ("open({file!r}.encode(), 'wb')", "open"),
        ("import pathlib\npathlib.Path({file!r}).write_text('x')", "open"),
        ("import os\nos.open({file!r}, os.O_RDWR)", "open"),
        ("import os\nos.chdir('/')\nopen({file!r}[1:], 'w')", "open"),
        ("import os\nos.symlink({file!r}, 'link')\nopen('link', 'w')", "open"),
        ("try: open({file!r}, 'w')\nexcept BaseException: pass", "open"),
        ("import os\nos.remove({file!r})", "os.remove"),
        ("import os\nos.rename({file!r}, 'mine')", "os.rename"),
        ("import os\nopen('mine', 'w')\nos.rename('mine', {file!r})", "os.rename"),
        ("import os\nos.link({file!r}, 'mine')", "os.link"),
        ("import os\nos.truncate({file!r}, 0)", "os.truncate"),
        ("import os\nos.chmod({file!r}, 0)", "os.chmod"),
        ("import os\nos.mkdir({file!r} + 'x')", "os.mkdir"),
        ("import shutil\nshutil.rmtree({folder!r})", "os."),
        ("import sqlite3\nsqlite3.connect({file!r} + 'x')", "sqlite3.connect"),
    ],
)
def test_a_write_outside_is_stopped(source, event, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "file"
    file.write_text("kept")
    found = run(source.format(file=str(file), folder=str(folder)))
    assert found.status == "blocked"
    assert f"not allowed: {event}" in found.stderr
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "file"]
    assert file.read_text() == "kept"
    assert file.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize(
    "source",
    [
        "open({file!r}, 'w')",
        "import os\nos.remove({file!r})",
        "import os\nos.mkfifo({file!r} + 'x')",
        "import os\nos.chdir({folder!r})\nos.mknod('x')",
    ],
)
def test_the_kernel_refuses_a_write_outside_by_itself(source, namespaces, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    source = source.format(file=str(file), folder=str(tmp_path))
    found = sandbox._run(source, 20, 1024, namespaces=True, audit=False)
    assert found.status == "failed"
    assert "Read-only file system" in found.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "kept"


def test_in_namespaces_other_processes_are_out_of_sight(namespaces):
    source = "import os\nassert [n for n in os.listdir('/proc') if n.isdecimal()] == ['1']"
    assert run(source) == Outcome("passed")


def test_mounts_cannot_be_made_writable_again(namespaces):
    source = """
        import ctypes
        libc = ctypes.CDLL(None)
        remount, bind = 32, 4096
        assert libc.mount(b"none", b"/", None, remount | bind, None) != 0
        assert libc.umount2(b"/proc", 2) != 0
    """
    found = sandbox._run(textwrap.dedent(source), 20, 1024, namespaces=True, audit=False)
    assert found == Outcome("passed")


def test_the_working_directory_is_writable_and_goes_away():
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
    assert run(source) == Outcome("passed")


@pytest.mark.parametrize("within", [False, True])
def test_files_are_limited_in_size(within):
    if within and not sandbox.has_namespaces():
        pytest.skip("no namespaces here")
    source = "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))"
    found = sandbox._run(source, 20, 1024, namespaces=within)
    assert found.status == "failed"
    assert "File too large" in found.stderr


def test_many_files_do_not_fill_the_disk(namespaces):
    source = "for n in range(20): open(str(n), 'wb').write(bytes(8 << 20))"
    found = run(source)
    assert found.status == "failed"
    assert "No space left" in found.stderr


def test_output_is_capped():
    assert run("for _ in range(100): print('x' * 1_000_000)") == Outcome("passed")
    found = run("import sys\nfor _ in range(9): sys.stderr.write('x' * 1_000_000)\n1 / 0")
    assert found.status == "failed"
    assert len(found.stderr) <= sandbox.TAIL_BYTES
    assert found.stderr.endswith("ZeroDivisionError: division by zero")
    assert run("import sys\nwhile True: sys.stderr.write('x' * 1_000_000)").status == "failed"
    assert run("import os\nos.write(2, bytes(range(256)))\n1 / 0").status == "failed"


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=5)",
        "import socket\nsocket.getaddrinfo('example.org', 80)",
        "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    ],
)
def test_the_network_is_out_of_reach(source):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        found = run(source.format(port=server.getsockname()[1]))
        assert found.status == "blocked"
        assert "not allowed: socket." in found.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_program_sees_no_environment_no_input_and_no_packages(monkeypatch):
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
    assert run(source) == Outcome("passed")


def test_sets_of_words_have_one_order_in_all_runs():
    source = "assert 0, list({'one', 'two', 'three', 'four', 'five'})"
    assert run_program(source).stderr == run_program(source).stderr


def test_the_end_of_the_caller_is_the_end_of_the_program(tmp_path):
    """Even where nobody is left to kill it: killed callers cannot clean up."""
    caller = (
        "import sys; from eval import sandbox; sandbox.has_namespaces(); print('on', flush=True)\n"
        "sandbox.run_program('import time; time.sleep(600)', seconds=1)"
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


def test_a_sandbox_that_cannot_start_is_no_failed_program(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "absent.py")
    with pytest.raises(RuntimeError, match="did not start"):
        sandbox._run("", 20, 1024, namespaces=False)


def test_a_system_without_limits_is_refused_in_one_line(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.os, "name", "nt")
        with pytest.raises(UserError, match="Linux or macOS"):
            run_program("")


def test_without_namespaces_the_audit_hook_still_stands(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
    file = tmp_path / "file"
    assert run(f"open({str(file)!r}, 'w')").status == "blocked"
    assert not file.exists()
    assert run("open('inside', 'w')").passed
    assert run("while True: pass", seconds=1).status == "timeout"


# The benchmarks

TASK = {
    "task_id": "HumanEval/x",
    "prompt": 'from typing import List\n\n\ndef helper(x):\n    return x\n\n\n'
    'def total(numbers: List[int]) -> int:\n    """Add up."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n",
}  # fmt: skip
RIGHT = "def total(numbers: List[int]) -> int:\n    return helper(sum(numbers))\n"
WRONG = RIGHT.replace("sum", "max")


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("    return sum(numbers)\n", "passed"),  # as a base model continues the prompt
        ("    return 0\n", "failed"),
        ("", "failed"),
        ("\x00", "failed"),
        (RIGHT, "passed"),
        (WRONG, "failed"),
        (f"Sure!\n```python\n{RIGHT}```\nThis adds.", "passed"),
        (f"Sure!\n```Python3\r\n{RIGHT}```", "passed"),
        (f"```\n{RIGHT}```", "passed"),
        (f"```python\n{WRONG}```\nWait.\n```python\n{RIGHT}```", "passed"),
        (f"```python\n{RIGHT}```\nWait.\n```python\n{WRONG}```", "failed"),
        (f"```python\n{RIGHT}```\nUse it:\n```python\nprint(total([1]))\n```", "passed"),
        (f"```bash\npip install x\n```\nthen\n```python\n{RIGHT}```\n```text\n3\n```", "passed"),
        (f"```python\n{RIGHT}", "passed"),  # cut off after the code
        (f"```python\n{RIGHT}\nassert total([1, 2]) == 4\n```", "failed"),
        (f"```python\n{RIGHT}\nif __name__ == '__main__':\n    print(input())\n```", "passed"),
        (f"```python\n{RIGHT}\nimport sys; sys.exit(0)\n```", "failed"),
        ("```python\n    return sum(numbers)\n```", "passed"),
        ("I cannot do that.", "failed"),
    ],
)
def test_a_humaneval_answer_is_found_and_tested(completion, status):
    assert check_humaneval(TASK, completion).status == status


def test_an_mbpp_answer_is_found_and_tested():
    task = {
        "test_setup_code": "start = 1",
        "test_list": ["assert add(start, 2) == 3", "assert set(add([1], [2])) == {1, 2}"],
    }
    right, wrong = "def add(a, b):\r\n    return a + b", "def add(a, b):\n    return a - b"
    assert check_mbpp(task, right).passed
    assert check_mbpp(task, wrong).status == "failed"
    assert check_mbpp(task, "def sub(a, b):\n    return a + b").status == "failed"
    assert check_mbpp(task, f"```python\n{right}\n```\n```python\nprint(add(1, 2))\n```").passed
    assert check_mbpp(task, "while True: pass", seconds=1).status == "timeout"
    assert check_mbpp(task, "import os\nos.fork()").status == "blocked"


def test_the_program_of_an_answer():
    assert program_of("x = 1", {"f"}) == "x = 1"
    assert program_of("```python\na\n```\n```python\nb\n```", set()) == "b\n"
    assert program_of("```python\ndef f(): 1\n```\n```python\nf()\n```", {"f"}) == "def f(): 1\n"
    assert program_of("```python\ndef fun(): 1\n```\n```python\nf()\n```", {"f"}) == "f()\n"
    assert program_of("```\n", {"f"}) == ""


def tasks(name: str, step: int) -> list[dict]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[::step]]


def check_solutions(humaneval: int, mbpp: int) -> None:
    for task in tasks("humaneval.jsonl", humaneval):
        assert check_humaneval(task, task["canonical_solution"]).passed, task["task_id"]
        chat = f"```python\n{task['prompt']}{task['canonical_solution']}```"
        assert check_humaneval(task, chat).passed, task["task_id"]
        found = check_humaneval(task, "    return NotImplemented\n")
        assert found.status == "failed", task["task_id"]
    for task in tasks("mbpp.jsonl", mbpp):
        assert check_mbpp(task, task["code"]).passed, task["task_id"]
        broken = task["code"].replace("return", "return None and")
        assert "return" not in broken or not check_mbpp(task, broken).passed, task["task_id"]


@needs_data
def test_the_authors_solutions_pass_and_broken_ones_fail_for_some_tasks():
    check_solutions(humaneval=8, mbpp=48)  # 21 of each


@needs_data
@pytest.mark.slow
def test_the_authors_solutions_pass_and_broken_ones_fail_for_all_tasks():
    check_solutions(humaneval=1, mbpp=1)
