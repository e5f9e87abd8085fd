"""Run a generated program against tests, with limits of time, memory, files, processes and network.

Program and tests run in two processes (eval/confined): the tests' calls the program's functions by
value and gives the verdict, signed with a nonce. Each is a fresh interpreter with only the standard
library, an empty environment, no input, and a directory that is deleted afterwards. These layers
guard both, each where the system has it:

- Linux namespaces: no network, no sight of other processes, all mounts read-only but the directory;
- Landlock: nothing is read but libraries, nothing written but the directory;
- seccomp (x86-64 and ARM64): no new process, program, socket or signal, nothing of other processes;
- resource limits: address space (not on macOS), CPU time, file size, open files;
- an audit hook in the program's process: the first forbidden attempt ends it and is named;
- a wall clock: both process groups are killed. Both die with the process that started them.

`layers` says which hold. It is no security boundary: the program shares the kernel. For hostile
code use a virtual machine.
"""

import contextlib
import ctypes
import functools
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, cast

from eval.confined.limits import FOLDER_BYTES, FOLDER_FILES, SET_DUMPABLE
from orthrus_jax.errors import UserError

START = pathlib.Path(__file__).parent / "confined" / "start.py"
# No site packages, no user's modules, no bytecode left.
PYTHON = (sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8")
LAYERS = ("namespaces", "landlock", "seccomp", "audit")
TAIL_BYTES = 2000
START_SECONDS, START_MEMORY_MB = 60.0, 1024  # of an empty program
LOOK_SECONDS = 0.1  # between looks at a directory that no mount limits

Status = Literal["passed", "failed", "timeout", "memory", "blocked"]


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Attributes:
      status: `passed`: the tests ran to their last line; `blocked`: the program tried something
        forbidden; `failed`: anything else, an exception, a crash, an early exit.
      stderr: the end of the program's error output, and of the tests' report.
      layers: those that held in both processes ("audit": in the program's).
    """

    status: Status
    stderr: str = ""
    layers: tuple[str, ...] = field(default=(), compare=False)

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@dataclass(frozen=True)
class Suite:
    """What a program has to pass.

    Attributes:
      code: runs to its end if the program is right.
      helpers: code that it needs, run before.
      names: those of the program's objects that it uses.
    """

    code: str = ""
    helpers: str = ""
    names: tuple[str, ...] = ()


Parts = Sequence[Sequence[str]]  # of a program, run in one module; each in versions


class _Process:
    """One of the two confined processes, with its directory and its error output."""

    def __init__(self, role: str, directory: str, settings: dict[str, Any], pass_fds: list[int]):
        self.directory = os.path.join(directory, role)
        os.mkdir(self.directory)
        whole = settings | {"directory": os.path.realpath(self.directory), "parent": os.getpid()}
        # A file, no pipe: nobody can keep it from ending.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - `close` does
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(whole).encode())
            stdin.seek(0)
            self.process = subprocess.Popen(
                [*PYTHON, str(START), role],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
                cwd=self.directory,
                env={"PYTHONHASHSEED": "0"},  # a verdict is the same tomorrow
                pass_fds=pass_fds,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End the process and all of its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or (macOS) ending
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it, and let its error output go."""
        self.kill()
        self.stderr.close()

    def exit_code(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if the process lives on for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def tail(self) -> str:
        """The end of its error output."""
        size = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(size - TAIL_BYTES, 0))
        return self.stderr.read().decode("utf-8", "replace").strip()


@contextlib.contextmanager
def _started(
    parts: Parts, tests: Suite, limits: dict[str, Any], nonce: str
) -> Iterator[tuple[_Process, _Process, BinaryIO]]:
    """The program's process, the tests', and the file of the verdict; afterwards all are gone."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="orthrus-", ignore_cleanup_errors=True)
        )
        result = stack.enter_context(tempfile.TemporaryFile())
        with contextlib.ExitStack() as pipes:
            (asked, asking), (answered, answering) = os.pipe(), os.pipe()
            for end in (asked, asking, answered, answering):
                pipes.callback(os.close, end)
            settings = limits | {"parts": parts, "questions": asked, "answers": answering}
            program = _Process("program", directory, settings, [asked, answering])
            stack.callback(program.close)
            settings = limits | {"tests": tests.code, "helpers": tests.helpers}
            settings |= {"names": tests.names, "questions": asking, "answers": answered}
            settings |= {"result": result.fileno(), "nonce": nonce}
            judge = _Process("judge", directory, settings, [asking, answered, result.fileno()])
            stack.callback(judge.close)
        yield program, judge, result


def _is_full(directory: str) -> bool:
    """Whether a directory holds more than a sandbox may."""
    size = files = 0
    for folder, _, names in os.walk(directory):
        files += 1 + len(names)
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_blocks * 512
        if size > FOLDER_BYTES or files > FOLDER_FILES:
            return True
    return False


def _wait(program: _Process, judge: _Process, seconds: float, mounted: bool) -> str:
    """Wait for the judge; return "ended", "late", or "full" for a program that fills the disk."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if judge.exit_code(left if mounted else min(left, LOOK_SECONDS)) is not None:
            return "ended"
        if not mounted and _is_full(program.directory):
            return "full"
    return "late"


def _run(
    parts: Parts, tests: Suite, seconds: float, memory_mb: int, wanted: Sequence[str]
) -> SandboxResult:
    """Run in the wanted layers; the result names those that held."""
    nonce = secrets.token_hex(16)
    limits = {"seconds": seconds, "memory_mb": memory_mb, "layers": wanted}
    with _started(parts, tests, limits, nonce) as (program, judge, result):
        end = _wait(program, judge, seconds, mounted="namespaces" in wanted)
        if end == "full":
            return SandboxResult("failed", "the program filled its directory")
        if end == "late":
            program.kill()
            return SandboxResult("timeout", program.tail())
        result.seek(0)
        lines = [json.loads(line) for line in result.read().splitlines()]
        return _result([line for line in lines if line["nonce"] == nonce], program, judge)


def _result(verdict: list[dict[str, Any]], program: _Process, judge: _Process) -> SandboxResult:
    """Read the verdict: a line when both have started, and a line at the end."""
    if not verdict:
        code = program.exit_code(1)
        reason = f"{program.tail()} {judge.tail()}".strip()
        raise RuntimeError(f"the sandbox did not start (exit {code}): {reason}")
    there, here = verdict[0]["program_held"], verdict[0]["held"]
    held = tuple(name for name in LAYERS if name in there and (name in here or name == "audit"))
    # A process that is killed, and not by us: the kernel was out of memory.
    failed = lambda code: "memory" if code == -signal.SIGKILL else "failed"
    if len(verdict) < 2:
        code = judge.exit_code(0)
        status, note = failed(code), f"the tests ended without a verdict (exit {code})"
    else:
        status, note = verdict[1]["status"], verdict[1]["note"]
    if status == "ended":
        code = program.exit_code(1)
        status, note = failed(code), f"ended without a verdict (exit {code})"
    elif status == "blocked":
        note = f"not allowed: {note}"
    program.kill()
    stderr = f"{program.tail()}\n{note}".strip()[-TAIL_BYTES:]
    return SandboxResult(cast(Status, status), stderr, held)


@functools.cache
def layers() -> tuple[str, ...]:
    """The layers that hold on this system, of `LAYERS`; many containers forbid namespaces.

    Raises:
      UserError: on systems that cannot limit a process.
      RuntimeError: if the sandbox cannot start.
    """
    if os.name != "posix":
        raise UserError(
            "running generated code needs Linux or macOS: this system cannot limit a process; "
            "leave out --allow-code-execution, or use WSL"
        )
    wanted: Sequence[str] = LAYERS if sys.platform == "linux" else ("audit",)
    try:
        result = _run([], Suite(), START_SECONDS, START_MEMORY_MB, wanted)
    except RuntimeError:
        if "namespaces" not in wanted:
            raise
        result = _run([], Suite(), START_SECONDS, START_MEMORY_MB, wanted[1:])
    if not result.passed:
        raise RuntimeError(f"the sandbox did not start ({result.status}): {result.stderr}")
    return result.layers


def describe(held: Sequence[str]) -> str:
    """What the kernel guarantees of a program in these layers, and what not, in one line."""
    claims = (
        ("writes to its own directory only", {"namespaces", "landlock"}),
        ("reads libraries only", {"landlock"}),
        ("starts no process, reaches no other process and no network", {"namespaces", "seccomp"}),
    )
    holds = ", ".join(claim for claim, layers in claims if layers & {*held})
    fails = ", ".join(claim for claim, layers in claims if not layers & {*held})
    parts = [f"sandbox: {', '.join(held) or 'resource limits only'}"]
    parts += [f"a program {holds}"] if holds else []
    parts += [f"not guaranteed: it {fails}"] if fails else []
    return "; ".join(parts)


def admit(unconfined: bool) -> tuple[str, ...]:
    """Print which layers hold here; return them.

    Where none of them keeps a program from this process's memory and environment, the kernel is
    told to show those to no other process of this user.

    Args:
      unconfined: whether programs may run without namespaces too.

    Raises:
      UserError: where the system offers no namespaces and `unconfined` does not allow that.
      RuntimeError: if the sandbox cannot start.
    """
    held = layers()
    if "namespaces" not in held and not unconfined:
        raise UserError(
            f"--allow-code-execution: this system offers no namespaces; {describe(held)}; "
            "give --unconfined too to run programs all the same, or use another machine"
        )
    if sys.platform == "linux" and not {"namespaces", "landlock"} & {*held}:
        ctypes.CDLL(None).prctl(SET_DUMPABLE, *[ctypes.c_long(0)] * 4)
    print(describe(held), file=sys.stderr)
    return held


def check_program(
    parts: Parts, tests: Suite, *, seconds: float = 10, memory_mb: int = 1024
) -> SandboxResult:
    """Run a program, then tests of it, to the end or to the first limit; nothing of them remains.

    Its standard output is thrown away; `if __name__ == "__main__"` does not hold in it.

    Args:
      parts: run one after the other in one module; of each, the first version that compiles.
      tests: run in a process of their own; only they decide whether the program has passed.
      seconds: of wall clock, for all of it.
      memory_mb: address space, of each process.

    Raises:
      UserError: on systems that cannot limit a process.
      RuntimeError: if the sandbox cannot start, or a layer holds no longer.
    """
    wanted = layers()
    result = _run(parts, tests, seconds, memory_mb, wanted)
    if result.layers and result.layers != wanted:
        raise RuntimeError(f"the sandbox did not start: {result.layers} hold, not {wanted}")
    return result


def run_program(source: str, **limits: Any) -> SandboxResult:
    """Run a program without tests: `passed` says only that its process claims to have run it all.

    `limits` and errors are those of `check_program`.
    """
    return check_program([[source]], Suite(), **limits)
