"""Commands of train/ that are killed anywhere: the same command ends with the same bytes.

Signals, two commands at once and full disks too. Each command is a process of its own.
"""

import contextlib
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest

from tests.support.commands import DEAD, run, run_until_killed, start
from tests.support.training import miniature
from train import pretrain

pytestmark = pytest.mark.slow

CONFIG = """
import pathlib
from tests.support.training import miniature

def get_config():
    config = miniature(pathlib.Path("run"))
    config.base = "BASE"
    config.distill.shard_size = 5
    config.train.update(eval_prompts=2)
    return config
"""
EVERY = "the same command goes on from what run holds"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A function of a command's name: its command line."""
    folder = tmp_path_factory.mktemp("base")
    config = miniature(folder)
    pretrain.main(config, overwrite=False)
    (folder / "config.py").write_text(CONFIG.replace("BASE", config.base))
    return lambda name, *flags: [f"train.{name}", "--config", str(folder / "config.py"), *flags]


def weights(place):
    return (place / "run" / "model" / "model.safetensors").read_bytes()


def answers(place):
    """The rows of every shard of responses; their files also hold the seconds that they took."""
    shards = sorted((place / "run" / "responses").glob("responses-*.parquet"))
    return {path.name: pq.read_table(path).to_pylist() for path in shards}


def succeeds(arguments, place):
    ended = run(arguments, place)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """An uninterrupted run, and the seconds that each command took."""
    place = tmp_path_factory.mktemp("whole")
    seconds = {}
    for name in ("distill", "main"):
        begin = time.monotonic()
        succeeds(command(name), place)
        seconds[name] = time.monotonic() - begin
    return place, seconds


@pytest.mark.parametrize(
    ("name", "seed", "kills"),
    [("main", i, 5) for i in range(4)] + [("distill", i, 5) for i in range(4)],
)
def test_command_killed_anywhere_ends_with_the_same_bytes(
    command, whole, tmp_path, name, seed, kills
):
    """20 kills of each command; those of one run follow each other."""
    expected, seconds = whole
    if name == "main" and seed % 2:  # training alone
        shutil.copytree(expected / "run" / "responses", tmp_path / "run" / "responses")
    rng = random.Random(f"{name} {seed}")
    for _ in range(kills):
        after = rng.uniform(0.2, 1.0) * seconds[name]
        assert run_until_killed(command(name), after, tmp_path) in (DEAD, 0)
    succeeds(command(name), tmp_path)
    assert answers(tmp_path) == answers(expected)
    if name == "main":
        assert weights(tmp_path) == weights(expected)
        left = lambda place: {path.name for path in (place / "run").iterdir()}
        assert left(tmp_path) == left(expected)
        assert "is finished" in run(command(name), tmp_path).stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["main", "distill"])
def test_signal_ends_a_command_in_a_line_that_says_how_to_go_on(
    command, whole, tmp_path, name, number, status
):
    """Ctrl-C or SIGTERM while the base answers: the first shard is written, the last is not."""
    with start(command(name), tmp_path) as process:
        wait_for(tmp_path / "run" / "responses" / "responses-00000-of-00005.parquet", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == status
    lines = errors.decode().strip().split("\n")
    assert EVERY in lines[-2]
    assert lines[-1] == {130: "interrupted", 143: "terminated"}[status]
    assert b"Traceback" not in errors
    succeeds(command(name), tmp_path)
    assert answers(tmp_path) == answers(whole[0])


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("second", ["main", "distill"])
def test_second_command_in_one_directory_is_refused(command, whole, tmp_path, second):
    with start(command("main"), tmp_path) as first:
        wait_for(tmp_path / "run" / ".lock", first)
        refused = run(command(second), tmp_path)
        assert refused.returncode == 2
        message = refused.stderr.strip().split("\n")[-1]
        assert f"error: run is in use by process {first.pid} on " in message
        assert "Traceback" not in refused.stderr
        first.communicate(timeout=600)
    assert first.returncode == 0
    assert weights(tmp_path) == weights(whole[0])
    assert not (tmp_path / "run" / ".lock").exists()


@contextlib.contextmanager
def disk_of(place, kilobytes):
    """A disk of its own size at `place`; skips where nothing may be mounted."""
    place.mkdir()
    options = f"size={kilobytes}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("kilobytes", [32, 96, 300, 700])
def test_full_disk_is_one_line_and_the_run_goes_on_with_more_room(
    command, whole, tmp_path, kilobytes
):
    place = tmp_path / "disk"
    try:
        with disk_of(place, kilobytes):
            ended = run(command("main"), place)
            assert ended.returncode == 2, ended.stderr[-4000:]
            message = ended.stderr.strip().split("\n")[-1]
            assert "No space left on device" in message
            assert "Traceback" not in ended.stderr
            options = ["-o", "remount,size=64m"]
            subprocess.run(["mount", *options, place], check=True)
            succeeds(command("main"), place)
            assert weights(place) == weights(whole[0])
    except FileNotFoundError:
        pytest.skip("needs the command mount")
