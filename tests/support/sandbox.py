"""Programs in the sandbox: run in some layers only, and what may remain of them."""

import os
import pathlib
import sys
import tempfile
import textwrap

import pytest

from eval import sandbox
from eval.sandbox import SandboxResult, Suite, run_program

needs_posix = pytest.mark.skipif(os.name != "posix", reason="no limits to set here")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
needs_filter = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"),
    reason="no system call filter here",
)
# What holds where a container forbids namespaces, there with an older kernel, and elsewhere.
WEAKER = (("landlock", "seccomp", "audit"), ("seccomp", "audit"), ("audit",))


def require(*layers: str) -> None:
    """Skip a test where these layers do not hold."""
    if missing := set(layers) - set(sandbox.layers()):
        pytest.skip(f"no {', '.join(sorted(missing))} here")


def run(source: str, **limits) -> SandboxResult:
    """Run a program, and after it one that must not notice."""
    result = run_program(textwrap.dedent(source), **{"seconds": 20} | limits)
    assert run_program("assert 1 + 1 == 2", seconds=60) == SandboxResult("passed")
    return result


def run_in(layers: tuple[str, ...], source: str) -> SandboxResult:
    """Run a program in these layers alone; skip the test where they do not hold."""
    require(*layers)
    result = sandbox._run([[textwrap.dedent(source)]], Suite(), 20, 1024, layers)
    assert result.layers in (layers, ())
    return result


def run_beside_a_file(layers: tuple[str, ...], source: str, folder: pathlib.Path) -> SandboxResult:
    """Run a program in some layers, which must leave a file outside as it is, and nothing else.

    Args:
      layers: see `run_in`.
      source: with {file}, {folder} and {name} for the file's path, its directory and its name.
      folder: empty.
    """
    file = folder / "file"
    file.write_text("kept")
    result = run_in(layers, source.format(file=str(file), folder=str(folder), name=file.name))
    assert list(folder.iterdir()) == [file]
    assert file.read_text() == "kept"
    return result


def own_processes() -> list[str]:
    """The command lines of sandboxed processes still alive; zombies have none."""
    lines = []
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(sandbox.START) in line:
            lines.append(line)
    return lines


def own_folders() -> list[pathlib.Path]:
    return list(pathlib.Path(tempfile.gettempdir()).glob("orthrus-*"))
