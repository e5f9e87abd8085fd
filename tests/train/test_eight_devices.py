"""Training and decoding over meshes of eight fake devices are those on one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT

slow = pytest.mark.slow
MESHES = ("8 x 1 x 1", "1 x 8 x 1", "2 x 2 x 2", "4 x 1 x 2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(MESHES[2:3], id="one"), pytest.param(MESHES, id="all", marks=slow)],
)
def found(request):
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.programs.train_on_8", *request.param],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_the_loss_falls(found):
    assert found["one"][-1] < found["one"][0]


def test_the_loss_curve_is_that_of_one_device(found):
    for mesh, there in found["meshes"].items():
        np.testing.assert_allclose(there["losses"], found["one"], rtol=1e-5, err_msg=mesh)
        assert there["weights"] < 1e-5, mesh  # the largest difference of any weight
        assert there["again"], mesh


def test_the_text_is_that_of_one_device(found):
    assert found["ar"]
    assert all(there["text"] for there in found["meshes"].values())


def test_micro_batches_and_stacked_layers_change_nothing(found):
    np.testing.assert_allclose(found["accumulated"], found["one"], rtol=1e-5)
    np.testing.assert_allclose(found["unstacked"], found["one"], rtol=1e-5)
    assert found["accumulated_weights"] < 1e-5
