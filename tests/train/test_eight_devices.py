"""Training and decoding over meshes of eight fake devices equal those on one."""

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
def results(request):
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.programs.train_on_8", *request.param],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_loss_falls(results):
    assert results["one"][-1] < results["one"][0]


def test_loss_curve_equals_that_of_one_device(results):
    for mesh, result in results["meshes"].items():
        np.testing.assert_allclose(result["losses"], results["one"], rtol=1e-5, err_msg=mesh)
        assert result["weights"] < 1e-5, mesh  # the largest difference of any weight
        assert result["again"], mesh


def test_text_equals_that_of_one_device(results):
    assert results["ar"]
    assert all(result["text"] for result in results["meshes"].values())


def test_loss_is_independent_of_micro_batches_and_stacked_layers(results):
    np.testing.assert_allclose(results["accumulated"], results["one"], rtol=1e-5)
    np.testing.assert_allclose(results["unstacked"], results["one"], rtol=1e-5)
    assert results["accumulated_weights"] < 1e-5
