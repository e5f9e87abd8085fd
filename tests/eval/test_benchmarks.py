r"""Every benchmark's files and graders: real data whole, the hub's fields, bad rows by line, and
whatever a model may answer."""

import gzip
import json
import sys
import types

import pytest

from eval import benchmarks, sandbox
from eval.benchmarks import BENCHMARKS, BOXED, digest, final_part, load
from orthrus_jax.errors import UserError
from tests.support.hub_rows import HUB_ROWS
from tests.support.paths import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
FILES = {
    "math500": ("math500_test.jsonl", 500),
    "gsm8k": ("gsm8k_test_first1000.jsonl", 1000),
    "aime24": ("aime24.jsonl", 30),
    "aime25": ("aime25.jsonl", 30),
    "humaneval": ("humaneval.jsonl", 164),
    "mbpp": ("mbpp.jsonl", 974),
    "mt_bench": ("mt_bench.jsonl", 80),
    "spec_bench": ("spec_bench.jsonl", 461),
}
MALFORMED = [
    "",
    " ",
    "\\boxed{",
    "\\boxed{}",
    "\\boxed{" * 500,
    "</think>",
    "<think>\\boxed{2}",
    "```python",
    "```python\n```",
    "```python\ndef f(:\n```",
    "```python\nraise SystemExit\n```",
    "```python\nwhile False: pass\nf = None\n```",
    "import os\nos._exit(0)",
    "(" * 5000,
    "\x00",
    "\ud800",
    "\u202e\u2028\r\n\x0b",
    "\U0001f600" * 100,
    "9" * 5000,
    "\\boxed{\\frac{1}{0}}",
]


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_real_file_is_read_whole(name):
    file, count = FILES[name]
    problems = load(BENCHMARKS[name], DATA / file)
    assert len(problems) == count
    assert len({p.id for p in problems}) == count
    assert all(turn.strip() for p in problems for turn in p.turns)
    assert len(load(BENCHMARKS[name], DATA / file, 3)) == 3
    if BENCHMARKS[name].grade and not BENCHMARKS[name].runs_code:
        assert all(p.gold for p in problems)


@needs_data
def test_groups_of_real_files_are_those_of_their_papers():
    counts = {}
    for name in FILES:
        for problem in load(BENCHMARKS[name], DATA / FILES[name][0]):
            for kind, group in problem.groups.items():
                per_group = counts.setdefault((name, kind), {})
                per_group[group] = per_group.get(group, 0) + 1
    assert counts["math500", "level"] == {"1": 43, "2": 90, "3": 105, "4": 128, "5": 134}
    assert len(counts["math500", "subject"]) == 7
    assert counts["mbpp", "split"] == {"few-shot": 10, "test": 500, "validation": 90, "train": 374}
    assert set(counts["mt_bench", "category"].values()) == {10}
    assert counts["spec_bench", "task"] == {
        "multi-turn": 80,
        "translation": 80,
        "summarization": 80,
        "qa": 80,
        "math_reasoning": 61,
        "rag": 80,
    }


@needs_data
def test_compressed_files_are_read():
    assert len(load(BENCHMARKS["gsm8k"], DATA / "gsm8k_train.jsonl.gz")) == 7473


@needs_data
def test_prompts_hold_the_question_and_the_model_cards_wording():
    rows = [json.loads(line) for line in (DATA / "math500_test.jsonl").read_text().splitlines()]
    for row, problem in zip(
        rows, load(BENCHMARKS["math500"], DATA / "math500_test.jsonl"), strict=True
    ):
        assert problem.turns == (f"{row['problem']}\n{BOXED}",)
        assert problem.gold == row["answer"]
    assert BOXED == r"Please reason step by step, and put your final answer within \boxed{}."
    problem = load(BENCHMARKS["humaneval"], DATA / "humaneval.jsonl")[0]
    assert f"```python\n{problem.tests['prompt'].strip()}\n```" in problem.turns[0]
    problem = load(BENCHMARKS["mbpp"], DATA / "mbpp.jsonl")[0]
    assert all(test in problem.turns[0] for test in problem.tests["test_list"])


@needs_data
@pytest.mark.parametrize("name", ["math500", "gsm8k", "aime24", "humaneval", "mbpp"])
def test_solutions_in_the_files_are_right_and_others_wrong(name):
    file = DATA / FILES[name][0]
    rows = [json.loads(line) for line in file.read_text().splitlines()[:4]]
    benchmark = BENCHMARKS[name]
    benchmark.ready()
    for row, problem in zip(rows, load(benchmark, file, 4), strict=True):
        if benchmark.runs_code:
            right = row.get("code") or row["prompt"] + row["canonical_solution"]
            right = f"<think>\n```python\n1/0\n```\n</think>\n\n```python\n{right}\n```"
            wrong = "```python\npass\n```"
        else:
            right = f"Therefore \\boxed{{{problem.gold}}}."
            wrong = "Therefore \\boxed{987654}."
        assert benchmark.grade(problem, final_part(right)).correct
        assert not benchmark.grade(problem, final_part(wrong)).correct


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_row_is_read_from_the_hub_and_from_a_file(name, tmp_path, monkeypatch):
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        return [HUB_ROWS[name]]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    benchmark = BENCHMARKS[name]
    from_file = load(benchmark, write(tmp_path / "rows.jsonl", HUB_ROWS[name]))
    if benchmark.hub is not None:
        assert load(benchmark) == from_file
        assert calls == [((benchmark.hub.id, benchmark.hub.config), {"split": benchmark.hub.split})]
    (problem,) = from_file
    assert problem.id
    assert problem.turns[0]


def test_gold_answers_and_tests_fit_their_graders(tmp_path):
    read = lambda name: load(BENCHMARKS[name], write(tmp_path / "rows.jsonl", HUB_ROWS[name]))[0]
    assert read("gsm8k").gold == "1,002"
    assert read("gsm8k").id == "gsm8k/0"
    assert read("mbpp").tests == {
        "test_setup_code": "import math",
        "test_list": ("assert f() == math.pi",),
    }
    assert read("mbpp").groups == {"split": "test"}
    grade = BENCHMARKS["mbpp"].grade(read("mbpp"), "```python\ndef f():\n    return 3\n```")
    assert not grade.correct
    assert grade.note.startswith("failed: ")
    assert "AssertionError" in grade.note
    assert BENCHMARKS["mbpp"].grade(read("mbpp"), "import math\ndef f(): return math.pi").correct


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.grade])
@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_wrong_without_an_error(name, text, tmp_path):
    (problem,) = load(BENCHMARKS[name], write(tmp_path / "rows.jsonl", HUB_ROWS[name]))
    assert not BENCHMARKS[name].grade(problem, final_part(text)).correct


def test_final_part_comes_after_the_thinking():
    assert final_part("<think>\\boxed{1}</think>\n\\boxed{2}") == "\n\\boxed{2}"
    assert final_part("a</think>b</think>c") == "c"
    assert final_part("no thinking") == "no thinking"
    assert final_part("<think> never ends \\boxed{1}") == ""


BAD_ROWS = [
    ("math500", {"problem": "x"}, 'there is no "answer"'),
    ("math500", {**HUB_ROWS["math500"], "problem": " "}, '"problem" must be a text'),
    ("math500", {**HUB_ROWS["math500"], "problem": ["x"]}, '"problem" must be a text'),
    ("math500", {**HUB_ROWS["math500"], "level": True}, '"level" must be a text'),
    ("math500", {**HUB_ROWS["math500"], "problem": "\ud800"}, "no Unicode text"),
    ("math500", ["x"], "expected a JSON object"),
    ("math500", 7, "expected a JSON object"),
    ("math500", None, "expected a JSON object"),
    ("gsm8k", {"question": "x", "answer": "#### five"}, "'five' is no integer"),
    ("aime25", {"problem": "x", "answer": "1/2"}, "'1/2' is no integer"),
    ("humaneval", {**HUB_ROWS["humaneval"], "test": None}, 'there is no "test"'),
    ("mbpp", {**HUB_ROWS["mbpp"], "test_list": []}, '"test_list" must be a list'),
    ("mbpp", {**HUB_ROWS["mbpp"], "test_list": "assert 1"}, '"test_list" must be a list'),
    ("mbpp", {**HUB_ROWS["mbpp"], "test_list": ["assert f("]}, '"test_list" is no Python: '),
    ("humaneval", {**HUB_ROWS["humaneval"], "test": "def"}, '"test" is no Python: '),
    ("mbpp", {**HUB_ROWS["mbpp"], "task_id": "x"}, '"task_id" must be a number'),
    ("mbpp", {**HUB_ROWS["mbpp"], "test_imports": [1.5]}, '"test_imports" must be a text'),
    ("mt_bench", {**HUB_ROWS["mt_bench"], "prompt": "Hi"}, '"turns" must be a list'),
    ("mt_bench", {**HUB_ROWS["mt_bench"], "prompt": ["Hi", ""]}, '"turns" must be a text'),
    ("spec_bench", {"question_id": 1, "turns": ["Hi"]}, 'there is no "category"'),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD_ROWS)
def test_bad_row_is_named_by_file_and_line(name, row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", HUB_ROWS[name])
    with open(path, "a") as file:
        file.write("\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        load(BENCHMARKS[name], path)
    error_message = str(error.value)
    assert error_message.startswith(f"{path}:3 is no row of {BENCHMARKS[name].title}: ")
    assert message in error_message
    assert "\n" not in error_message


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b'{"a": NaN', b"[" * 100_000, b"{} {}"])
def test_line_that_is_no_json_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(HUB_ROWS["gsm8k"]).encode() + b"\r\n" + line + b"\n")
    with pytest.raises(UserError, match=":2 is not JSON"):
        load(BENCHMARKS["gsm8k"], path)


def test_line_separator_inside_a_text_ends_no_line(tmp_path):
    row = {"question": "one\u2028two\u0085three", "answer": "5"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    (problem,) = load(BENCHMARKS["gsm8k"], tmp_path / "rows.jsonl")
    assert problem.turns[0].startswith("one\u2028two\u0085three")


def test_equal_ids_and_empty_files_are_refused(tmp_path):
    row = HUB_ROWS["mt_bench"]
    with pytest.raises(UserError, match=":2 is no row of MT-Bench: the id 7 has come before"):
        load(BENCHMARKS["mt_bench"], write(tmp_path / "rows.jsonl", row, row))
    with pytest.raises(UserError, match="holds no problem"):
        load(BENCHMARKS["mt_bench"], write(tmp_path / "rows.jsonl"))


def test_unreadable_file_is_named_with_both_ways_to_get_data(tmp_path):
    broken = tmp_path / "rows.jsonl.gz"
    broken.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    not_gzip = tmp_path / "plain.jsonl.gz"
    not_gzip.write_text("{}")
    for path in (tmp_path / "absent.jsonl", tmp_path, broken, not_gzip):
        with pytest.raises(UserError) as error:
            load(BENCHMARKS["gsm8k"], path)
        assert str(error.value).startswith(f"--data {path} cannot be read (")
        assert "without --data it is fetched from the hub (openai/gsm8k)" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="hemingkx/Spec-Bench"):
        load(BENCHMARKS["spec_bench"], tmp_path / "absent.jsonl")


def test_unreachable_hub_is_named_with_both_ways_to_get_data(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as error:
        load(BENCHMARKS["math500"])
    assert str(error.value) == (
        "HuggingFaceH4/MATH-500 cannot be fetched from the hub (no network): give --data "
        "FILE.jsonl with the rows of MATH-500, or go online"
    )
    with pytest.raises(UserError, match="has no usual copy on the hub: give --data FILE"):
        load(BENCHMARKS["spec_bench"])


def test_digest_depends_on_questions_and_gold_answers(tmp_path):
    first = load(BENCHMARKS["gsm8k"], write(tmp_path / "a.jsonl", HUB_ROWS["gsm8k"]))
    again = load(BENCHMARKS["gsm8k"], write(tmp_path / "b.jsonl", HUB_ROWS["gsm8k"]))
    other = {**HUB_ROWS["gsm8k"], "answer": "3"}
    assert digest(first) == digest(again)
    assert digest(first) != digest(load(BENCHMARKS["gsm8k"], write(tmp_path / "c.jsonl", other)))


def test_broken_sandbox_is_reported_before_decoding(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the sandbox did not start (exit 1): a\nb")

    BENCHMARKS["mbpp"].ready()
    monkeypatch.setattr(benchmarks, "run_program", broken)
    with pytest.raises(UserError, match="an empty program cannot be run here: b"):
        BENCHMARKS["humaneval"].ready()
    killed = sandbox.SandboxResult("memory", "no room")
    monkeypatch.setattr(benchmarks, "run_program", lambda *_, **__: killed)
    with pytest.raises(UserError, match="memory: no room"):
        BENCHMARKS["mbpp"].ready()
