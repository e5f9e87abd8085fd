"""Run a benchmark: decode, grade, keep every answer, survive being killed. `eval.math500` etc.

Problems go in chunks, each first through AR and then through Orthrus, so that a slow spell of the
machine hits both. A chunk's lines are appended to OUT/answers.jsonl once it is graded; `--resume`
goes on with the problems that are missing there. Problems and graders are benchmarks.py, figures
metrics.py and report.py, decoding runner.py, the directory run_directory.py.
"""

import argparse
import os
import pathlib
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import orthrus_jax
from eval import report
from eval.arguments import positive
from eval.benchmarks import BENCHMARKS, Benchmark, Problem, digest, final_part, load
from eval.grading import Grade
from eval.records import LOOPS
from eval.run_directory import Answers, RunDirectory
from eval.runner import Dialogue, Runner, checksum
from eval.sandbox import admit
from orthrus_jax import cli
from orthrus_jax.attention.kv_config import UNQUANTISED
from orthrus_jax.cli import add_cycle, add_rows, chosen_strategy, strategy_of
from orthrus_jax.decoding import AcceptRule, Strategy
from orthrus_jax.engine import Plan, SamplingParams
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.llm import LLM
from orthrus_jax.model import Params

MODEL = "Qwen/Qwen3-4B"
NEW_TOKENS, THINKING_TOKENS = 2048, 32_768  # the paper's budget; the model cards' for thinking
ROUNDS = 4  # batches per chunk: a killed run loses a chunk, and at its end a batch runs empty
GRADERS = 16  # programs run at once, at most
# Options that --resume must find unchanged; `batch_size` too, for it changes the times.
RECIPE_FIELDS = (
    *("model", "mode", "limit", "batch_size", "thinking"),
    *("temperature", "top_p", "top_k", "seed", "n", "accept", "rows"),
)


def grade(benchmark: Benchmark, pool: Executor, dialogues: Sequence[Dialogue]) -> None:
    """Put a grade on the last answer of each dialogue; equal answers are graded once."""
    if benchmark.grade is None:
        return
    grades: dict[tuple[str, str], Future[Grade]] = {}
    waiting = []
    for dialogue in dialogues:
        answer = dialogue.answers[-1]
        if "skipped" in answer:
            answer |= {"correct": False, "note": "skipped"}
            continue
        key = (dialogue.problem.id, final_part(answer["text"]))
        if key not in grades:
            grades[key] = pool.submit(benchmark.grade, dialogue.problem, key[1])
        waiting.append((answer, grades[key]))
    for answer, future in waiting:
        verdict = future.result()
        answer |= {"correct": verdict.correct, "answer": verdict.answer, "note": verdict.note}


def _row(
    problem: Problem, dialogues: Sequence[Dialogue], seconds: dict[str, float]
) -> dict[str, Any]:
    """A problem's line of answers.jsonl."""
    return {
        "id": problem.id,
        "groups": dict(problem.groups),
        "turns": problem.turns,
        "gold": problem.gold,
        "seconds": seconds,
        "answers": [answer for d in dialogues for answer in d.answers],
    }


def answer_all(
    runner: Runner, problems: Sequence[Problem], benchmark: Benchmark, answers: Answers
) -> Iterator[int]:
    """Answer and grade the problems chunk by chunk; append their lines; yield each chunk's size.

    The seconds of a chunk are divided evenly among its problems: their sum is the run's wall-clock,
    however many of the lines a killed process wrote.
    """
    pool = ThreadPoolExecutor(min(GRADERS, os.cpu_count() or 1))
    try:
        size = max(1, ROUNDS * runner.plan.batch_size // runner.sampling.n)
        for begin in range(0, len(problems), size):
            chunk = problems[begin : begin + size]
            if not begin:
                runner.warm(chunk)
            every: list[Dialogue] = []
            seconds: dict[str, float] = {}
            for loop in runner.names:
                dialogues, loop_seconds = runner.answer(chunk, loop)
                every += dialogues
                seconds[loop] = loop_seconds / len(chunk)
            grade(benchmark, pool, every)
            answers.append(
                {p.id: _row(p, [d for d in every if d.problem is p], seconds) for p in chunk}
            )
            yield len(chunk)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # of a run that is stopped


def fingerprint(params: Params) -> str:
    """A checksum of all weights' bits, summed on the device: the same on every one."""
    sums = jax.device_get([_sum_of_bits(leaf) for leaf in jax.tree.leaves(params)])
    return checksum(np.array(sums, "<u4"))


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).sum(dtype=jnp.uint32)


def command_parser(
    name: str,
    title: str,
    *,
    runs_code: bool = False,
    model: str = MODEL,
    data: str = "the copy on the hub",
    new_tokens: int | None = None,
    out: str = "runs/NAME of the benchmark; must not exist",
) -> argparse.ArgumentParser:
    """The options of all benchmarks; the other arguments are defaults to show."""
    default = SamplingParams()
    budget = new_tokens or f"{NEW_TOKENS}, {THINKING_TOKENS} with --thinking"
    parser = argparse.ArgumentParser(
        prog=f"python -m eval.{name}",
        description=f"Run {title}: accuracy where it is graded, acceptance and speed.",
    )
    add = parser.add_argument
    add("--model", default=model, metavar="DIR_OR_ID", help=f"default: {model}")
    add("--data", metavar="FILE", help=f"JSONL, may end in .gz; default: {data}")
    add("--mode", choices=("orthrus", "ar", "both"), default="both", help="default: both")
    add("--limit", type=positive, metavar="N", help="the first N problems only")
    add("--batch-size", type=positive, default=1, metavar="N", help="default: %(default)s")
    add("--max-new-tokens", type=positive, default=new_tokens, metavar="N",
        help=f"default: {budget}")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy")
    add("--top-p", type=float, default=default.top_p, metavar="X", help="default: 1, off")
    add("--top-k", type=int, default=default.top_k, metavar="N", help="default: 0, off")
    add("--seed", type=int, default=default.seed, metavar="N", help="default: %(default)s")
    add("--n", type=positive, default=1, metavar="N", help="samples per problem: mean@N, pass@k")
    rules = [rule.value for rule in AcceptRule]
    add("--accept", choices=rules, default=rules[0], help="of sampled drafts; default: %(default)s")
    add(
        "--draft-length",
        type=positive,
        metavar="K",
        help="default: as eval.calibrate measured here, or the trained K",
    )
    add_cycle(parser)
    add_rows(parser)
    add("--thinking", action="store_true", help="let the model think first; the model cards ask "
        "for --temperature 0.6 --top-p 0.95 --top-k 20 then")  # fmt: skip
    cli.add_runtime(parser)
    cli.add_kv_cache(parser)
    add("--out", metavar="DIR", help=f"default: {out}")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    if runs_code:
        add("--allow-code-execution", action="store_true", help="run the programs that the model "
            "writes, limited as eval/sandbox.py says; it is no security boundary")  # fmt: skip
        add("--unconfined", action="store_true", help="run them even where the system offers no "
            "namespaces, and so guards less")  # fmt: skip
    return parser


def _sampling(args: argparse.Namespace) -> SamplingParams:
    budget = args.max_new_tokens or (THINKING_TOKENS if args.thinking else NEW_TOKENS)
    names = ("temperature", "top_p", "top_k", "seed", "n")
    return SamplingParams(**{name: getattr(args, name) for name in names}, max_new_tokens=budget)


def _runner(
    args: argparse.Namespace, model: LLM, sampling: SamplingParams, strategy: Strategy
) -> Runner:
    """The runner of the chosen loops, checked against the model."""
    names = LOOPS if args.mode == "both" else (args.mode,)
    plan = Plan(strategy, batch_size=args.batch_size, time_to_first_token=True)
    runner = Runner(model, sampling, names, plan, args.thinking)
    for name in names:
        model.engine.check([], runner.plan_of(name))
    positions = model.config.max_position_embeddings
    if sampling.max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt: the model "
            f"has {positions} positions"
        )
    if args.mode != "ar" and not model.trained:
        print(
            "note: this model's diffusion view is untrained: its answers are exact, its acceptance "
            "and speed are not those of the method",
            file=sys.stderr,
        )
    return runner


def measured_strategy(args: argparse.Namespace, model: LLM) -> Strategy:
    """The strategy of the loop "orthrus": by its flags, or the planner's with --rows.

    Raises:
      UserError: where the planner would not draft, and --mode says to measure drafting.
    """
    strategy = model.strategy(chosen_strategy(args, model, args.batch_size))
    if strategy.method == "ar" and args.mode != "ar":
        raise UserError(
            f"--rows {args.rows}: one token per forward is fastest here, which --mode ar measures; "
            f"for --mode {args.mode} choose a --cycle, or more rows"
        )
    return strategy


def _recorded(strategy: Strategy, model: LLM) -> dict[str, Any]:
    """The strategy as recipe.json holds it."""
    plain = Strategy() if strategy.method == "ar" else strategy
    flags = model.engine.resolve(model.strategy(plain)).flags()
    return {name: value for name, value in flags.items() if name != "mode"}


def measure(
    benchmark: Benchmark, args: argparse.Namespace, model: LLM | None = None
) -> dict[str, Any]:
    """Run a benchmark into args.out; return its numbers, as they are in results.json there.

    Args:
      benchmark: the problems and their grader.
      args: of `command_parser`.
      model: the one of args.model, if it is loaded already.

    Raises:
      UserError: for options that do not fit, before anything is decoded or written.
    """
    if benchmark.runs_code and not args.allow_code_execution:
        raise UserError(
            f"{benchmark.title} is graded by running what the model writes: "
            "give --allow-code-execution to allow that"
        )
    strategy_of(args)  # flags that do not fit each other are refused before a model is loaded
    sampling = _sampling(args)
    run_directory = RunDirectory(pathlib.Path(args.out), resume=args.resume)
    problems = load(benchmark, args.data)
    settings = {name: getattr(args, name) for name in RECIPE_FIELDS} | {
        "benchmark": benchmark.name,
        "data": digest(problems),
        "max_new_tokens": sampling.max_new_tokens,
    }
    if args.kv_cache != UNQUANTISED:
        settings["kv_cache"] = args.kv_cache
    problems = problems[: args.limit]
    run_directory.check("asked", settings)
    benchmark.ready()
    layers = admit(args.unconfined) if benchmark.runs_code else ()
    if model is None:
        model = orthrus_jax.load(args.model, **cli.runtime_options(args))
    strategy = measured_strategy(args, model)
    runner = _runner(args, model, sampling, strategy).fitted(problems)
    loaded = _recorded(strategy, model) | {
        "weights": fingerprint(model.params),
        "dtype": model.config.dtype,
        "device": jax.devices()[0].device_kind,
    }
    run_directory.check("loaded", loaded)
    recipe = {
        "title": benchmark.title,
        "model": args.model,
        "problems": len(problems),
        "trained": model.trained or args.mode == "ar",
        "graded": benchmark.grade is not None,
        "sandbox": layers,
        "hardware": f"{loaded['device']}, {platform.machine()}, jax {jax.__version__}",
        "asked": settings,
        "loaded": loaded,
    }
    with run_directory.open(recipe) as answers:
        left = [problem for problem in problems if problem.id not in answers.done]
        with tqdm(total=len(problems), initial=len(answers.done), desc=benchmark.name) as bar:
            for count in answer_all(runner, left, benchmark, answers):
                bar.update(count)
    return report.finish(run_directory.directory)


def run(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Run a benchmark as its command; print its numbers."""
    args.out = args.out or f"runs/{benchmark.name}"
    directory = pathlib.Path(args.out)
    result = measure(benchmark, args)
    print(report.text({directory.name: result}))
    pages = " and ".join(str(directory / name) for name in (report.RESULTS, report.PAGE))
    print(f"\nwritten: {pages}")


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run the command of the benchmark of this name."""
    benchmark = BENCHMARKS[name]
    data = "the copy on the hub" if benchmark.hub else "none, it has to be given"
    parser = command_parser(name, benchmark.title, runs_code=benchmark.runs_code, data=data)
    run(benchmark, parser.parse_args(argv))


def command(name: str) -> None:
    """Run that command as a program."""
    run_command(lambda: main(name))
