"""A run that is killed and goes on ends as one that was not; damage is survived or told."""

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
def test_a_run_killed_at_a_random_step_ends_as_one_that_was_not(tmp_path, devices):
    whole = run(tmp_path / "whole", devices)
    assert whole.returncode == 0, whole.stderr[-2000:]
    last = random.randint(5, 11)
    killed = run(tmp_path / "killed", devices, last)
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = run(tmp_path / "killed", devices)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected, found = json.loads(whole.stdout), json.loads(resumed.stdout)
    assert expected["first"] == 0
    assert 0 < found["first"] <= last  # what was being written when it was killed may be lost
    assert found["checksum"] == expected["checksum"]


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
    """What a resumed run has before it restores."""
    _, _, diffusion = random_trees()
    like = trainer.init_state(
        resumable.params.stack(diffusion), trainer.adamw(3e-3, resumable.RECIPE.steps, 0.1)
    )
    return Checkpoints(run, {"base": identity}), like


def test_the_last_two_stay_and_hold_the_bits(trained, copied):
    keeper, like = fresh(copied)
    assert sorted(keeper.last.all_steps()) == [9, 12]
    state, place = keeper.restore(like)
    assert resumable.checksum(state) == resumable.checksum(trained[1])
    assert int(state.step) == 12
    assert place["batch_size"] == 8


@pytest.mark.parametrize("damage", ["torn", *slow("deleted", "empty")])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(trained, copied, damage):
    newest = copied / "checkpoints" / "12"
    files = [path for path in (newest / "state").rglob("*") if path.is_file()]
    assert files
    if damage == "deleted":
        shutil.rmtree(newest / "state")
    for path in files if damage != "deleted" else ():
        path.write_bytes(
            b"" if damage == "empty" else path.read_bytes()[: path.stat().st_size // 2]
        )
    keeper, like = fresh(copied)
    with pytest.warns(UserWarning, match="checkpoint 12 .* cannot be read"):
        state, _ = keeper.restore(like)
    assert int(state.step) == 9
    keeper.close()
    again, _ = resumable.train(copied)  # and the run goes on from there
    assert resumable.checksum(again) == resumable.checksum(trained[1])


def test_a_newest_checkpoint_that_is_gone_is_no_matter(trained, copied):
    shutil.rmtree(copied / "checkpoints" / "12")
    keeper, like = fresh(copied)
    assert int(keeper.restore(like)[0].step) == 9


def test_nothing_readable_is_an_error_and_nothing_at_all_is_not(copied, tmp_path):
    for path in (copied / "checkpoints").rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"")
    keeper, like = fresh(copied)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(UserError, match="delete"),
    ):
        keeper.restore(like)
    assert fresh(tmp_path / "new")[0].restore(like) is None


def test_another_base_is_refused(copied):
    keeper, like = fresh(copied, "other")
    with pytest.raises(UserError, match="base=tiny, and this is base=other"):
        keeper.restore(like)


def test_the_best_is_kept_whatever_comes_later(tmp_path):
    keeper, state = fresh(tmp_path)
    at = lambda step: state._replace(step=jax.numpy.int32(step))
    for step, value in enumerate([1.0, 3.0, 2.0], start=1):
        keeper.save_best(at(step), value)
        keeper.save(at(step), {"place": step})
    keeper.close()
    keeper, _ = fresh(tmp_path)
    assert keeper.best.all_steps() == [2]
    assert keeper.best_value == 3.0
    keeper.save_best(at(7), 2.5)
    assert keeper.best.all_steps() == [2]
