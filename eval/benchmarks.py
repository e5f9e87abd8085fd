r"""The benchmarks: their files, prompts and graders.

A row of a file, with the fields of its source or of the hub's copy, becomes a `Problem`. Prompts of
mathematics are the Qwen3 model cards'. Knows nothing of models, runs or figures.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from eval.grading import Grade, grade_integer, grade_math
from eval.programs import check_humaneval, check_mbpp, program_names
from eval.sandbox import SandboxResult, run_program
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line, read_jsonl
from train.problems import boxed, problems

Row = Mapping[str, Any]
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
HUMANEVAL = "Complete this Python function. Answer with the whole function, and with every import \
it needs, in one ```python block.\n\n```python\n{prompt}\n```"
MBPP = "{text}\nThe code has to pass these tests:\n\n```python\n{tests}\n```\n\nAnswer with the \
whole code, and with every import it needs, in one ```python block."
DEMO_SEED, DEMO_PROBLEMS = 10_002, 500
MULTI_TURN = {  # MT-Bench's categories, which Spec-Bench counts as one task
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a benchmark.

    Attributes:
      id: unique in its benchmark.
      turns: the user's messages, at least one.
      gold: the right answer, where it is a text.
      groups: the groups it is also counted in, {"level": "5"}.
      tests: of a programming problem, the fields that eval.programs needs.
    """

    id: str
    turns: tuple[str, ...]
    gold: str = ""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tests: Row = dataclasses.field(default_factory=dict)


class Hub(NamedTuple):
    """A benchmark's place on the Hugging Face hub."""

    id: str
    split: str
    config: str | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read and graded.

    Attributes:
      name: of its command and its run directory.
      title: for people.
      hub: None if it has no usual copy there; rows then come from `generate_rows` or `source`.
      read: turns a row into a problem; raises UserError for a bad row. An id of "" stands for the
        row's number.
      grade: grades the final part of an answer; None where only speed is measured.
      ready: fails early if `grade` would fail for any answer.
      runs_code: grading runs programs that the model wrote.
      source: of the file, if it is not on the hub.
      generate_rows: makes the rows, if they need no file.
    """

    name: str
    title: str
    hub: Hub | None
    read: Callable[[Row], Problem]
    grade: Callable[[Problem, str], Grade] | None = None
    ready: Callable[[], Any] = lambda: None
    runs_code: bool = False
    source: str = ""
    generate_rows: Callable[[], Iterator[Row]] | None = None


def _value(row: Row, names: Sequence[str]) -> Any:
    """The first of these fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise UserError(f'there is no "{names[0]}"')


def _text(row: Row, *names: str) -> str:
    """The first of these fields that the row has: a text, or an integer as a text."""
    value = _value(row, names)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'"{names[0]}" must be a text that is not empty, not {value!r:.60}')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'"{names[0]}" holds half a surrogate pair: it is no Unicode text'
        ) from None
    return value


def _texts(row: Row, *names: str) -> tuple[str, ...]:
    """The first of these fields that the row has: a list of at least one text."""
    value = _value(row, names)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f'"{names[0]}" must be a list of texts, not {value!r:.60}')
    return tuple(_text({names[0]: item}, names[0]) for item in value)


def _integer(answer: str) -> str:
    try:
        grade_integer("", answer)
    except ValueError:
        raise UserError(f"the answer {answer!r:.60} is no integer") from None
    return answer


def _check_code(code: str, name: str) -> None:
    try:
        program_names(code)
    except (SyntaxError, ValueError) as error:
        raise UserError(f'"{name}" is no Python: {first_line(error)}') from None


def read_math(row: Row) -> Problem:
    """MATH-500: problem, answer, subject, level, unique_id."""
    return Problem(
        id=_text(row, "unique_id") if row.get("unique_id") is not None else "",
        turns=(f"{_text(row, 'problem')}\n{BOXED}",),
        gold=_text(row, "answer"),
        groups={name: _text(row, name) for name in ("subject", "level")},
    )


def read_gsm8k(row: Row) -> Problem:
    """GSM8K: question, answer; the number after the last #### is the gold answer."""
    gold = _text(row, "answer").rpartition("####")[2].strip()
    return Problem(id="", turns=(f"{_text(row, 'question')}\n{BOXED}",), gold=_integer(gold))


def read_aime(row: Row) -> Problem:
    """AIME: problem, answer, id; also the fields of other copies."""
    return Problem(
        id=_text(row, "id", "ID", "problem_idx") if {"id", "ID", "problem_idx"} & set(row) else "",
        turns=(f"{_text(row, 'problem', 'Problem', 'question')}\n{BOXED}",),
        gold=_integer(_text(row, "answer", "Answer")),
    )


def read_humaneval(row: Row) -> Problem:
    """HumanEval: task_id, prompt, entry_point, test."""
    tests = {name: _text(row, name) for name in ("prompt", "entry_point", "test")}
    _check_code(tests["test"], "test")
    turn = HUMANEVAL.format(prompt=tests["prompt"].strip("\n"))
    return Problem(id=_text(row, "task_id"), turns=(turn,), tests=tests)


def read_mbpp(row: Row) -> Problem:
    """MBPP, full (text, test_setup_code) or sanitized (prompt, test_imports): task_id, test_list.

    The groups are the paper's splits; published figures are those of "test".
    """
    number = _text(row, "task_id")
    if not number.isdecimal():
        raise UserError(f'"task_id" must be a number, not {number!r:.60}')
    tests = _texts(row, "test_list")
    setup = row.get("test_setup_code") or ""
    if row.get("test_imports"):
        setup = "\n".join(_texts(row, "test_imports"))
    if not isinstance(setup, str):
        raise UserError(f'"test_setup_code" must be a text, not {setup!r:.60}')
    _check_code("\n".join([setup, *tests]), "test_list")
    turn = MBPP.format(text=_text(row, "text", "prompt"), tests="\n".join(tests))
    return Problem(
        id=number,
        turns=(turn,),
        groups={"split": _mbpp_split(int(number))},
        tests={"test_setup_code": setup, "test_list": tests},
    )


def _mbpp_split(number: int) -> str:
    last = {10: "few-shot", 510: "test", 600: "validation"}
    return next((split for end, split in last.items() if number <= end), "train")


def read_mt_bench(row: Row) -> Problem:
    """MT-Bench: question_id, category, turns; on the hub prompt_id, category, prompt."""
    return Problem(
        id=_text(row, "question_id", "prompt_id"),
        turns=_texts(row, "turns", "prompt"),
        groups={"category": _text(row, "category")},
    )


def read_spec_bench(row: Row) -> Problem:
    """Spec-Bench, as MT-Bench; its six tasks count the eight categories of MT-Bench as one."""
    problem = read_mt_bench(row)
    category = problem.groups["category"]
    task = "multi-turn" if category in MULTI_TURN else category
    return dataclasses.replace(problem, groups={"task": task, **problem.groups})


def read_demo(row: Row) -> Problem:
    """The demo: question, answer, and operations, the number of equations in the answer."""
    groups = {"operations": _text(row, "operations")}
    return Problem("", (_text(row, "question"),), _integer(_text(row, "answer")), groups)


def _demo_rows() -> Iterator[Row]:
    """Held-out problems of train/problems.py: none of their questions was trained on."""
    for problem in problems("held-out", DEMO_SEED, DEMO_PROBLEMS):
        operations = problem.answer.count(" = ")
        answer = str(problem.result)
        yield {"question": problem.question, "answer": answer, "operations": operations}


def _demo(problem: Problem, text: str) -> Grade:
    """The last box must hold exactly the number, as train.problems.is_correct has it."""
    answer = boxed(text)
    if answer is None:
        return Grade(False, None, "no box")
    return Grade(answer.strip() == problem.gold, answer.strip())


def _code(check: Callable[[Row, str], SandboxResult]) -> Callable[[Problem, str], Grade]:
    """A grader that runs the answer; the note is its status and the end of its output."""

    def grade(problem: Problem, text: str) -> Grade:
        result = check(problem.tests, text)
        if result.passed:
            return Grade(True, None)
        return Grade(False, None, f"{result.status}: {result.stderr[-200:]}")

    return grade


def final_part(text: str) -> str:
    """The answer after its thinking part; a thinking part that never ends leaves no answer."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


_math = lambda problem, text: grade_math(text, problem.gold)
_aime = lambda problem, text: grade_integer(text, problem.gold)
_gsm8k = lambda problem, text: grade_integer(text, problem.gold, last_number=True)
_math_ready = lambda: grade_math(r"\boxed{\frac12}", "0.5")


def _sandbox_ready() -> None:
    try:
        result = run_program("", seconds=60)
        problem = "" if result.passed else f"{result.status}: {result.stderr}"
    except RuntimeError as error:  # it could not start
        problem = str(error)
    if problem:
        last_line = problem.strip().rpartition("\n")[2]
        raise UserError(f"an empty program cannot be run here: {last_line}")


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "math500",
            "MATH-500",
            Hub("HuggingFaceH4/MATH-500", "test"),
            read_math,
            _math,
            _math_ready,
        ),
        Benchmark("gsm8k", "GSM8K", Hub("openai/gsm8k", "test", "main"), read_gsm8k, _gsm8k),
        Benchmark("aime24", "AIME 2024", Hub("HuggingFaceH4/aime_2024", "train"), read_aime, _aime),
        Benchmark("aime25", "AIME 2025", Hub("math-ai/aime25", "test"), read_aime, _aime),
        Benchmark(
            "humaneval",
            "HumanEval",
            Hub("openai/openai_humaneval", "test"),
            read_humaneval,
            _code(check_humaneval),
            _sandbox_ready,
            runs_code=True,
        ),
        Benchmark(
            "mbpp",
            "MBPP",
            Hub("google-research-datasets/mbpp", "test", "full"),
            read_mbpp,
            _code(check_mbpp),
            _sandbox_ready,
            runs_code=True,
        ),
        Benchmark(
            "mt_bench", "MT-Bench", Hub("HuggingFaceH4/mt_bench_prompts", "train"), read_mt_bench
        ),
        Benchmark(
            "spec_bench",
            "Spec-Bench",
            None,
            read_spec_bench,
            source="data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench",
        ),
        Benchmark(
            "demo",
            "the demo's problems",
            None,
            read_demo,
            _demo,
            source="rows of question, answer and operations",
            generate_rows=_demo_rows,
        ),
    )
}


def load(
    benchmark: Benchmark, path: str | pathlib.Path | None = None, limit: int | None = None
) -> list[Problem]:
    """Read the problems of a benchmark, all of them checked, and return the first `limit`.

    Args:
      benchmark: how its rows are read.
      path: JSONL, or JSONL in gzip (.gz); None is the hub's copy, or this machine's cache of it, or
        the rows that are generated here.
      limit: None is all.

    Raises:
      UserError: in one line: the file and line, or the two ways to get the data.
    """
    rows = _usual_rows(benchmark) if path is None else _file_rows(benchmark, pathlib.Path(path))
    by_id: dict[str, Problem] = {}
    for number, (place, row) in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"expected a JSON object, not {row!r:.60}")
            problem = benchmark.read(row)
            if not problem.id:
                problem = dataclasses.replace(problem, id=f"{benchmark.name}/{number}")
            if problem.id in by_id:
                raise UserError(f"the id {problem.id} has come before")
        except UserError as error:
            raise UserError(f"{place} is no row of {benchmark.title}: {error}") from None
        by_id[problem.id] = problem
    if not by_id:
        raise UserError(f"{path} holds no problem: expected the rows of {benchmark.title}")
    return list(by_id.values())[:limit]


def digest(problems: Sequence[Problem]) -> str:
    """A checksum of all questions and gold answers."""
    whole = [dataclasses.astuple(problem) for problem in problems]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


def _hub_words(benchmark: Benchmark) -> str:
    if benchmark.hub is None:
        return f"it is {benchmark.source}"  # also of generated rows: a file may replace them
    return f"without --data it is fetched from the hub ({benchmark.hub.id})"


def _file_rows(benchmark: Benchmark, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """The place, FILE:LINE, and the JSON value of each line; blank lines are left out."""
    try:
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
    except OSError as error:
        raise UserError(
            f"--data {path} cannot be read ({first_line(error)}): give a JSONL file of "
            f"{benchmark.title}; {_hub_words(benchmark)}"
        ) from None


def _usual_rows(benchmark: Benchmark) -> Iterator[tuple[str, Any]]:
    if benchmark.generate_rows is not None:
        return ((f"row {number}", row) for number, row in enumerate(benchmark.generate_rows()))
    hub = benchmark.hub
    if hub is None:
        raise UserError(
            f"{benchmark.title} has no usual copy on the hub: give --data FILE.jsonl, "
            f"{benchmark.source}"
        )
    print(f"fetching {hub.id} from the hub (or this machine's cache of it)", file=sys.stderr)
    for name in ("datasets", "huggingface_hub"):  # offline they log each of many retries
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import datasets  # late: it takes seconds

        rows = datasets.load_dataset(hub.id, hub.config, split=hub.split)
    except Exception as error:  # offline, no such set, a damaged cache: the library raises anything
        raise UserError(
            f"{hub.id} cannot be fetched from the hub ({first_line(error):.120}): give --data "
            f"FILE.jsonl with the rows of {benchmark.title}, or go online"
        ) from None
    return ((f"{hub.id} row {number}", row) for number, row in enumerate(rows))
