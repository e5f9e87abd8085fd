"""Run a benchmark: decode, grade, keep every answer, survive being killed. `eval.math500` and such.

Problems go in chunks, each first through AR and then through Orthrus, so that a slow spell of the
machine hits both. A chunk's lines are appended to OUT/answers.jsonl once it is graded; `--resume`
does what is not there yet. What is asked is benchmarks.py; what it comes to is report.py.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import orthrus_jax
from eval import metrics, report
from eval.benchmarks import BENCHMARKS, Benchmark, Problem, digest, final_part, load
from eval.grading import Grade
from orthrus_jax import cli
from orthrus_jax.cli import add_cycle, add_rows, spend_rows
from orthrus_jax.decoding.sampling import Rule
from orthrus_jax.engine import BLOCKS, Completion, Plan, Request, SamplingParams
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.llm import LLM
from orthrus_jax.model import Params
from orthrus_jax.tokenizer import encode_messages

MODEL = "Qwen/Qwen3-4B"
NEW_TOKENS, THINKING_TOKENS = 2048, 32_768  # the paper's budget; the model cards' for thinking
Served = Generator[tuple[int, Completion], None, None]  # places and answers, as they finish
ROUNDS = 4  # batches in a chunk: what a killed run loses, against how often a batch runs empty
GRADERS = 16  # programs run at once, at most
# What --resume must find as it was; `batch_size` too, for it decides what is timed.
ASKED = (
    *("model", "mode", "limit", "batch_size", "thinking"),
    *("temperature", "top_p", "top_k", "seed", "n", "accept", "rows"),
)
CYCLE = ("cycle", *BLOCKS)  # as told, or as --rows has it


@dataclasses.dataclass
class Dialogue:
    """One sample of a problem in one loop: what was said so far, and its answers as recorded."""

    problem: Problem
    sample: int
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    prompt: list[int] = dataclasses.field(default_factory=list)
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Loops:
    """A model and how it is to decode: problems in, answers and seconds out.

    `plan` is that of all loops; each of `names` is its mode in turn.
    """

    model: LLM
    sampling: SamplingParams
    names: Sequence[str]
    plan: Plan
    thinking: bool

    def answer(self, problems: Sequence[Problem], loop: str) -> tuple[list[Dialogue], float]:
        """Every sample of every problem, turn by turn; and the wall-clock seconds of decoding."""
        every = [Dialogue(p, sample) for p in problems for sample in range(self.sampling.n)]
        seconds = 0.0
        for turn in range(max(len(p.turns) for p in problems)):
            going = [d for d in every if turn < len(d.problem.turns) and self._ask(d, turn, loop)]
            found, took = self._decode(going, loop) if going else ([], 0.0)
            seconds += took
            for dialogue, answer in zip(going, found, strict=True):
                dialogue.messages.append({"role": "assistant", "content": answer.text})
                dialogue.answers.append(_record(dialogue, turn, loop, answer))
        return every, seconds

    def warm(self, problems: Sequence[Problem]) -> None:
        """Run each loop until its first answer, so that what a first run costs is paid."""
        for loop in self.names:
            every = [Dialogue(p, sample) for p in problems for sample in range(self.sampling.n)]
            if going := [d for d in every if self._ask(d, 0, loop)]:
                with contextlib.closing(self._serve(going, loop)) as answers:
                    next(answers)

    def fitted(self, problems: Sequence[Problem]) -> "Loops":
        """These loops with a cache for the longest of all dialogues: every chunk's shape is one."""
        new = self.sampling.max_new_tokens
        longest = 0
        for problem in problems:
            said = [{"role": "user", "content": turn} for turn in problem.turns]
            ids = encode_messages(self.model.tokenizer, said, thinking=self.thinking)
            longest = max(longest, len(ids) + (len(said) - 1) * new)
        longest = min(longest, self.model.config.max_position_embeddings - new)
        slots = self.model.engine.slots(longest, new, self.plan)
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, slots=slots))

    def _ask(self, dialogue: Dialogue, turn: int, loop: str) -> bool:
        """Say the next turn; False where the prompt, or the one before, does not fit the model."""
        if any("skipped" in answer for answer in dialogue.answers):
            return False
        dialogue.messages.append({"role": "user", "content": dialogue.problem.turns[turn]})
        dialogue.prompt = encode_messages(
            self.model.tokenizer, dialogue.messages, thinking=self.thinking
        )
        room = self.model.config.max_position_embeddings - self.sampling.max_new_tokens
        if len(dialogue.prompt) <= room:
            return True
        why = f"{len(dialogue.prompt)} prompt tokens; there is room for {room}"
        dialogue.answers.append(
            {"loop": loop, "sample": dialogue.sample, "turn": turn, "skipped": why}
        )
        return False

    def _serve(self, dialogues: Sequence[Dialogue], loop: str) -> Served:
        requests = [Request(d.prompt, self.sampling, d.sample) for d in dialogues]
        for event in self.model.engine.serve(requests, self.of(loop)):
            if event.completion is not None:
                yield event.index, event.completion

    def of(self, loop: str) -> Plan:
        """The plan of one loop."""
        return dataclasses.replace(self.plan, mode=loop)

    def _decode(self, dialogues: Sequence[Dialogue], loop: str) -> tuple[list[Completion], float]:
        """Answers in the dialogues' order, and seconds without those the engine compiled in."""
        engine = self.model.engine
        compiled, begin = engine.compile_seconds, time.perf_counter()
        answers = dict(self._serve(dialogues, loop))
        seconds = time.perf_counter() - begin - (engine.compile_seconds - compiled)
        return [answers[i] for i in range(len(dialogues))], seconds


def _record(d: Dialogue, turn: int, loop: str, answer: Completion) -> dict[str, Any]:
    """An answer as a line of answers.jsonl holds it."""
    orthrus = loop == "orthrus"
    return {
        "loop": loop,
        "sample": d.sample,
        "turn": turn,
        "text": answer.text,
        "prompt_tokens": len(d.prompt),
        "tokens": len(answer.tokens),
        "digest": _checksum(np.array(answer.tokens, "<i4")),
        "finish_reason": answer.finish_reason,
        "cycles": answer.cycles,
        "accepted": answer.accepted if orthrus else [],
        "forwards": answer.forwards,
        "seconds": answer.seconds,
        "first_seconds": answer.time_to_first_token,
    }


def _checksum(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def mark(benchmark: Benchmark, pool: Executor, dialogues: Sequence[Dialogue]) -> None:
    """Put the verdict on the last answer of each dialogue; equal answers are judged once."""
    if benchmark.grade is None:
        return
    judged: dict[tuple[str, str], Future[Grade]] = {}
    waiting = []
    for dialogue in dialogues:
        answer = dialogue.answers[-1]
        if "skipped" in answer:
            answer |= {"correct": False, "note": "skipped"}
            continue
        key = (dialogue.problem.id, final_part(answer["text"]))
        if key not in judged:
            judged[key] = pool.submit(benchmark.grade, dialogue.problem, key[1])
        waiting.append((answer, judged[key]))
    for answer, verdict in waiting:
        found = verdict.result()
        answer |= {"correct": found.correct, "answer": found.answer, "note": found.note}


class Run:
    """An --out directory: its recipe, and the answers it holds so far."""

    def __init__(self, directory: pathlib.Path, *, resume: bool) -> None:
        """Look at the directory, change nothing.

        Raises:
          UserError: for one that exists and is not to be resumed, or is something else.
        """
        self.directory = directory
        self.recipe: dict[str, Any] = {}
        if not directory.exists():
            return
        if not resume:
            raise UserError(
                f"--out {directory} exists: give another one, or --resume to go on with that run"
            )
        begun = any(path.suffix != ".part" for path in directory.iterdir())
        if begun:  # else killed before it could say what it was
            self.recipe = metrics.read_run(directory)[0]

    def check(self, part: str, recipe: dict[str, Any]) -> None:
        """Refuse a recipe that is not the one the run was begun with, naming what differs."""
        for name, now in recipe.items() if self.recipe else ():
            before = self.recipe[part].get(name)
            if before != now:
                raise UserError(
                    f"--resume {self.directory}: {name} was {before} and is now {now}; "
                    "resume with what the run was begun with, or give another --out"
                )

    @contextlib.contextmanager
    def open(self, recipe: dict[str, Any]) -> Iterator[tuple[BinaryIO, set[str]]]:
        """Give answers.jsonl, open for this process alone, and the ids that are in it."""
        if not self.recipe:
            report.write(self.directory / metrics.RECIPE, json.dumps(recipe, indent=2) + "\n")
        path = self.directory / metrics.ANSWERS
        with path.open("ab") as file:
            _lock(file, path)
            rows, size = metrics.read_answers(path)
            file.truncate(size)  # the torn end of a killed run
            yield file, {row["id"] for row in rows}


def _lock(file: BinaryIO, path: pathlib.Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with contextlib.suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another process") from None


def _line(problem: Problem, dialogues: Sequence[Dialogue], seconds: dict[str, float]) -> bytes:
    row = {
        "id": problem.id,
        "groups": dict(problem.groups),
        "turns": problem.turns,
        "gold": problem.gold,
        "seconds": seconds,
        "answers": [answer for d in dialogues for answer in d.answers],
    }
    return json.dumps(row).encode() + b"\n"


def answer_all(
    loops: Loops, problems: Sequence[Problem], benchmark: Benchmark, file: BinaryIO
) -> Iterator[int]:
    """Answer and grade the problems chunk by chunk; append their lines; yield how many were done.

    The seconds of a chunk are shared out evenly over its problems: their sum is the run's
    wall-clock, whichever of the lines a killed process got to write.
    """
    with ThreadPoolExecutor(min(GRADERS, os.cpu_count() or 1)) as pool:
        size = max(1, ROUNDS * loops.plan.batch_size // loops.sampling.n)
        for begin in range(0, len(problems), size):
            chunk = problems[begin : begin + size]
            if not begin:
                loops.warm(chunk)
            every: list[Dialogue] = []
            seconds: dict[str, float] = {}
            for loop in loops.names:
                dialogues, took = loops.answer(chunk, loop)
                every += dialogues
                seconds[loop] = took / len(chunk)
            mark(benchmark, pool, every)
            lines = [_line(p, [d for d in every if d.problem is p], seconds) for p in chunk]
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
            yield len(chunk)


def fingerprint(params: Params) -> str:
    """A checksum of all weights' bits, summed on the device: the same on every one."""
    sums = jax.device_get([_sum_of_bits(leaf) for leaf in jax.tree.leaves(params)])
    return _checksum(np.array(sums, "<u4"))


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).sum(dtype=jnp.uint32)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def command_parser(
    name: str,
    title: str,
    *,
    runs_code: bool = False,
    model: str = MODEL,
    data: str = "the copy on the hub",
    new_tokens: int | None = None,
) -> argparse.ArgumentParser:
    """The options that all benchmarks share; a benchmark may have a model and budget of its own."""
    default = SamplingParams()
    budget = new_tokens or f"{NEW_TOKENS}, {THINKING_TOKENS} with --thinking"
    parser = argparse.ArgumentParser(
        prog=f"python -m eval.{name}",
        description=f"Run {title}: accuracy where it is graded, acceptance and speed.",
    )
    add = parser.add_argument
    add("--model", default=model, metavar="DIR_OR_ID", help="default: %(default)s")
    add("--data", metavar="FILE", help=f"JSONL, may end in .gz; default: {data}")
    add("--mode", choices=("orthrus", "ar", "both"), default="both", help="default: both")
    add("--limit", type=_positive, metavar="N", help="the first N problems only")
    add("--batch-size", type=_positive, default=1, metavar="N", help="default: %(default)s")
    add("--max-new-tokens", type=_positive, default=new_tokens, metavar="N",
        help=f"default: {budget}")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy")
    add("--top-p", type=float, default=default.top_p, metavar="X", help="default: 1, off")
    add("--top-k", type=int, default=default.top_k, metavar="N", help="default: 0, off")
    add("--seed", type=int, default=default.seed, metavar="N", help="default: %(default)s")
    add("--n", type=_positive, default=1, metavar="N", help="samples a problem: mean@N, pass@k")
    rules = [rule.value for rule in Rule]
    add("--accept", choices=rules, default=rules[0], help="of sampled drafts; default: %(default)s")
    add("--draft-length", type=_positive, metavar="K", help="default: tuned here, or the trained K")
    add_cycle(parser)
    add_rows(parser)
    add("--thinking", action="store_true", help="let the model think first; the model cards ask "
        "for --temperature 0.6 --top-p 0.95 --top-k 20 then")  # fmt: skip
    cli.add_runtime(parser)
    add("--out", metavar="DIR", help="default: runs/NAME of the benchmark; must not exist")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    if runs_code:
        add("--allow-code-execution", action="store_true", help="run the programs that the model "
            "writes, limited as eval/sandbox.py says; it is no security boundary")  # fmt: skip
    return parser


def _sampling(args: argparse.Namespace) -> SamplingParams:
    budget = args.max_new_tokens or (THINKING_TOKENS if args.thinking else NEW_TOKENS)
    names = ("temperature", "top_p", "top_k", "seed", "n")
    return SamplingParams(**{name: getattr(args, name) for name in names}, max_new_tokens=budget)


def _loops(args: argparse.Namespace, model: LLM, sampling: SamplingParams) -> Loops:
    """The loops asked for, checked against the model."""
    names = metrics.LOOPS if args.mode == "both" else (args.mode,)
    plan = Plan(
        accept=Rule(args.accept),
        draft_length=args.draft_length or model.draft_length or model.config.block_size,
        cycle=args.cycle,
        **{name: getattr(args, name) for name in BLOCKS},
        batch_size=args.batch_size,
        time_to_first_token=True,
    )
    loops = Loops(model, sampling, names, plan, args.thinking)
    for name in names:
        model.engine.check([Request([0], sampling)], loops.of(name))
    if args.mode != "ar" and not model.trained:
        print(
            "note: this model's diffusion view is untrained: its answers are exact, its acceptance "
            "and speed say nothing of the method",
            file=sys.stderr,
        )
    return loops


def run(benchmark: Benchmark, args: argparse.Namespace) -> dict[str, Any]:
    """Run a benchmark as its command was told; print and return its numbers.

    Raises:
      UserError: for what cannot be done, before anything is decoded or written.
    """
    if benchmark.runs_code and not args.allow_code_execution:
        raise UserError(
            f"{benchmark.title} is graded by running what the model writes: "
            "give --allow-code-execution to allow that"
        )
    sampling = _sampling(args)
    found = Run(pathlib.Path(args.out or f"runs/{benchmark.name}"), resume=args.resume)
    problems = load(benchmark, args.data)
    asked = {name: getattr(args, name) for name in ASKED} | {
        "benchmark": benchmark.name,
        "data": digest(problems),
        "max_new_tokens": sampling.max_new_tokens,
    }
    problems = problems[: args.limit]
    found.check("asked", asked)
    benchmark.ready()
    model = orthrus_jax.load(args.model, **cli.runtime_options(args))
    spend_rows(args, model, args.batch_size)
    loops = _loops(args, model, sampling).fitted(problems)
    loaded = {name: getattr(args, name) for name in CYCLE} | {
        "weights": fingerprint(model.params),
        "dtype": model.config.dtype,
        "draft_length": loops.plan.draft_length,
        "device": jax.devices()[0].device_kind,
    }
    found.check("loaded", loaded)
    recipe = {
        "title": benchmark.title,
        "model": args.model,
        "problems": len(problems),
        "trained": model.trained or args.mode == "ar",
        "graded": benchmark.grade is not None,
        "hardware": f"{loaded['device']}, {platform.machine()}, jax {jax.__version__}",
        "asked": asked,
        "loaded": loaded,
    }
    with found.open(recipe) as (file, done):
        left = [problem for problem in problems if problem.id not in done]
        with tqdm(total=len(problems), initial=len(done), desc=benchmark.name) as bar:
            for count in answer_all(loops, left, benchmark, file):
                bar.update(count)
    result = report.finish(found.directory)
    print(report.text({found.directory.name: result}))
    pages = " and ".join(str(found.directory / name) for name in (report.RESULTS, report.PAGE))
    print(f"\nwritten: {pages}")
    return result


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run the command of the benchmark of this name."""
    benchmark = BENCHMARKS[name]
    data = "the copy on the hub" if benchmark.hub else "none, it has to be given"
    parser = command_parser(name, benchmark.title, runs_code=benchmark.runs_code, data=data)
    run(benchmark, parser.parse_args(argv))


def command(name: str) -> None:
    """Run that command as a program."""
    run_command(lambda: main(name))
