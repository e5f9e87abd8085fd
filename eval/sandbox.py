"""Run a generated program with limits of time, memory, files, processes and network.

Each program gets a fresh interpreter with only the standard library, an empty environment, no
input, and a working directory that is deleted afterwards. These layers guard it, each where the
system has it:

- Linux namespaces (`unshare`): no network, no sight of other processes, all mounts read-only but
  the working directory; everything in them dies with the program;
- a seccomp filter (Linux on x86-64 and ARM64): no new process, program, socket or signal;
- resource limits: address space (not on macOS), CPU time, file size, open files;
- an audit hook: the first attempt at a process, a socket, ctypes or a write elsewhere ends the
  program and is reported;
- a wall clock: the whole process group is killed.

This stops accidents, the usual trouble with a model's answers to HumanEval and MBPP. It is no
security boundary: the program shares the kernel and may read all that its user can read, and on
macOS only the audit hook, which a determined program can evade, guards files and the network. For
hostile code use a virtual machine.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orthrus_jax.errors import UserError

CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
# No site packages, no user's modules, no bytecode left.
PYTHON = (sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8")
UNSHARE = (
    *("--user", "--map-root-user", "--mount", "--mount-proc", "--net", "--ipc", "--pid"),
    *("--fork", "--kill-child"),
)
TAIL_BYTES = 2000
FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)

Status = Literal["passed", "failed", "timeout", "memory", "blocked"]


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended, and the end of its or the sandbox's error output.

    Status `passed`: it ran to its last line; `blocked`: it tried something forbidden; `failed`:
    anything else, an exception, a crash, an early exit.
    """

    status: Status
    stderr: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def _tail(file: Any) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - TAIL_BYTES, 0))
    return file.read().decode("utf-8", "replace").strip()


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone, or (macOS) ending
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(code: int | None, verdict: list[str], stderr: str) -> SandboxResult:
    """Read the verdict; `code` is None if time ran out."""
    if code is None or code == -signal.SIGXCPU:
        return SandboxResult("timeout", stderr)
    if "started" not in verdict:
        raise RuntimeError(f"the sandbox did not start (exit {code}): {stderr}")
    match [word.partition(" ") for word in verdict[1:2]]:
        case [("blocked", _, what)]:
            return SandboxResult("blocked", f"{stderr}\nnot allowed: {what}".strip())
        case [("passed" | "failed" | "memory" as status, _, _)]:
            return SandboxResult(status, stderr)
    if code == -signal.SIGKILL:  # not by us: the kernel was out of memory
        return SandboxResult("memory", stderr)
    return SandboxResult("failed", f"{stderr}\nended without a verdict (exit {code})".strip())


def _run(
    source: str, seconds: float, memory_mb: int, *, namespaces: bool, audit: bool = True
) -> SandboxResult:
    """Run in the given layers; tests remove some to check that the others hold."""
    with (
        tempfile.TemporaryDirectory(prefix="orthrus-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as settings,
        tempfile.TemporaryFile() as result,
        tempfile.TemporaryFile() as stderr,  # a file, not a pipe: nobody can keep it from ending
    ):
        request = {
            "source": source,
            "directory": directory,
            "seconds": seconds,
            "memory_mb": memory_mb,
            "namespaces": namespaces,
            "audit": audit,
            "result": result.fileno(),
        }
        settings.write(json.dumps(request).encode())
        settings.seek(0)
        unshare = [shutil.which("unshare") or "unshare", *UNSHARE, "--"] if namespaces else []
        process = subprocess.Popen(
            [*unshare, *PYTHON, str(CHILD)],
            stdin=settings,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=directory,
            env={"PYTHONHASHSEED": "0"},  # a verdict is the same tomorrow
            pass_fds=[result.fileno()],
            start_new_session=True,
        )
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            _kill(process)
        result.seek(0)
        verdict = result.read().decode("utf-8", "replace").split("\n")
        return _result(code, verdict, _tail(stderr))


@functools.cache
def has_namespaces() -> bool:
    """Whether programs run in their own Linux namespaces here; many containers forbid it."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    try:
        return _run("", 30, 1024, namespaces=True).passed
    except RuntimeError:
        return False


def run_program(source: str, *, seconds: float = 10, memory_mb: int = 1024) -> SandboxResult:
    """Run a program to its end, or to the first limit it meets; nothing of it remains.

    Its standard output is thrown away; `if __name__ == "__main__"` does not hold in it. Raises
    UserError on systems that cannot limit a process, RuntimeError if the sandbox cannot start.
    """
    if os.name != "posix":
        raise UserError(
            "running generated code needs Linux or macOS: this system cannot limit a process; "
            "leave out --allow-code-execution, or use WSL"
        )
    return _run(source, seconds, memory_mb, namespaces=has_namespaces())


def program_of(answer: str, names: set[str]) -> str:
    """The program in a chat answer: its last fence that defines one of `names`, or the last fence.

    An answer without a Python fence is the program itself; an open fence goes to the end.
    """
    fences = [
        code
        for language, code in FENCE.findall(answer)
        if language.strip().lower() in ("", "py", "python", "python3")
    ]
    definitions = re.compile(rf"^\s*(?:def|class)\s+(?:{'|'.join(map(re.escape, names))})\b", re.M)
    defining = [fence for fence in fences if names and definitions.search(fence)]
    return (defining or fences or [answer])[-1]


def check_humaneval(problem: Mapping[str, Any], completion: str, **limits: Any) -> SandboxResult:
    """Whether a completion, of the bare prompt or in a chat, passes a HumanEval problem's test.

    A program that defines the function is put after the part of the prompt before that function,
    imports and helpers; anything else continues the prompt.
    """
    prompt, name = problem["prompt"], problem["entry_point"]
    program = program_of(completion, {name})
    definition = re.compile(rf"^def\s+{re.escape(name)}\b", re.M)
    if definition.search(program):
        start = definition.search(prompt)
        prompt = prompt[: start.start()] if start else ""
    return run_program(f"{prompt}{program}\n{problem['test']}\ncheck({name})\n", **limits)


def check_mbpp(problem: Mapping[str, Any], completion: str, **limits: Any) -> SandboxResult:
    """Whether a completion, bare or in a chat, passes the tests of an MBPP problem."""
    tests = "\n".join([problem["test_setup_code"], *problem["test_list"]])
    program = program_of(completion, set(re.findall(r"\b([A-Za-z_]\w*)\s*\(", tests)))
    return run_program(f"{program}\n{tests}\n", **limits)
