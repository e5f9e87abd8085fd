"""Runs that are killed or torn and go on, and others that are not theirs to go on with."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import orthrus_jax
from eval import harness, records, report
from eval.harness import fingerprint
from eval.run_directory import RunDirectory
from orthrus_jax.errors import Terminated, UserError
from tests.support.benchmark_runs import gsm8k, load_anew, rows_of, timeless, write
from tests.support.paths import ROOT
from tests.support.run_files import both, recipe
from tests.support.weights import random_params

pytestmark = pytest.mark.usefixtures("cheap_commands")


def test_killed_run_resumes_to_the_same_numbers(directory, data, whole, tmp_path):
    out = tmp_path / "killed"
    arguments = ["--model", directory, "--data", data, "--out", str(out), "--max-new-tokens", "24"]
    command = [sys.executable, "-m", "eval.gsm8k", *arguments, "--resume"]
    answers = out / records.ANSWERS
    lines = lambda: answers.read_bytes().count(b"\n") if answers.exists() else 0
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            while lines() < 4:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 4 <= lines() < 96
    assert not (out / report.RESULTS).exists()
    with (out / records.ANSWERS).open("ab") as file:
        file.write(b'{"id": "gsm8k/9')  # as a kill in the midst of a write leaves it
    result = gsm8k(directory, data, out, "--resume")
    assert timeless(result) == timeless(whole[1])
    strip = lambda rows: [{**timeless(row)} for row in rows]
    assert strip(rows_of(out)) == strip(rows_of(whole[0]))


@pytest.mark.parametrize(
    ("kept", "torn"),
    [
        *((0, b""), (0, b"{"), (1, b"\xff\0"), (6, b'{"id": "gsm8k/2", "gro')),
        *((95, b""), (95, b'{"id": "gsm8k/95"}'), (96, b"{"), (96, b"")),
    ],
)
def test_any_torn_file_is_resumed(directory, data, whole, kept, torn, tmp_path):
    out = tmp_path / "torn"
    out.mkdir()
    (out / records.RECIPE).write_bytes((whole[0] / records.RECIPE).read_bytes())
    lines = (whole[0] / records.ANSWERS).read_bytes().splitlines(keepends=True)
    (out / records.ANSWERS).write_bytes(b"".join(lines[:kept]) + torn)
    result = gsm8k(directory, data, out, "--resume")
    assert timeless(result) == timeless(whole[1])
    assert [row["id"] for row in rows_of(out)] == [f"gsm8k/{i}" for i in range(96)]


def test_run_killed_before_its_recipe_was_written_begins_anew(directory, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.json.0a1b2c3d.tmp").write_text('{"ti')
    assert gsm8k(directory, data, out, "--resume", "--limit", "2")["answered"] == 2


def test_resume_without_a_run_begins_one(directory, data, tmp_path):
    options = ("--resume", "--limit", "2", "--mode", "ar")
    assert gsm8k(directory, data, tmp_path / "run", *options)["answered"] == 2
    before = (tmp_path / "run" / records.ANSWERS).read_bytes()
    gsm8k(directory, data, tmp_path / "run", *options)
    assert (tmp_path / "run" / records.ANSWERS).read_bytes() == before


CHANGES = [
    (("--mode", "ar"), "mode was both and is now ar"),
    (("--limit", "9"), "limit was None and is now 9"),
    (("--batch-size", "2"), "batch_size was 1 and is now 2"),
    (("--temperature", "0.5"), "temperature was 0.0 and is now 0.5"),
    (("--top-p", "0.5"), "top_p was 1.0 and is now 0.5"),
    (("--top-k", "5"), "top_k was 0 and is now 5"),
    (("--seed", "5"), "seed was 0 and is now 5"),
    (("--accept", "coupled"), "accept was rejection and is now coupled"),
    (("--thinking",), "thinking was False and is now True"),
    (("--max-new-tokens", "25"), "max_new_tokens was 24 and is now 25"),
    (("--draft-length", "3"), "draft_length was 4 and is now 3"),
    (("--dtype", "bfloat16"), "weights was "),
    (("--model", "another"), "model was "),
]


@pytest.mark.parametrize(("options", "message"), CHANGES)
def test_changed_recipe_is_refused_by_name(directory, data, whole, options, message):
    before = (whole[0] / records.ANSWERS).read_bytes()
    with pytest.raises(UserError, match=f"--resume {whole[0]}: {message}"):
        gsm8k(directory, data, whole[0], "--resume", *options)
    assert (whole[0] / records.ANSWERS).read_bytes() == before


def test_other_data_another_benchmark_and_other_weights_are_refused(
    directory, data, whole, tmp_path
):
    rows = [{"question": "How many?", "answer": "1"}]
    other = write(tmp_path / "other.jsonl", rows)
    with pytest.raises(UserError, match="data was"):
        gsm8k(directory, other, whole[0], "--resume")
    mt = write(tmp_path / "mt.jsonl", [{"question_id": 1, "category": "math", "turns": ["Hi"]}])
    arguments = ["--model", directory, "--data", mt, "--out", str(whole[0]), "--resume"]
    with pytest.raises(UserError, match="benchmark was gsm8k and is now mt_bench"):
        harness.main("mt_bench", [*arguments, "--max-new-tokens", "24"])
    model = orthrus_jax.load(directory)
    changed = random_params(model.config, 4, gain=3.0)
    assert fingerprint(model.params) == fingerprint(load_anew(directory).params)
    assert fingerprint(model.params) != fingerprint(changed)


def test_two_processes_do_not_write_one_run(tmp_path):
    first = recipe()
    with RunDirectory(tmp_path / "run", resume=False).open(first) as answers:
        assert answers.done == set()
        again = RunDirectory(tmp_path / "run", resume=True)
        with pytest.raises(UserError, match="is being written by another process"):
            again.open(first).__enter__()
    with RunDirectory(tmp_path / "run", resume=True).open(first):
        pass


def test_process_that_comes_second_leaves_the_first_ones_recipe(tmp_path):
    """Both found no run there; each would have written its own recipe."""
    one, other = (RunDirectory(tmp_path / "run", resume=False) for _ in range(2))
    refused = pytest.raises(UserError, match="is being written by another process")
    with one.open(recipe()), refused:
        other.open(recipe(n=2)).__enter__()
    with pytest.raises(UserError, match="was begun by another process meanwhile"):
        other.open(recipe(n=2)).__enter__()
    assert json.loads((tmp_path / "run" / records.RECIPE).read_text()) == recipe()


def test_run_killed_between_its_files_begins_anew(tmp_path):
    (tmp_path / records.ANSWERS).write_bytes(b"")
    (tmp_path / ".recipe.json.0a1b2c3d.tmp").write_text("{")
    with RunDirectory(tmp_path, resume=True).open(recipe()) as answers:
        answers.append({"a": both("a", [1])})
    assert RunDirectory(tmp_path, resume=True).recipe == recipe()


class Full:
    """A file on a full disk."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk_ends_the_run_in_one_line_that_says_how_to_go_on(tmp_path):
    run = RunDirectory(tmp_path / "run", resume=False)
    with run.open(recipe()) as answers:
        answers.append({"a": both("a", [1])})
        answers._file = Full(answers._file)
        with pytest.raises(UserError, match=r"No space left on device\): 1 problems are kept; .*"):
            answers.append({"b": both("b", [1])})
    with RunDirectory(tmp_path / "run", resume=True).open(recipe()) as answers:
        assert answers.done == {"a"}


def test_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    directory, data, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out .*file/run: .*file is no directory"):
        gsm8k("no/such/model", data, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("ending", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_signal_ends_a_run_in_one_line_that_says_how_to_go_on(tmp_path, ending, status, capsys):
    def interrupted() -> None:
        with RunDirectory(tmp_path / "run", resume=False).open(recipe()) as answers:
            answers.append({"a": both("a", [1])})
            raise ending

    with pytest.raises(SystemExit) as end:
        interrupted()
    assert end.value.code == status
    assert capsys.readouterr().err == (
        f"stopped: {tmp_path / 'run'} keeps 1 problems; the same command with --resume goes on\n"
    )


def test_finished_run_is_repeated_without_a_change(directory, data, whole):
    before = (whole[0] / records.ANSWERS).read_bytes()
    assert timeless(gsm8k(directory, data, whole[0], "--resume")) == timeless(whole[1])
    assert (whole[0] / records.ANSWERS).read_bytes() == before


def test_unreadable_run_is_named(tmp_path):
    (tmp_path / records.RECIPE).write_text("{")
    with pytest.raises(UserError, match=r"json is damaged .* holds no run"):
        RunDirectory(tmp_path, resume=True)
