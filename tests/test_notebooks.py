"""The notebooks run from top to bottom on the tiny model, and are stored without outputs."""

import json
import pathlib
import re
import sys

import pytest

from tests.support.paths import ROOT

nbclient = pytest.importorskip("nbclient", reason="pip install '.[notebooks]'")
import nbformat  # noqa: E402 (comes with nbclient)

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["benchmark", "quickstart", "train"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    cells = [cell for cell in found.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_for_the_address_that_it_installs_from(path, tmp_path, monkeypatch):
    """An address that is built in and not ours would run its owner's code."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert not re.search(r"git(hub|lab)\.com|colab\.research", "\n".join(sources))
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORTHRUS_JAX", raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("builtins.input", lambda prompt: "ADDRESS")
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "checkout").mkdir()
    exec(sources[1], {})
    clone, install = commands
    assert clone == ["git", "clone", "--depth", "1", "--", "ADDRESS", "checkout"]
    assert install[1:4] == ["-m", "pip", "install"]


@pytest.mark.parametrize("name", ["train", "benchmark"])
def test_a_notebook_leaves_the_device_to_the_commands_it_runs(name):
    """A TPU serves one process at a time: a kernel that holds it would make every command fail."""
    sources = [cell.source for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells]
    last = max(i for i, source in enumerate(sources) if re.search(r"^run\(", source, re.M))
    assert not any(re.search(r"^(import|from) (orthrus_)?jax", s, re.M) for s in sources[:last])


def printed(notebook) -> str:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "".join(out.get("text", "") for out in outputs)


def execute(name: str, run: pathlib.Path, monkeypatch, **environment: str):
    """Run a notebook in its folder, as a person would; commands write into `run`."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # they train: what is compiled fast runs slowly
    monkeypatch.setenv("ORTHRUS_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parent / "cache"))
    found = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        found, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    return client.execute()


@pytest.mark.slow
def test_the_notebooks_train_answer_and_measure(tmp_path, monkeypatch):
    """In turn: what train.ipynb leaves is what the other two load."""
    ran = execute("train", tmp_path / "run", monkeypatch, ORTHRUS_STEPS="24")
    said = printed(ran)
    assert "stopped; checkpoints after steps" in said
    assert "going on from step" in said
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    model = str(tmp_path / "run" / "model")

    said = printed(execute("quickstart", tmp_path / "quick", monkeypatch, ORTHRUS_MODEL=model))
    assert "tokens are the same, one by one" in said

    options = {"ORTHRUS_MODEL": model, "ORTHRUS_LIMIT": "4"}
    execute("benchmark", tmp_path / "bench", monkeypatch, **options)
    result = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert result["same_text"] == 1.0
    assert json.loads((tmp_path / "bench" / "speed.json").read_text())["forwards"]
