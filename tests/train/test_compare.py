"""The comparison of objectives: which runs are made, what becomes of one that fails."""

import json
import subprocess

import pytest

from orthrus_jax.errors import UserError
from train import compare


@pytest.fixture
def made(monkeypatch):
    """Runs that only write their log: acceptance grows with the seed; KL is best."""
    commands = []

    def run(command, **options):
        commands.append(command)
        given = dict(part.removeprefix("--config.").split("=", 1) for part in command[5:])
        out = compare.pathlib.Path(given["run"])
        out.mkdir(parents=True)
        best = 1.0 if given["train.divergence"] == "kl" else 0.5
        log = [{"step": s, "acceptance_length": best * s + int(given["seed"])} for s in (2, 4)]
        (out / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*log, {"step": 5}]))
        (out / "train.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return commands


@pytest.fixture
def options(tmp_path):
    (tmp_path / "responses").mkdir()
    return [
        *("--config", "configs/tiny.py", "--responses", str(tmp_path / "responses")),
        *("--out", str(tmp_path / "out"), "--seeds", "2", "--set", "train.steps=4"),
    ]


def test_every_objective_is_run_with_every_seed_once(made, options, tmp_path, capsys):
    compare.main(options)
    assert len(made) == 2 * len(compare.VARIANTS)
    assert len({tuple(command) for command in made}) == len(made)
    assert all("--config.train.steps=4" in command for command in made)
    weighted = ["--config.train.gamma=0.0" not in command for command in made]
    assert sum(weighted) == 2 * 2, "without position weights, whatever the configuration has"
    told = capsys.readouterr().out
    assert "| KL | 4.50 | 4.00, 5.00 |" in told
    assert "| CE | 2.50 | 2.00, 3.00 |" in told
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    compare.main([*options[:-3], "3", *options[-2:]])
    assert len(made) == 3 * len(compare.VARIANTS), "those that were there are not made again"


def test_a_run_that_fails_is_named_with_its_last_words(options, monkeypatch):
    failed = lambda command, **options: subprocess.CompletedProcess(
        command, 1, stderr="much\nerror: no base\n"
    )
    monkeypatch.setattr(compare.subprocess, "run", failed)
    with pytest.raises(UserError, match=r"the run \('KL', 0\) failed: error: no base"):
        compare.main(options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "must be at least 1"),
        (["--responses", "none/here"], "none/here is not there"),
    ],
)
def test_what_cannot_be_done_is_refused(options, more, message):
    with pytest.raises(UserError, match=message):
        compare.main([*options, *more])
