"""Benchmark runs end to end: the same text in both loops, real grades, runs that are killed and go
on, and refusals before anything is decoded."""

import dataclasses
import functools
import json
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import pytest

import orthrus_jax
from eval import aime, demo, harness, metrics, report
from eval.benchmarks import BENCHMARKS, load
from eval.grading import grade_integer
from eval.harness import Run, fingerprint
from eval.runner import Runner
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Plan, SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import Conversation
from tests.support.configs import tiny_config
from tests.support.marks import slow
from tests.support.paths import DATA, ROOT
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params
from train.problems import is_correct, problems

TEXTS = ["How many apples are 12 and 30?", "They are 42 apples. The answer is \\boxed{42}."] * 20
REAL = {
    "math500": "math500_test.jsonl",
    "gsm8k": "gsm8k_test_first1000.jsonl",
    "aime24": "aime24.jsonl",
    "aime25": "aime25.jsonl",
    "humaneval": "humaneval.jsonl",
    "mbpp": "mbpp.jsonl",
    "mt_bench": "mt_bench.jsonl",
    "spec_bench": "spec_bench.jsonl",
}
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
TIMES = {
    *("seconds", "first_seconds", "first_token_ms"),
    *("tokens_per_second", "speedup", "speedup_range"),
}

PAIRS = Plan(Strategy(draft_length=4), batch_size=2)

_load = functools.cache(orthrus_jax.load)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    """A checkpoint is loaded and compiled once for all tests; test_report tests the plots."""
    monkeypatch.setattr(orthrus_jax, "load", _load)
    monkeypatch.setattr(report, "_svg", lambda *given, **more: "<svg></svg>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint with random weights in both views: its drafts are sometimes right."""
    config = tiny_config(
        vocab_size=400,
        num_hidden_layers=1,
        mask_token_id=399,
        eos_token_ids=(2,),
        max_position_embeddings=512,
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    weights = random_params(config, 3, gain=3.0)
    save_checkpoint(path, config, weights, tokenizer=small_tokenizer(TEXTS, 400))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """96 rows of GSM8K, all different."""
    rows = [
        {"question": f"How many apples are {i} and {i % 7}?", "answer": f"#### {i + i % 7}"}
        for i in range(96)
    ]
    return write(tmp_path_factory.mktemp("data") / "gsm8k.jsonl", rows)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k(directory, data, out, *more) -> dict:
    """Run the command; its numbers."""
    arguments = ["--model", directory, "--data", data, "--out", str(out), "--max-new-tokens", "24"]
    harness.main("gsm8k", [*arguments, *more])
    return json.loads((pathlib.Path(out) / report.RESULTS).read_text())


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(out) / metrics.ANSWERS).open()]


def timeless(value):
    """Figures without times."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(directory, data, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, gsm8k(directory, data, out)


def test_run_keeps_every_answer_and_its_problem(directory, data, whole):
    out, result = whole
    model = orthrus_jax.load(directory)
    rows = rows_of(out)
    problems = load(BENCHMARKS["gsm8k"], data)
    assert [row["id"] for row in rows] == [problem.id for problem in problems]
    expected = {
        loop: model.generate([p.turns[0] for p in problems[:5]], strategy=loop, max_new_tokens=24)
        for loop in metrics.LOOPS
    }
    for i, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        assert row["turns"] == list(problem.turns)
        assert row["gold"] == problem.gold
        assert [a["loop"] for a in row["answers"]] == ["ar", "orthrus"]
        for answer in row["answers"]:
            grade = grade_integer(answer["text"], problem.gold, last_number=True)
            assert (answer["correct"], answer["answer"]) == (grade.correct, grade.answer)
            assert answer["forwards"] == 1 + (1 + (answer["loop"] == "orthrus")) * answer["cycles"]
            if i < 5:
                completion = expected[answer["loop"]][i]
                assert answer["text"] == completion.text
                assert answer["tokens"] == len(completion.tokens)
                assert answer["forwards"] == completion.forwards
                assert answer["accepted"] in (completion.accepted, [])
                assert 0 < answer["first_seconds"] < answer["seconds"]
    assert result["same_text"] == 1.0
    assert result["unlike"] == []
    assert result["asked"]["max_new_tokens"] == 24
    assert 0 < result["loops"]["orthrus"]["acceptance_length"] < 3
    assert sum(row["seconds"]["ar"] for row in rows) == pytest.approx(
        result["loops"]["ar"]["seconds"]
    )
    assert (out / report.PAGE).read_text().startswith("<!doctype html>")


def test_chunks_go_through_ar_and_orthrus_in_turn(directory, data, tmp_path, monkeypatch):
    order = []
    answer = Runner.answer
    monkeypatch.setattr(
        Runner,
        "answer",
        lambda self, chunk, loop: order.append((loop, len(chunk))) or answer(self, chunk, loop),
    )
    gsm8k(directory, data, tmp_path / "run", "--limit", "20", "--batch-size", "2")
    assert order == [
        *(("ar", 8), ("orthrus", 8)) * 2,
        *(("ar", 4), ("orthrus", 4)),
    ]


def test_compiling_is_not_timed(directory, data):
    model = _load.__wrapped__(directory)  # with nothing compiled
    runner = Runner(model, SamplingParams(max_new_tokens=4), ["ar"], PAIRS, False)
    problems = load(BENCHMARKS["gsm8k"], data, 2)
    begin = time.perf_counter()
    _, seconds = runner.answer(problems, "ar")
    passed, compiled = time.perf_counter() - begin, model.engine.compile_seconds
    assert 0 < compiled < passed
    assert 0 < seconds <= passed - compiled


def test_chunks_of_other_lengths_share_the_compiled_loop(directory, data):
    model = _load.__wrapped__(directory)
    problems = load(BENCHMARKS["gsm8k"], data, 2)
    turns = (problems[0].turns[0] * 3, "And why?")
    longer = [dataclasses.replace(problems[0], turns=turns)]
    runner = Runner(model, SamplingParams(max_new_tokens=4), ["ar"], PAIRS, False)
    runner = runner.fitted([*problems, *longer])
    for chunk in problems, longer:
        runner.answer(chunk, "ar")
    compiled = [key[0].__name__ for key in model.engine.programs.compiled]
    assert compiled.count("prefill") > compiled.count("ar_decode") == 1


@pytest.mark.parametrize("batch_size", [*slow(2), 7])
def test_answers_do_not_depend_on_the_batch(directory, data, whole, batch_size, tmp_path):
    gsm8k(directory, data, tmp_path / "run", "--limit", "30", "--batch-size", str(batch_size))
    digests = lambda rows: [[a["digest"] for a in row["answers"]] for row in rows]
    assert digests(rows_of(tmp_path / "run")) == digests(rows_of(whole[0])[:30])


def test_samples_differ_and_coupled_ones_equal_ars(directory, data, tmp_path):
    options = ("--limit", "6", "--n", "3", "--temperature", "1.5", "--top-k", "50", "--seed", "5")
    options += ("--batch-size", "4", "--max-new-tokens", "12")
    result = gsm8k(directory, data, tmp_path / "coupled", *options, "--accept", "coupled")
    assert result["same_text"] == 1.0
    assert list(result["loops"]["ar"]["pass_at"]) == ["1", "2", "3"]
    rows = rows_of(tmp_path / "coupled")
    for row in rows:
        assert [(a["loop"], a["sample"]) for a in row["answers"]] == [
            (loop, sample) for loop in metrics.LOOPS for sample in range(3)
        ]
        assert len({a["digest"] for a in row["answers"]}) > 1
    assert "same_text" not in gsm8k(directory, data, tmp_path / "rejection", *options)


def test_second_turn_sees_the_first(directory, tmp_path):
    rows = [
        {"question_id": i, "category": "math", "turns": [f"How many are {i}?", "And 12 apples?"]}
        for i in range(3)
    ]
    rows.append({"question_id": 9, "category": "writing", "turns": ["The answer?"]})
    arguments = ["--model", directory, "--data", write(tmp_path / "mt.jsonl", rows)]
    arguments += ["--max-new-tokens", "12", "--out", str(tmp_path / "run"), "--batch-size", "2"]
    harness.main("mt_bench", arguments)
    model = orthrus_jax.load(directory)
    for row, line in zip(rows, rows_of(tmp_path / "run"), strict=True):
        turns = range(len(row["turns"]))
        order = [(a["loop"], a["turn"]) for a in line["answers"]]
        assert order == [(loop, turn) for loop in metrics.LOOPS for turn in turns]
        assert "correct" not in line["answers"][0]
        talk = Conversation(model)
        for turn in turns:
            expected = "".join(talk.ask(row["turns"][turn], max_new_tokens=12))
            assert {a["text"] for a in line["answers"] if a["turn"] == turn} == {expected}
    result = json.loads((tmp_path / "run" / report.RESULTS).read_text())
    assert list(result["groups"]["category"]) == ["math", "writing"]
    assert result["loops"]["ar"]["answers"] == 7
    assert "accuracy" not in result["loops"]["ar"]


def test_prompt_that_does_not_fit_is_reported_and_counted_wrong(directory, tmp_path, capsys):
    rows = [
        {"question": "How many? " + "1 " * 300, "answer": "1"},
        {"question": "How many?", "answer": "2"},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    result = gsm8k(directory, data, tmp_path / "run")
    long, short = rows_of(tmp_path / "run")
    for answer in long["answers"]:
        assert "there is room for 488" in answer["skipped"]
        assert answer["correct"] is False
    assert all("skipped" not in answer for answer in short["answers"])
    assert result["loops"]["orthrus"]["skipped"] == 1
    assert "1 did not fit the model's positions" in capsys.readouterr().out
    alone = gsm8k(directory, data, tmp_path / "alone", "--limit", "1")  # nothing to decode
    assert alone["loops"]["ar"]["tokens"] == 0


def test_second_turn_that_does_not_fit_ends_its_dialogue(directory, tmp_path):
    turns = ["How many?", "1 " * 300, "And why?"]
    rows = [{"question_id": 1, "category": "math", "turns": turns}]
    arguments = ["--model", directory, "--data", write(tmp_path / "mt.jsonl", rows)]
    harness.main("mt_bench", [*arguments, "--max-new-tokens", "9", "--out", str(tmp_path / "run")])
    answers = rows_of(tmp_path / "run")[0]["answers"]
    assert [(a["turn"], "skipped" in a) for a in answers] == [(0, False), (1, True)] * 2


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


def test_killed_run_resumes_to_the_same_numbers(directory, data, whole, tmp_path):
    out = tmp_path / "killed"
    arguments = ["--model", directory, "--data", data, "--out", str(out), "--max-new-tokens", "24"]
    command = [sys.executable, "-m", "eval.gsm8k", *arguments, "--resume"]
    answers = out / metrics.ANSWERS
    lines = lambda: answers.read_bytes().count(b"\n") if answers.exists() else 0
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            while lines() < 4:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 4 <= lines() < 96
    assert not (out / report.RESULTS).exists()
    with (out / metrics.ANSWERS).open("ab") as file:
        file.write(b'{"id": "gsm8k/9')  # as a kill in the midst of a write leaves it
    result = gsm8k(directory, data, out, "--resume")
    assert timeless(result) == timeless(whole[1])
    strip = lambda rows: [{**timeless(row)} for row in rows]
    assert strip(rows_of(out)) == strip(rows_of(whole[0]))


@pytest.mark.parametrize(
    ("kept", "torn"),
    [
        *((0, b""), (0, b"{"), (1, b"\xff\0"), (6, b'{"id": "gsm8k/2", "gro')),
        *((95, b""), (95, b'{"id": "gsm8k/95"}'), (96, b"{"), (96, b"")),
    ],
)
def test_any_torn_file_is_resumed(directory, data, whole, kept, torn, tmp_path):
    out = tmp_path / "torn"
    out.mkdir()
    (out / metrics.RECIPE).write_bytes((whole[0] / metrics.RECIPE).read_bytes())
    lines = (whole[0] / metrics.ANSWERS).read_bytes().splitlines(keepends=True)
    (out / metrics.ANSWERS).write_bytes(b"".join(lines[:kept]) + torn)
    result = gsm8k(directory, data, out, "--resume")
    assert timeless(result) == timeless(whole[1])
    assert [row["id"] for row in rows_of(out)] == [f"gsm8k/{i}" for i in range(96)]


def test_run_killed_before_its_recipe_was_written_begins_anew(directory, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.json.0a1b2c3d.tmp").write_text('{"ti')
    assert gsm8k(directory, data, out, "--resume", "--limit", "2")["answered"] == 2


def test_resume_without_a_run_begins_one(directory, data, tmp_path):
    options = ("--resume", "--limit", "2", "--mode", "ar")
    assert gsm8k(directory, data, tmp_path / "run", *options)["answered"] == 2
    before = (tmp_path / "run" / metrics.ANSWERS).read_bytes()
    gsm8k(directory, data, tmp_path / "run", *options)
    assert (tmp_path / "run" / metrics.ANSWERS).read_bytes() == before


CHANGES = [
    (("--mode", "ar"), "mode was both and is now ar"),
    (("--limit", "9"), "limit was None and is now 9"),
    (("--batch-size", "2"), "batch_size was 1 and is now 2"),
    (("--temperature", "0.5"), "temperature was 0.0 and is now 0.5"),
    (("--top-p", "0.5"), "top_p was 1.0 and is now 0.5"),
    (("--top-k", "5"), "top_k was 0 and is now 5"),
    (("--seed", "5"), "seed was 0 and is now 5"),
    (("--accept", "coupled"), "accept was rejection and is now coupled"),
    (("--thinking",), "thinking was False and is now True"),
    (("--max-new-tokens", "25"), "max_new_tokens was 24 and is now 25"),
    (("--draft-length", "3"), "draft_length was 4 and is now 3"),
    (("--dtype", "bfloat16"), "weights was "),
    (("--model", "another"), "model was "),
]


@pytest.mark.parametrize(("options", "message"), CHANGES)
def test_changed_recipe_is_refused_by_name(directory, data, whole, options, message):
    before = (whole[0] / metrics.ANSWERS).read_bytes()
    with pytest.raises(UserError, match=f"--resume {whole[0]}: {message}"):
        gsm8k(directory, data, whole[0], "--resume", *options)
    assert (whole[0] / metrics.ANSWERS).read_bytes() == before


def test_other_data_another_benchmark_and_other_weights_are_refused(
    directory, data, whole, tmp_path
):
    rows = [{"question": "How many?", "answer": "1"}]
    other = write(tmp_path / "other.jsonl", rows)
    with pytest.raises(UserError, match="data was"):
        gsm8k(directory, other, whole[0], "--resume")
    mt = write(tmp_path / "mt.jsonl", [{"question_id": 1, "category": "math", "turns": ["Hi"]}])
    arguments = ["--model", directory, "--data", mt, "--out", str(whole[0]), "--resume"]
    with pytest.raises(UserError, match="benchmark was gsm8k and is now mt_bench"):
        harness.main("mt_bench", [*arguments, "--max-new-tokens", "24"])
    model = orthrus_jax.load(directory)
    changed = random_params(model.config, 4, gain=3.0)
    assert fingerprint(model.params) == fingerprint(_load.__wrapped__(directory).params)
    assert fingerprint(model.params) != fingerprint(changed)


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


def test_two_processes_do_not_write_one_run(tmp_path):
    recipe = {"asked": {}, "problems": 1}
    with Run(tmp_path / "run", resume=False).open(recipe) as (_, done):
        assert done == set()
        again = Run(tmp_path / "run", resume=True)
        with pytest.raises(UserError, match="is being written by another process"):
            again.open(recipe).__enter__()
    with Run(tmp_path / "run", resume=True).open(recipe):
        pass


def test_unreadable_run_is_named(tmp_path):
    (tmp_path / metrics.RECIPE).write_text("{")
    with pytest.raises(UserError, match="holds no run"):
        Run(tmp_path, resume=True)


@needs_data
@pytest.mark.parametrize(
    "name", ["math500", "mt_bench", *slow(*(n for n in REAL if n not in ("math500", "mt_bench")))]
)
def test_every_real_file_runs_end_to_end(name, tiny_base, tmp_path):
    arguments = ["--model", str(tiny_base), "--data", str(DATA / REAL[name]), "--limit", "3"]
    arguments += ["--max-new-tokens", "8", "--batch-size", "3", "--draft-length", "3"]
    arguments += ["--out", str(tmp_path / "run")]
    if name in ("humaneval", "mbpp"):
        arguments.append("--allow-code-execution")
    if name.startswith("aime"):
        aime.main([*arguments, "--year", name[-2:]])
    else:
        harness.main(name, arguments)
    result = json.loads((tmp_path / "run" / report.RESULTS).read_text())
    assert result["asked"]["benchmark"] == name
    assert result["answered"] == result["problems"] == 3
    for loop in result["loops"].values():
        assert loop["answers"] + loop["skipped"] == (6 if "bench" in name else 3)
        assert ("accuracy" in loop) == (name not in ("mt_bench", "spec_bench"))


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", REAL)
def test_every_real_file_runs_whole(name, tiny_base, tmp_path):
    """All rows of all files, at a tiny budget: nothing crashes, nothing is lost."""
    count = len(load(BENCHMARKS[name], DATA / REAL[name]))
    arguments = ["--model", str(tiny_base), "--data", str(DATA / REAL[name]), "--batch-size", "32"]
    arguments += ["--max-new-tokens", "32", "--draft-length", "4", "--out", str(tmp_path / "run")]
    arguments += ["--dtype", "float32"]
    if name in ("humaneval", "mbpp"):
        arguments.append("--allow-code-execution")
    if name.startswith("aime"):
        aime.main([*arguments, "--year", name[-2:]])
    else:
        harness.main(name, arguments)
    result = json.loads((tmp_path / "run" / report.RESULTS).read_text())
    assert result["answered"] == result["problems"] == count
    assert result["same_text"] == 1.0


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
