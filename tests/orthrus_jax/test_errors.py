"""How a command ends: one line and a status, whatever ends it."""

import errno
import os
import signal
import sys
import time

import pytest

from orthrus_jax.errors import Terminated, UserError, interrupt_quietly, run_command


@pytest.fixture
def ended(monkeypatch, capfd):
    """Run a command in this process: its status and what it wrote to standard error."""
    monkeypatch.setattr("os.dup2", lambda *_: None)  # the streams are pytest's

    def run(main) -> tuple[object, str]:
        with pytest.raises(SystemExit) as end:
            run_command(main)
        return end.value.code, capfd.readouterr().err

    return run


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_command_that_ends_well_returns():
    assert run_command(lambda: None) is None


def test_each_end_is_one_line(ended):
    assert ended(raising(UserError("--n 0: no"))) == (2, "error: --n 0: no\n")
    assert ended(raising(KeyboardInterrupt())) == (130, "interrupted\n")
    assert ended(raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == (141, "")
    full = OSError(errno.ENOSPC, "No space left on device")
    assert ended(raising(full)) == (2, "error: the output: No space left on device\n")
    named = PermissionError(errno.EACCES, "Permission denied", "/x/y")
    assert ended(raising(named)) == (2, "error: /x/y: Permission denied\n")


def test_bug_is_still_a_traceback():
    with pytest.raises(TypeError):
        run_command(raising(TypeError("a bug")))


def test_sigterm_ends_a_command_after_cleaning_up(ended):
    cleaned = []

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            cleaned.append("no Exception")
        finally:
            cleaned.append("finally")

    assert ended(main) == (143, "terminated\n")
    assert cleaned == ["finally"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_handler_of_the_command_itself_stays():
    calls = []

    def main() -> None:
        signal.signal(signal.SIGTERM, lambda *_: calls.append("own"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    run_command(main)
    assert calls == ["own"]
    assert not issubclass(Terminated, Exception)


def test_closed_streams_do_not_mix(ended, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    run_command(lambda: print("a note", file=sys.stderr))
    assert sys.stderr is not None


def test_deleted_working_directory_is_named(ended, tmp_path, monkeypatch):
    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr("os.getcwd", gone)
    assert "the working directory was deleted" in ended(lambda: None)[1]


def test_ctrl_c_while_importing_is_one_line(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error[0]))
    monkeypatch.setattr(sys, "argv", ["x.py"])
    before = sys.excepthook
    interrupt_quietly()
    assert sys.excepthook is before, "a program that imports the library"
    monkeypatch.setattr(sys, "argv", ["-m"])
    interrupt_quietly()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    sys.excepthook(ValueError, ValueError(), None)
    assert capsys.readouterr().err == "interrupted\n"
    assert shown == [ValueError]
