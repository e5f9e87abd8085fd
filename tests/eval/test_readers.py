"""Damaged files: each reader of eval takes them, or refuses them with a UserError."""

import gzip
import json
import pathlib

import pytest
from hypothesis import strategies as st

from eval import demo, records, report
from eval.benchmarks import BENCHMARKS, load
from eval.metrics import across, numbers
from eval.records import read_run
from eval.run_directory import RunDirectory
from tests.support.fuzzing import both_profiles, check_reader, damaged_json, damaged_lines
from tests.support.hub_rows import HUB_ROWS
from tests.support.run_files import answer, both, recipe, row, save

ROWS = [
    both("a", [2, 0, 3], level="1"),
    both("b", [1], correct=False, level="2"),
    row("c", [{"loop": "ar", "sample": 0, "turn": 0, "skipped": "too long"}], level="1"),
]
RECIPES = [
    recipe(),
    recipe(mode="orthrus", n=2, temperature=0.5, accept="coupled", batch_size=3),
    recipe() | {"loaded": {"draft_length": 4, "dtype": "float32", "cycle": "one-forward",
                           "tree_nodes": 6, "early_blocks": 2, "fresh_blocks": 0}},
]  # fmt: skip


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A run whose files are whole; its pictures, which take a second each, are left out."""
    monkeypatch.setattr(report, "_svg", lambda *given, **more: "<svg></svg>")
    return save(tmp_path / "run", recipe(), ROWS)


def shown(run: pathlib.Path) -> None:
    """All that eval.report makes of a run."""
    result = report.finish(run)
    report.text({"one": result, "two": result})
    report.page({"one": result, "two": result})
    across({"one": read_run(run), "two": read_run(run)})


@both_profiles
@pytest.mark.parametrize("whole", RECIPES, ids=["both", "sampled", "tree"])
def test_report_takes_or_refuses_any_recipe(whole, slow, run):
    check_reader(
        lambda path: shown(run), slow=slow, path=run / records.RECIPE, contents=damaged_json(whole)
    )


@both_profiles
@pytest.mark.parametrize("settings", RECIPES[:2], ids=["both", "sampled"])
def test_report_takes_or_refuses_any_answers(settings, slow, run):
    other = save(run.parent / "other", settings, ROWS)
    check_reader(
        lambda path: shown(other),
        slow=slow,
        path=other / records.ANSWERS,
        contents=damaged_lines([*ROWS, row("d", [answer("orthrus", [1], sample=1)], level="3")]),
    )


@both_profiles
def test_harness_resumes_or_refuses_any_recipe(slow, run):
    def resume(path: pathlib.Path) -> None:
        directory = RunDirectory(run, resume=True)
        directory.check("asked", recipe()["asked"])
        directory.check("loaded", recipe()["loaded"])
        with directory.open(recipe()) as answers:
            assert answers.done <= {"a", "b", "c"}

    check_reader(resume, slow=slow, path=run / records.RECIPE, contents=damaged_json(recipe()))


@both_profiles
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_takes_or_refuses_any_file(name, slow, tmp_path):
    valid = HUB_ROWS[name]
    check_reader(
        lambda path: load(BENCHMARKS[name], path),
        slow=slow,
        path=tmp_path / "rows.jsonl",
        contents=damaged_lines([valid, valid]),
    )


@both_profiles
def test_benchmark_takes_or_refuses_any_compressed_file(slow, tmp_path):
    packed = gzip.compress(b'{"question": "1+1?", "answer": "#### 2"}\n' * 3)
    cut = st.integers(0, len(packed)).map(lambda n: packed[:n])
    changed = st.tuples(st.integers(0, len(packed) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda change: packed[: change[0]] + change[1] + packed[change[0] + len(change[1]) :]
    )
    check_reader(
        lambda path: load(BENCHMARKS["gsm8k"], path),
        slow=slow,
        path=tmp_path / "rows.jsonl.gz",
        contents=cut | changed,
    )


STAGES = {"base_parameters": 7, "trained_parameters": 3, "seconds": {"distil": 1.5, "train": 2}}
STEPS = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "acceptance_length": 0.5}]


@pytest.fixture
def training(tmp_path: pathlib.Path) -> pathlib.Path:
    """The directory of a finished training."""
    (tmp_path / "train.json").write_text(json.dumps(STAGES))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    assert demo._training(tmp_path) == (STAGES, STEPS)
    return tmp_path


@both_profiles
def test_demo_takes_or_refuses_any_stages(slow, training):
    check_reader(
        lambda path: demo._training(training),
        slow=slow,
        path=training / "train.json",
        contents=damaged_json(STAGES),
    )


@both_profiles
def test_demo_takes_or_refuses_any_steps(slow, training):
    check_reader(
        lambda path: demo._training(training),
        slow=slow,
        path=training / "train.jsonl",
        contents=damaged_lines(STEPS),
    )


def test_whole_files_are_taken(run):
    shown(run)
    for settings in RECIPES[::2]:
        assert numbers(settings, ROWS)["answered"] == 3
