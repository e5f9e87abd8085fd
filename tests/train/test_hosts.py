"""Several hosts train as one does: processes of their own, found as Slurm would have them found."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support import fast_compile
from tests.support.paths import ROOT
from tests.support.training import miniature
from train import pretrain

pytestmark = pytest.mark.slow
FLAGS = {
    "mesh.data": 2, "mesh.fsdp": 2,
    "distill.prompts": 24, "distill.shard_size": 10,
    "distill.max_new_tokens": 24, "distill.batch_size": 8,
    "train.block_size": 6, "train.anchors": 6, "train.batch_size": 4, "train.steps": 12,
    "train.log_every": 1, "train.eval_every": 4, "train.save_every": 5, "train.eval_prompts": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = tmp_path_factory.mktemp("hosts")
    pretrain.main(miniature(run), overwrite=False)
    return run / "base"


def start(base, run, hosts, devices):
    """Start train.main on each host; return the processes."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = {"base": base, "run": run, "distributed": hosts > 1, **FLAGS}
    command = [sys.executable, "-m", "train.main", "--config", "configs/tiny.py"]
    command += [f"--config.{name}={value}" for name, value in options.items()]
    found = []
    for host in range(hosts):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast_compile.on_devices(devices)}
        if hosts > 1:
            env |= {
                "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(hosts),
                "SLURM_PROCID": str(host), "SLURM_LOCALID": str(host),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            }  # fmt: skip
        log = (run.parent / f"{run.name}.{host}.log").open("a")
        found.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    return found


def end(run, processes):
    """Wait for all hosts; return what the first one said."""
    codes = [process.wait(timeout=600) for process in processes]
    said = [(run.parent / f"{run.name}.{i}.log").read_text() for i in range(len(codes))]
    assert not any(codes), "\n".join(text[-2000:] for text in said)
    return said[0]


def records(run):
    path = run / "train.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(base):
    run = base.parent / "two"
    assert "Orthrus checkpoint written" in end(run, start(base, run, 2, 2))
    return run


def test_each_host_answers_its_own_shards(whole):
    """Of 10, 10 and 4 prompts the first host has the first and the last."""
    for host, prompts in enumerate((14, 10)):
        said = (whole.parent / f"{whole.name}.{host}.log").read_text()
        assert f"{prompts}/{prompts}" in said[said.rindex("distill:") :].splitlines()[0]
    manifest = json.loads((whole / "responses" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["written"]) == (True, 24)


def test_two_hosts_of_two_devices_train_as_one_of_four(base, whole):
    run = base.parent / "one"
    end(run, start(base, run, 1, 4))
    losses = lambda run: [record["loss"] for record in records(run)]
    rounding = 16 * np.finfo(np.float32).eps  # a KL is a difference of log-probabilities
    np.testing.assert_allclose(losses(whole), losses(run), rtol=1e-5, atol=rounding)
    assert losses(run)[-1] < losses(run)[0] / 4
    accepted = lambda run: [r.get("acceptance_length") for r in records(run)]
    assert accepted(whole) == accepted(run)
    assert accepted(run)[3] is not None
    ours, theirs = weights(whole), weights(run)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        pair = array.astype(np.float32), theirs[name].astype(np.float32)
        np.testing.assert_allclose(*pair, rtol=2**-7, atol=1e-6, err_msg=name)  # a bfloat16's ulp


def test_a_signal_to_one_host_stops_both_and_the_run_goes_on_to_the_same_bits(base, whole):
    run = base.parent / "stopped"
    shutil.copytree(whole / "responses", run / "responses")
    processes = start(base, run, 2, 2)
    while not records(run):
        assert processes[1].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert "goes on from" in end(run, processes)
    assert not (run / "model").exists()
    assert "going on from step" in end(run, start(base, run, 2, 2))
    ours, theirs = weights(run), weights(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
