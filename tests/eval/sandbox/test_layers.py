"""Each layer stops what it is there for, alone: the audit hook, seccomp, Landlock, namespaces."""

import json
import os
import socket
import subprocess
import sys

import pytest

from eval import harness, report, sandbox
from eval.confined import filter
from eval.sandbox import SandboxResult
from orthrus_jax.errors import UserError
from tests.support.paths import ROOT
from tests.support.sandbox import (
    WEAKER,
    needs_filter,
    needs_linux,
    needs_posix,
    require,
    run,
    run_beside_a_file,
    run_in,
)

pytestmark = needs_posix
WITH_NAMESPACES, WITHOUT = ("namespaces", "seccomp"), ("landlock", "seccomp")


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
@pytest.mark.parametrize("layers", [("seccomp",), WITH_NAMESPACES])
def test_kernel_filter_alone_refuses_processes_and_sockets(source, layers):
    result = run_in(layers, source)
    assert result.status == "failed"
    assert "PermissionError" in result.stderr


@needs_filter
def test_kernel_filter_allows_threads():
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
        ("import shutil\nshutil.rmtree({folder!r})", "open"),
        ("import sqlite3\nsqlite3.connect({file!r} + 'x')", "sqlite3.connect"),
    ],
)
def test_write_outside_is_stopped(source, event, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "file"
    file.write_text("kept")
    result = run(source.format(file=str(file), folder=str(folder)))
    assert result.status == "blocked"
    assert f"not allowed: {event}" in result.stderr
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
def test_namespaces_alone_refuse_a_write_outside(source, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    source = source.format(file=str(file), folder=str(tmp_path))
    result = run_in(("namespaces",), source)
    assert result.status == "failed"
    assert "Read-only file system" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "kept"


def test_namespaces_hide_other_processes():
    source = "import os\nassert [n for n in os.listdir('/proc') if n.isdecimal()] == ['1']"
    assert run_in(("namespaces",), source) == SandboxResult("passed")


def test_mounts_cannot_be_made_writable_again():
    source = """
        import ctypes
        libc = ctypes.CDLL(None)
        remount, bind = 32, 4096
        assert libc.mount(b"none", b"/", None, remount | bind, None) != 0
        assert libc.umount2(b"/proc", 2) != 0
    """
    assert run_in(("namespaces",), source) == SandboxResult("passed")


@pytest.mark.parametrize("layers", [("audit",), WITH_NAMESPACES])
def test_files_are_limited_in_size(layers):
    result = run_in(layers, "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))")
    assert result.status == "failed"
    assert "File too large" in result.stderr


def test_many_files_do_not_fill_the_disk():
    large = "for n in range(20): open(str(n), 'wb').write(bytes(8 << 20))"
    small = "for n in range(20_000): open(str(n), 'wb').close()"
    for source in (large, small):
        result = run_in(WITH_NAMESPACES, source)
        assert result.status == "failed"
        assert "No space left" in result.stderr


def test_many_files_do_not_fill_the_disk_without_namespaces():
    large = "for n in range(20): open(str(n), 'wb').write(bytes(8 << 20))"
    small = "for n in range(20_000): open(str(n), 'wb').close()"
    for source in (large, small):
        result = run_in(WITHOUT, f"{source}\nimport time\ntime.sleep(60)")
        assert result == SandboxResult("failed", "the program filled its directory")


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=5)",
        "import socket\nsocket.getaddrinfo('example.org', 80)",
        "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    ],
)
def test_network_is_out_of_reach(source):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        result = run(source.format(port=server.getsockname()[1]))
        assert result.status == "blocked"
        assert "not allowed: socket." in result.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_audit_hook_holds_alone(tmp_path):
    file = tmp_path / "file"
    assert run_in(("audit",), f"open({str(file)!r}, 'w')").status == "blocked"
    assert not file.exists()
    assert run_in(("audit",), "open('inside', 'w')").passed


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
def test_new_processes_are_stopped(source, event):
    result = run(source)
    assert result.status == "blocked"
    assert f"not allowed: {event}" in result.stderr


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.open({name!r}, os.O_WRONLY, dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import os\nos.remove({name!r}, dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import os\nos.fchmod(os.open({file!r}, os.O_RDONLY), 0)",
        "import os\nos.mkfifo({file!r} + 'x')",
        "import _posixshmem, os\n_posixshmem.shm_open('/orthrus-x', os.O_CREAT | os.O_RDWR)",
        "import os\nos.sched_setaffinity(os.getppid(), [0])",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import sys\nsys.modules['eval.confined.hook'].REFUSED.clear()\nimport os\nos.fork()",
        "import gc\n[f for f in gc.get_objects() if getattr(f, '__name__', '') == 'hook']",
        "def f(): pass\nf.__code__ = (lambda: 0).__code__",
        "import sys\nsys.addaudithook(lambda *_: 1 / 0)",
    ],
)
def test_audit_hook_alone_stops_what_leaves_no_trace_or_turns_it_off(source, tmp_path):
    result = run_beside_a_file(("audit",), source, tmp_path)
    assert result.status == "blocked"


@needs_filter
@pytest.mark.parametrize(
    "source",
    [
        "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os\nos.sched_setaffinity(os.getppid(), [0])",
        "import os\nos.fchmod(2, 0)",
        "import os\nos.mkfifo('x')",
        "import os, fcntl, struct\nfcntl.fcntl(2, 8, os.getppid())",  # F_SETOWN: signals by proxy
        "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",  # TIOCSTI: types into a terminal
        "import os\nos.memfd_create('x')",
        "import os\nos.pidfd_open(os.getppid())",
        "import os\nos.setsid()",
        "import os\nos.nice(5)",
    ],
)
def test_kernel_filter_alone_keeps_other_processes_out_of_reach(source):
    before = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    result = run_in(("seccomp",), source)
    assert result.status == "failed"
    assert "PermissionError" in result.stderr
    assert before == (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0))


@pytest.mark.parametrize(
    "source",
    [
        "open({file!r}).read()",
        "open({file!r}, 'a')",
        "import os\nos.open({name!r}, os.O_WRONLY, dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import os\nos.open({name!r}, os.O_WRONLY, dir_fd=os.open({folder!r}, os.O_PATH))",
        "import os\nos.listdir({folder!r})",
        "import os\nos.rename({file!r}, 'mine')",
        "import os\nos.link({file!r}, 'mine')",
        "import os\nos.symlink({file!r}, 'mine')\nopen('mine').read()",
        "import os\nos.truncate({file!r}, 0)",
        "import os\nos.mkdir({file!r} + 'x')",
        "import os\nos.mkfifo({file!r} + 'x')",
        "import _posixshmem, os\n_posixshmem.shm_open('/orthrus-x', os.O_CREAT | os.O_RDWR)",
        "import os\nopen('/proc/%d/environ' % os.getppid()).read()",
        "import os\nopen('/proc/%d/mem' % os.getppid(), 'rb').read(1)",
        "import os\nos.listdir('/proc/%d/fd' % os.getppid())",
        "open('/etc/passwd').read()",
    ],
)
def test_landlock_alone_keeps_files_and_memory_out_of_reach(source, tmp_path):
    result = run_beside_a_file(("landlock",), source, tmp_path)
    assert result.status == "failed"
    assert "PermissionError" in result.stderr or "cross-device" in result.stderr


def answer(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter's program answers to a call, computed as the kernel does."""
    data = {0: number, 4: audit or filter.AUDIT[machine]}
    data |= {16 + 8 * place: value for place, value in enumerate(arguments)}
    program = filter.rules(machine)
    at = loaded = 0
    while True:
        operation, if_true, if_false, operand = program[at]
        if operation == filter.ANSWER:
            return operand
        if operation == filter.LOAD:
            loaded, skip = data[operand], 0
        else:
            holds = {
                filter.EQUAL: loaded == operand,
                filter.AT_LEAST: loaded >= operand,
                filter.HAS_BIT: bool(loaded & operand),
            }[operation]
            skip = if_true if holds else if_false
        at += 1 + skip


@pytest.mark.parametrize("machine", list(filter.AUDIT))
def test_kernel_filter_grants_what_is_listed_and_no_more(machine):
    number = {  # x86-64, ARM64
        "read": (0, 63), "openat": (257, 56), "futex": (202, 98), "getrandom": (318, 278),
        "execve": (59, 221), "socket": (41, 198), "kill": (62, 129), "ptrace": (101, 117),
        "prctl": (157, 167), "mount": (165, 40), "fchmod": (91, 52), "clone": (56, 220),
        "fcntl": (72, 25), "prlimit64": (302, 261), "setpriority": (140 + 1, 140),
    }  # fmt: skip
    number = {name: pair[list(filter.AUDIT).index(machine)] for name, pair in number.items()}
    for name in ("read", "openat", "futex", "getrandom"):
        assert answer(machine, number[name]) == filter.GRANT
    for name in ("execve", "socket", "kill", "ptrace", "prctl", "mount", "fchmod", "setpriority"):
        assert answer(machine, number[name]) == filter.NO_PERMISSION
    for call, arguments, granted in (
        ("clone", (0x3D0F00,), True), ("clone", (17,), False),
        ("fcntl", (2, 1), True), ("fcntl", (2, 8), False), ("fcntl", (2, 10), False),
        ("prlimit64", (0,), True), ("prlimit64", (1,), False),
    ):  # fmt: skip
        expected = filter.GRANT if granted else filter.NO_PERMISSION
        assert answer(machine, number[call], *arguments) == expected
    assert answer(machine, 435) == filter.NO_SUCH_CALL
    assert answer(machine, 0 | filter.FOREIGN_ABI) == filter.NO_PERMISSION
    assert answer(machine, number["read"], audit=0x40000003) == filter.KILL


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("layers", "shown"), [(("landlock",), 1), (("seccomp",), 0)])
def test_memory_is_hidden_from_programs_that_no_layer_keeps_off(layers, shown):
    source = (
        f"import ctypes; from eval import sandbox; sandbox.layers = lambda: {layers}\n"
        f"sandbox.admit(unconfined=True)\nassert ctypes.CDLL(None).prctl(3) == {shown}"
    )
    subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=True)


@pytest.mark.parametrize("layers", WEAKER)
def test_system_without_namespaces_needs_one_more_flag(layers, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sandbox, "layers", lambda: layers)
    row = {"task_id": "x", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row))
    arguments = ["--model", "absent", "--data", str(data), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError) as error:
        harness.main("humaneval", [*arguments, "--allow-code-execution"])
    assert str(error.value).startswith("--allow-code-execution: this system offers no namespaces")
    assert f"sandbox: {', '.join(layers)}" in str(error.value)
    assert "give --unconfined too" in str(error.value)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sandbox, "SET_DUMPABLE", 3)  # only asks
    assert sandbox.admit(unconfined=True) == layers
    assert f"sandbox: {', '.join(layers)}" in capsys.readouterr().err


def test_layers_are_described_by_what_they_hold():
    assert sandbox.describe(sandbox.LAYERS) == (
        "sandbox: namespaces, landlock, seccomp, audit; a program writes to its own directory "
        "only, reads libraries only, starts no process, reaches no other process and no network"
    )
    assert sandbox.describe(("seccomp",)) == (
        "sandbox: seccomp; a program starts no process, reaches no other process and no network; "
        "not guaranteed: it writes to its own directory only, reads libraries only"
    )
    assert "a program" not in sandbox.describe(())


@pytest.mark.slow
def test_layers_are_recorded_in_the_results(tiny_base, tmp_path):
    require("namespaces")
    row = {"task_id": "x", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    arguments = ["--model", str(tiny_base), "--data", str(tmp_path / "data.jsonl")]
    arguments += ["--max-new-tokens", "4", "--mode", "ar", "--out", str(tmp_path / "run")]
    harness.main("humaneval", [*arguments, "--allow-code-execution"])
    result = json.loads((tmp_path / "run" / report.RESULTS).read_text())
    assert result["sandbox"] == list(sandbox.layers())
    assert "namespaces" in (tmp_path / "run" / report.PAGE).read_text()
