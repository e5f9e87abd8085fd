"""eval.math500 killed at any moment: the same command ends with the same answers, one at a time."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from eval import records, report
from tests.support.benchmark_runs import rows_of, timeless
from tests.support.commands import DEAD, run, run_until_killed
from tests.support.paths import DATA, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here"),
]
RUNS = 10


@pytest.fixture(scope="module")
def arguments(tiny_base) -> list[str]:
    """The command, but for --out."""
    data = str(DATA / "math500_test.jsonl")
    sizes = ["--limit", "24", "--max-new-tokens", "48", "--dtype", "float32"]
    return ["eval.math500", "--model", str(tiny_base), "--data", data, *sizes, "--resume", "--out"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> tuple[pathlib.Path, float]:
    """A run that nothing interrupted, and its seconds."""
    out = tmp_path_factory.mktemp("whole") / "run"
    begin = time.monotonic()
    ended = run([*arguments, str(out)])
    assert ended.returncode == 0, ended.stderr
    return out, time.monotonic() - begin


def check_same(out: pathlib.Path, other: pathlib.Path) -> None:
    """Assert that two runs hold the same answers and figures, but for their times."""
    assert timeless(rows_of(out)) == timeless(rows_of(other))
    figures = [json.loads((x / report.RESULTS).read_text()) for x in (out, other)]
    assert timeless(figures[0]) == timeless(figures[1])
    files = {records.RECIPE, records.ANSWERS, report.RESULTS, report.PAGE}
    assert {path.name for path in out.iterdir() if path.suffix != ".tmp"} == files


@pytest.mark.parametrize("seed", range(RUNS))
def test_run_killed_at_a_random_moment_ends_with_the_same_answers(seed, arguments, whole, tmp_path):
    """Killed twice: at any moment of the first start, and at any of the second; 20 kills in all."""
    out, moments = tmp_path / "run", random.Random(seed)
    for _ in range(2):
        status = run_until_killed([*arguments, str(out)], whole[1] * moments.random(), ROOT)
        assert status in (DEAD, 0)
    ended = run([*arguments, str(out)])
    assert ended.returncode == 0, ended.stderr
    check_same(out, whole[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_that_is_stopped_says_how_to_go_on(number, arguments, whole, tmp_path):
    out = tmp_path / "run"
    with begun([*arguments, str(out)], out) as process:
        process.send_signal(number)
        error = process.communicate()[1].decode()
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert error.split("\n")[-2].endswith("the same command with --resume goes on"), error
    assert run([*arguments, str(out)]).returncode == 0
    check_same(out, whole[0])


def test_second_process_on_a_run_is_refused_and_the_first_one_ends(arguments, whole, tmp_path):
    out = tmp_path / "run"
    with begun([*arguments, str(out)], out) as process:
        process.send_signal(signal.SIGSTOP)  # so that it is there when the second one looks
        try:
            second = run([*arguments, str(out)])
        finally:
            process.send_signal(signal.SIGCONT)
        process.communicate()
    assert second.returncode == 2
    assert "answers.jsonl is being written by another process" in second.stderr.split("\n")[-2]
    assert process.returncode == 0
    check_same(out, whole[0])


def test_finished_run_is_finished(arguments, whole):
    before = (whole[0] / records.ANSWERS).read_bytes()
    assert run([*arguments, str(whole[0])]).returncode == 0
    assert (whole[0] / records.ANSWERS).read_bytes() == before
    again = run([part for part in [*arguments, str(whole[0])] if part != "--resume"])
    assert again.returncode == 2
    assert "exists: give another one, or --resume" in again.stderr


def begun(arguments: list[str], out: pathlib.Path) -> subprocess.Popen[bytes]:
    """A process of this command that has written its first answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    answers = out / records.ANSWERS
    while not (answers.exists() and answers.stat().st_size):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)
    return process
