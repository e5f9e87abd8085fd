"""Hostile programs: none passes, none leaves anything outside, the next program runs.

In all layers, and in those of a container without namespaces, there with and without the hook.
"""

import os
import secrets
import socket

import pytest

from eval import sandbox
from eval.sandbox import SandboxResult, Suite
from tests.support.attacks import ATTACKS
from tests.support.sandbox import needs_linux, require

resource = pytest.importorskip("resource")
pytestmark = needs_linux
KERNEL, NO_NAMESPACES, NO_HOOK = sandbox.LAYERS, sandbox.LAYERS[1:], sandbox.LAYERS[1:3]
QUICK = ("forging", "equality")
TOKEN = secrets.token_hex(16)
SECONDS = 3.0


def state() -> tuple:
    """What a program could change of this process."""
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    return priority, limits, os.sched_getaffinity(0), os.sched_getscheduler(0)


@pytest.fixture
def outside(tmp_path):
    """A folder with a file, and a listening socket; afterwards both are as they were."""
    file = tmp_path / "file"
    file.write_text(f"assert steal() == '{TOKEN}'")
    status = file.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = state()
        yield {
            "file": file,
            "folder": tmp_path,
            "port": server.getsockname()[1],
            "pid": os.getpid(),
        }
        assert state() == before
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    after = file.stat()
    assert (after.st_mode, after.st_mtime, after.st_size) == (
        status.st_mode, status.st_mtime, status.st_size,
    )  # fmt: skip
    assert not os.path.exists("/dev/shm/orthrus-x")


def check_held(source: str, expected: str, layers: tuple[str, ...], places: dict) -> None:
    require(*layers)
    for name, place in places.items():
        source = source.replace(f"{{{name}}}", str(place))
    if "def act" in source:
        source += "\ndef steal():\n act()\n return 'done'"
    suite = Suite(f"assert steal() == '{expected}'", "", ("steal",))
    result = sandbox._run([[source]], suite, SECONDS, 1024, layers)
    assert not result.passed
    assert "SyntaxError" not in result.stderr
    assert sandbox._run([["x = 1"]], Suite("assert x == 1", "", ("x",)), 60, 1024, layers).passed


def attacks(families: tuple[str, ...]) -> list:
    return [
        pytest.param(family, number, id=f"{family}-{number}")
        for family in families
        for number in range(len(ATTACKS[family]))
    ]


@pytest.mark.parametrize(("family", "number"), attacks(QUICK))
def test_forged_verdict_and_equal_object_do_not_pass(family, number, outside):
    check_held(ATTACKS[family][number], TOKEN, KERNEL, outside)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [KERNEL, NO_NAMESPACES, NO_HOOK], ids="+".join)
@pytest.mark.parametrize(("family", "number"), attacks(tuple(ATTACKS)))
def test_attack_does_not_pass_and_leaves_nothing(family, number, layers, outside):
    source = ATTACKS[family][number]
    if "addaudithook" in source and "audit" not in layers:
        pytest.skip("without the hook, another one is harmless")
    if "/cmdline" in source and "landlock" not in layers and "namespaces" not in layers:
        pytest.skip("command lines are readable to all users")
    expected = TOKEN if family in ("forging", "reading", "equality") else "done"
    check_held(source, expected, layers, outside)


def test_attacks_are_at_least_65():
    assert sum(map(len, ATTACKS.values())) >= 65


def test_right_answer_to_the_attacked_test_passes():
    """Or no attack would show anything."""
    suite = Suite(f"assert steal() == '{TOKEN}'", "", ("steal",))
    program = f"def steal(): return '{TOKEN}'"
    assert sandbox.check_program([[program]], suite, seconds=60) == SandboxResult("passed")
