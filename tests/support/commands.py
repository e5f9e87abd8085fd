"""Command lines run as a person runs them: one process each, held to one plain line.

A refusal ends with its status and a line that names the flag or file. It shows no traceback and
leaves nothing behind. A kill ends a command anywhere; the same command then goes on.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from tests.support.paths import ROOT

DEAD = -signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A command line and how it must end.

    Attributes:
      arguments: after `python -m`, divided at spaces; {name} stands for a path of the test's.
      says: a part of the last line on standard error.
      status: the exit status; 2 is bad input.
      stdin: what standard input holds.
      environment: variables set beside those of the tests.
      leaves: files that it may leave, relative to the working directory.
    """

    arguments: str
    says: str
    status: int = 2
    stdin: bytes = b""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    leaves: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.arguments


def run(
    arguments: Sequence[str],
    cwd: pathlib.Path = ROOT,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` in `cwd` on this checkout; a hang fails after `timeout`."""
    process = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        env=_environment(environment),
        timeout=timeout,
        check=False,
    )
    text = [stream.decode(errors="replace") for stream in (process.stdout, process.stderr)]
    return subprocess.CompletedProcess(process.args, process.returncode, *text)


def check_refused(line: CommandLine, cwd: pathlib.Path, places: Mapping[str, object]) -> None:
    """Run a command line in the directory `cwd`; assert its status, its message, nothing left."""
    before = _files(cwd)
    arguments = [part.format(**places) for part in line.arguments.split()]
    ended = run(arguments, cwd, line.stdin, line.environment)
    report = f"{line}\nstatus {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    assert ended.returncode == line.status, report
    assert "Traceback" not in ended.stdout + ended.stderr, report
    messages = ended.stderr.strip().split("\n")
    assert line.says.format(**places) in messages[-1], report
    assert _files(cwd) - before <= line.leaves, report


def run_until_killed(
    arguments: Sequence[str], seconds: float, cwd: pathlib.Path, number: int = signal.SIGKILL
) -> int:
    """Run a command, send it a signal after some seconds; return its status (`DEAD` if killed)."""
    command = [sys.executable, "-m", *arguments]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=cwd, env=_environment(), stdout=quiet, stderr=quiet
    ) as process:
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(number)
        return process.wait()


def start(arguments: Sequence[str], cwd: pathlib.Path) -> "subprocess.Popen[bytes]":
    """Start a command that a test signals or waits for; its streams are pipes."""
    command, pipe = [sys.executable, "-m", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=_environment(), stdout=pipe, stderr=pipe)


def _environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | dict(changes or {})


def _files(directory: pathlib.Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
