"""The process where math-verify runs: its limits, its death, threads and forks."""

import os
import threading
import time

import pytest

from eval import grading
from eval.grading import Grade, grade_math
from orthrus_jax.errors import UserError
from tests.support.boxes import in_box


@pytest.fixture
def worker(monkeypatch):
    """A process of the test's own, with a short limit."""
    worker = grading._Worker()
    monkeypatch.setattr(grading, "_worker", worker)
    monkeypatch.setattr(grading, "SECONDS", 1.0)
    yield worker
    worker.close()


def test_endless_comparison_is_stopped_and_the_next_is_graded(worker):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    begin = time.perf_counter()
    grade = grade_math(in_box("9^{9^{9^{9}}}"), r"\frac12")
    assert grade == Grade(False, "9^{9^{9^{9}}}", "took too long")
    assert time.perf_counter() - begin < 60
    assert grade_math(in_box(r"\frac12"), "0.5").correct


def test_dead_process_is_replaced(worker):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    worker._process.kill()
    worker._process.wait()
    assert grade_math(in_box(r"\frac12"), "0.5").correct


def test_interrupted_question_does_not_answer_the_next(worker, monkeypatch):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    process, stdout = worker._process, worker._process.stdout

    class Interrupted:
        close = stdout.close

        def readline(self):
            raise KeyboardInterrupt

    process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        grade_math(in_box(r"\frac12"), "0.5")
    assert process.poll() is not None
    assert not grade_math(in_box(r"\frac13"), "0.5").correct


def test_threads_may_grade_at_once():
    grades: dict[int, list[bool]] = {}

    def work(n: int) -> None:
        pairs = [(n, n), (n, n + 1)] * 5
        grades[n] = [grade_math(in_box(rf"\frac{{{a}}}{{7}}"), f"{b}/7").correct for a, b in pairs]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == {n: [True, False] * 5 for n in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_leaves_the_parents_process_alone(worker):
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    before = worker._process.pid
    worker._owner = -1  # as in a forked child
    assert grade_math(in_box(r"\frac12"), "0.5").correct
    assert worker._process.pid != before
    os.kill(before, 0)  # still there
    os.kill(before, 9)
    os.waitpid(before, 0)


def test_missing_math_verify_is_reported_in_one_line(worker, monkeypatch, tmp_path):
    monkeypatch.setattr(grading, "WORKER", tmp_path / "absent.py")
    with pytest.raises(UserError, match="pip install 'math-verify"):
        grade_math(in_box(r"\frac12"), "0.5")
