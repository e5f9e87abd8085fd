"""Commands of benchmarks and the demo: refusals before anything is decoded, help, the demo."""

import json
import runpy
import subprocess
import sys

import pytest

from eval import demo, harness, report
from orthrus_jax.errors import UserError
from tests.support.benchmark_runs import gsm8k, rows_of, timeless
from tests.support.paths import ROOT
from train.problems import is_correct, problems

pytestmark = pytest.mark.usefixtures("cheap_commands")


@pytest.mark.slow
def test_demo_measures_real_accuracy_and_the_same_text(tiny_base, tmp_path, monkeypatch):
    """Real accuracy of a real, if small, model; AR and Orthrus equal to the token."""
    monkeypatch.setattr(demo, "LARGER", {"hidden_size": 48})  # saves seconds
    held_out = list(problems("held-out", 10_002, 24))
    by_question = {p.question: p for p in held_out}
    arguments = ["--model", str(tiny_base), "--limit", "24", "--dtype", "float32"]
    arguments += ["--batch-size", "8", "--draft-length", "4", "--out", str(tmp_path / "run")]
    demo.main([*arguments, "--repeats", "2"])
    result = json.loads((tmp_path / "run" / report.RESULTS).read_text())
    assert result["same_text"] == 1.0
    assert [row["turns"] for row in rows_of(tmp_path / "run")] == [[p.question] for p in held_out]
    assert set(result["groups"]["operations"]) == {"2", "3", "4"}
    right = 0
    for row in rows_of(tmp_path / "run"):
        ar, orthrus = row["answers"]
        assert ar["text"] == orthrus["text"]
        assert (
            ar["correct"]
            == orthrus["correct"]
            == is_correct(ar["text"], by_question[row["turns"][0]])
        )
        right += ar["correct"]
    assert 4 <= right < 24  # some right, some wrong: both verdicts are tested
    assert result["loops"]["ar"]["accuracy"] == right / 24
    assert result["loops"]["orthrus"]["accuracy"] == right / 24
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    again = json.loads((tmp_path / "run" / "repeat-2" / report.RESULTS).read_text())
    assert figures["accuracy_ar"] == figures["accuracy_orthrus"] == right / 24
    assert figures["exact_match"] == 1.0
    assert figures["speedup_range"] == sorted([result["speedup"], again["speedup"]])
    assert timeless(again) == timeless(result)
    assert "trained_parameters" not in figures
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_demo_draws_the_range_of_its_speedup(tmp_path, axes):
    figures = {"acceptance_by_position": [0.75, 0.5], "acceptance_length": 1.25, "speedup": 1.1}
    figures |= {"tokens_per_second_ar": 100.0, "tokens_per_second_orthrus": 110.0}
    figures |= {"speedup_range": [0.8, 1.4], "exact_match": 1.0}
    demo.draw(tmp_path / "report.png", figures, [])
    titles = [axis.get_title() for axis in axes]
    assert titles == [
        "Acceptance, mean 1.25 of 2",
        "Speedup 1.10 (0.80-1.40), exact match 1.000",
    ]


def test_refusals_come_first_and_in_one_line(directory, data, whole, tmp_path, monkeypatch):
    """None of these loads a model or writes anything."""
    refused = {
        (): f"--out {whole[0]} exists: give another one, or --resume",
        ("--out", str(tmp_path), "--resume"): f"{tmp_path} holds no run",
        ("--out", "new", "--data", "absent.jsonl"): "--data absent.jsonl cannot be read",
        ("--out", "new", "--n", "2"): "n=2 with temperature=0",
        ("--out", "new", "--top-p", "2"): "top_p=2.0 must be above 0",
        ("--out", "new", "--model", "no/such/model"): "no/such/model cannot be loaded",
        ("--out", "new", "--draft-length", "99"): "draft_length=99 must be from 2 to 4",
        ("--out", "new", "--tree-nodes", "8"): "--tree-nodes 8 needs --cycle two-forward or one-",
        ("--out", "new", "--mode", "ar", "--cycle", "paper"): "--cycle paper: decoding one token ",
        ("--out", "new", "--cycle", "paper", "--rows", "9"): "--cycle paper beside --rows 9: the ",
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("else")
    for options, message in refused.items():
        with pytest.raises(UserError) as error:
            gsm8k(directory, data, whole[0], *options)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    for flag, value in {"--limit": "0", "--batch-size": "-1", "--mode": "fast"}.items():
        with pytest.raises(SystemExit) as end:
            gsm8k(directory, data, "new", flag, value)
        assert end.value.code == 2


def test_rows_that_leave_nothing_to_draft_are_measured_as_ar_only(directory, data, tmp_path):
    """With two rows, and without measured acceptance, the planner does not draft."""
    options = ("--rows", "2", "--limit", "2")
    for mode in "both", "orthrus":
        with pytest.raises(UserError) as error:
            gsm8k(directory, data, tmp_path / "run", *options, "--mode", mode)
        assert str(error.value) == (
            "--rows 2: one token per forward is fastest here, which --mode ar measures; "
            f"for --mode {mode} choose a --cycle, or more rows"
        )
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"--rows 2: decoding one token per forward \(ar\) spends"):
        gsm8k(directory, data, tmp_path / "run", *options, "--mode", "ar")


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_generated_programs_are_run_only_if_allowed(name, tmp_path):
    arguments = ["--model", "absent", "--data", "absent", "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--allow-code-execution"):
        harness.main(name, arguments)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        harness.main("gsm8k", [*arguments, "--allow-code-execution"])  # it runs no code


@pytest.mark.parametrize("name", ["math500", "gsm8k", "aime", "humaneval", "mbpp", "demo"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_command_has_help(name, monkeypatch, capsys):
    assert _help(name, monkeypatch, capsys).startswith(f"usage: python -m eval.{name}")


@pytest.mark.parametrize("name", ["mt_bench", "spec_bench", "report"])
def test_commands_without_grades_have_help(name, monkeypatch, capsys):
    assert _help(name, monkeypatch, capsys).startswith(f"usage: python -m eval.{name}")


def _help(name, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "eval" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_demo_refuses_what_it_cannot_compare(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished training: run train\.main first"):
        demo.main(["--run", str(tmp_path)])
    for options in (["--mode", "ar"], ["--temperature", "0.5"]):
        with pytest.raises(UserError, match=r"eval\.demo compares both loops greedily"):
            demo.main(["--model", "absent", *options])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("else")
    with pytest.raises(UserError, match="exists: give another one, or --resume"):
        demo.main(["--model", "absent", "--out", str(tmp_path / "run")])


def test_command_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "eval.humaneval", "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: HumanEval is graded by running what the model writes")
