"""Benchmark runs end to end: the same text in both loops, real grades, all files."""

import dataclasses
import json
import time

import pytest

import orthrus_jax
from eval import aime, harness, records, report
from eval.benchmarks import BENCHMARKS, load
from eval.grading import grade_integer
from eval.runner import Runner
from orthrus_jax.conversation import Conversation
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Plan, SamplingParams
from tests.support.benchmark_runs import gsm8k, load_anew, rows_of, write
from tests.support.marks import slow
from tests.support.paths import DATA

pytestmark = pytest.mark.usefixtures("cheap_commands")
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
PAIRS = Plan(Strategy(draft_length=4), batch_size=2)


def test_run_keeps_every_answer_and_its_problem(directory, data, whole):
    out, result = whole
    model = orthrus_jax.load(directory)
    rows = rows_of(out)
    problems = load(BENCHMARKS["gsm8k"], data)
    assert [row["id"] for row in rows] == [problem.id for problem in problems]
    expected = {
        loop: model.generate([p.turns[0] for p in problems[:5]], strategy=loop, max_new_tokens=24)
        for loop in records.LOOPS
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
    model = load_anew(directory)  # with nothing compiled
    runner = Runner(model, SamplingParams(max_new_tokens=4), ["ar"], PAIRS, False)
    problems = load(BENCHMARKS["gsm8k"], data, 2)
    begin = time.perf_counter()
    _, seconds = runner.answer(problems, "ar")
    passed, compiled = time.perf_counter() - begin, model.engine.compile_seconds
    assert 0 < compiled < passed
    assert 0 < seconds <= passed - compiled


def test_chunks_of_other_lengths_share_the_compiled_loop(directory, data):
    model = load_anew(directory)
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
            (loop, sample) for loop in records.LOOPS for sample in range(3)
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
        assert order == [(loop, turn) for loop in records.LOOPS for turn in turns]
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
