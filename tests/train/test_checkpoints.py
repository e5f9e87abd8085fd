"""A killed run resumes to the same bits; damaged checkpoints are skipped or reported."""

import json
import random
import shutil
import subprocess
import sys

import jax
import pytest

from orthrus_jax.errors import UserError
from tests.support.marks import slow
from tests.support.paths import ROOT
from tests.support.programs import resumable
from tests.support.training import random_trees
from train import trainer
from train.checkpoints import Checkpoints


def run(directory, devices, *last):
    command = [
        sys.executable,
        "-m",
        "tests.support.programs.resumable",
        str(directory),
        str(devices),
    ]
    return subprocess.run(
        [*command, *map(str, last)], capture_output=True, text=True, cwd=ROOT, timeout=600
    )


@pytest.mark.parametrize("devices", [1, *slow(8)])
def test_run_killed_at_a_random_step_resumes_to_the_same_bits(tmp_path, devices):
    whole = run(tmp_path / "whole", devices)
    assert whole.returncode == 0, whole.stderr[-2000:]
    last = random.randint(5, 11)
    killed = run(tmp_path / "killed", devices, last)
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = run(tmp_path / "killed", devices)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected, result = json.loads(whole.stdout), json.loads(resumed.stdout)
    assert expected["first"] == 0
    assert 0 < result["first"] <= last  # a checkpoint half written at the kill may be lost
    assert result["checksum"] == expected["checksum"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    state, _ = resumable.train(directory)
    return directory, state


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def fresh(run, identity="tiny"):
    """The saver and initial state of a resumed run, before it restores."""
    _, _, diffusion = random_trees()
    like = trainer.init_state(
        resumable.params.stack(diffusion), trainer.adamw(3e-3, resumable.RECIPE.steps, 0.1)
    )
    return Checkpoints(run, {"base": identity}), like


def test_last_two_checkpoints_are_kept_and_restore_the_same_bits(trained, copied):
    saver, like = fresh(copied)
    assert sorted(saver.last.all_steps()) == [9, 12]
    state, place = saver.restore(like)
    assert resumable.checksum(state) == resumable.checksum(trained[1])
    assert int(state.step) == 12
    assert place["batch_size"] == 8


@pytest.mark.parametrize("damage", ["torn", *slow("deleted", "empty")])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(trained, copied, damage):
    newest = copied / "checkpoints" / "12"
    files = [path for path in (newest / "state").rglob("*") if path.is_file()]
    assert files
    if damage == "deleted":
        shutil.rmtree(newest / "state")
    for path in files if damage != "deleted" else ():
        path.write_bytes(
            b"" if damage == "empty" else path.read_bytes()[: path.stat().st_size // 2]
        )
    saver, like = fresh(copied)
    with pytest.warns(UserWarning, match="checkpoint 12 .* cannot be read"):
        state, _ = saver.restore(like)
    assert int(state.step) == 9
    saver.close()
    again, _ = resumable.train(copied)  # the run resumes from there
    assert resumable.checksum(again) == resumable.checksum(trained[1])


def test_deleted_newest_checkpoint_falls_back_to_the_one_before(trained, copied):
    shutil.rmtree(copied / "checkpoints" / "12")
    saver, like = fresh(copied)
    assert int(saver.restore(like)[0].step) == 9


def test_restore_fails_without_a_readable_checkpoint_and_is_none_without_any(copied, tmp_path):
    for path in (copied / "checkpoints").rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"")
    saver, like = fresh(copied)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(UserError, match="delete"),
    ):
        saver.restore(like)
    assert fresh(tmp_path / "new")[0].restore(like) is None


def test_checkpoint_of_another_base_is_refused(copied):
    saver, like = fresh(copied, "other")
    with pytest.raises(UserError, match="base=tiny, and this is base=other"):
        saver.restore(like)


def test_best_checkpoint_outlives_later_ones(tmp_path):
    saver, state = fresh(tmp_path)
    at = lambda step: state._replace(step=jax.numpy.int32(step))
    for step, value in enumerate([1.0, 3.0, 2.0], start=1):
        saver.save_best(at(step), value)
        saver.save(at(step), {"place": step})
    saver.close()
    saver, _ = fresh(tmp_path)
    assert saver.best.all_steps() == [2]
    assert saver.best_value == 3.0
    saver.save_best(at(7), 2.5)
    assert saver.best.all_steps() == [2]


def test_best_checkpoint_of_a_step_that_was_saved_before_is_replaced(tmp_path):
    """A run killed after that went on from a step before, and evaluates the same step again."""
    for value in (1.0, 1.5):
        saver, state = fresh(tmp_path)
        saver.save_best(state._replace(step=jax.numpy.int32(2)), value)
        saver.close()
    saver, _ = fresh(tmp_path)
    assert (saver.best.all_steps(), saver.best_value) == ([2], 1.5)
    saver.close()
