"""Measure how this model decodes best on this device: `python -m eval.calibrate`, for `--rows`.

Three parts, all kept in calibration.json beside the model (engine/planner.py), where the other
commands find them; `--only` measures one of them.

  acceptance    The model answers the prompts once, greedily, one token per forward. The guesses of
                its drafting view along these answers are recorded, and every way to spend up to 256
                rows per forward is replayed (replay.py: the same cycles, token for token, that
                decoding takes). Acceptance on the same prompts is kept, not measured again.
  costs         The time of a forward at several numbers of rows and batches.
  draft-length  Tokens per second of the paper's cycle at each draft length, which all give the same
                text. The fastest becomes the default of every command on this kind of device.
"""

import argparse
import dataclasses
import functools
import hashlib
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eval import plots
from eval.arguments import check_contexts, check_output, positive, positive_list
from eval.replay import Recording, ReplayResult, record, simulate
from eval.speed import standing_at
from orthrus_jax import cli
from orthrus_jax.checkpoint import read_config
from orthrus_jax.decoding import CYCLES, Strategy
from orthrus_jax.decoding.sampling import greedy
from orthrus_jax.engine import Plan, Request, SamplingParams, bucket, planner
from orthrus_jax.engine.planner import Calibration, LengthRates, Measurement
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import read_prompts
from orthrus_jax.llm import LLM, load
from orthrus_jax.memory import check_memory, decoding_bytes, weight_bytes
from orthrus_jax.metrics import tokens_per_forward
from orthrus_jax.model import Model, ar_segment
from orthrus_jax.tokenizer import encode

PARTS = ("acceptance", "costs", "draft-length")
BUDGETS = (16, 32, 64, 96, 160, 256)
COUNTS = (1, 2, 4, 6, 10, 14, 20)  # of blocks
TEMPERATURES = (1.3, 1.0, 0.8, 0.65, 0.5)
LENGTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
LENGTH_PROMPTS = 16  # at most: each is decoded at every draft length, several times
FORWARDS = 8  # per timed call
SEED = 0  # of the intervals
INTERVAL_PROMPTS = 10  # a bootstrap over fewer shows too narrow an interval


def strategies(block: int, budgets: Sequence[int] = BUDGETS) -> list[Strategy]:
    """Ways to spend each budget: chains and trees, length blocks, outcome blocks, and both."""
    ahead = functools.partial(Strategy, "orthrus-1f", block)
    every = [Strategy("orthrus", block), Strategy("orthrus-2f", block)]
    every += [ahead(0, early) for early in COUNTS if early <= block]
    every += [ahead(0, 0, fresh) for fresh in COUNTS]
    for rows in budgets:
        if rows > block:
            every.append(Strategy("orthrus-2f", block, rows - 1))
        for early in COUNTS:
            for fresh in sorted({0, early // 4}):
                nodes = rows - 1 - block * (early + fresh)
                if nodes >= max(2, early - 1):
                    every.append(ahead(nodes, early, fresh))
    whole = [s if s.early_blocks is not None else replace(s, early_blocks=0) for s in every]
    return [s for s in dict.fromkeys(whole) if s.rows <= max(budgets)]


def measurement(strategy: Strategy, replayed: ReplayResult) -> Measurement:
    """Tokens per forward with a bootstrap interval over prompts."""
    rates = replayed.tokens / replayed.forwards
    draws = np.random.default_rng(SEED).integers(0, len(rates), (2000, len(rates)))
    low, high = np.quantile(rates[draws].mean(axis=1), (0.025, 0.975))
    return Measurement(
        strategy,
        tokens_per_forward=float(rates.mean()),
        interval=(float(low), float(high)),
        pooled=tokens_per_forward(int(replayed.tokens.sum()), int(replayed.forwards.sum())),
        accepted=replayed.accepted,
        hit_rate=replayed.hit_rate,
    )


def measure(
    recordings: Sequence[Recording], draft_temperature: float, budgets: Sequence[int] = BUDGETS
) -> list[Measurement]:
    """Replay every strategy along the recording of its block length."""
    jobs = [(r, s) for r in recordings for s in strategies(r.block_size, budgets)]
    bar = tqdm(jobs, desc="strategies", file=sys.stderr)
    at = lambda strategy: replace(strategy, draft_temperature=draft_temperature)
    return [measurement(strategy, simulate(r, at(strategy))) for r, strategy in bar]


def fit_draft_temperature(recording: Recording) -> float:
    """The temperature with which a tree and a few length blocks yield most tokens per forward."""
    block = recording.block_size
    rates = {}
    for temperature in tqdm(TEMPERATURES, desc="draft temperature", file=sys.stderr):
        replayed = simulate(
            recording,
            Strategy("orthrus-1f", block, 2 * block, 4, draft_temperature=temperature),
        )
        rates[temperature] = (replayed.tokens / replayed.forwards).mean()
    return max(TEMPERATURES, key=rates.__getitem__)


def time_rows(
    model: Model, weights: Any, batch: int, rows: int, context: int, repeats: int
) -> float:
    """Milliseconds of a forward of `rows` rows after `context` tokens, the median of `repeats`.

    The head reads at most as many rows as a verification of two blocks has.
    """
    slots = bucket(context + rows)

    def forward(weights: Any, state: Any) -> Any:
        tokens = jnp.tile(state.anchor[:, None], (1, rows))
        segment = ar_segment(tokens, state.position)
        (hidden,), cache = model.forward(weights, [segment], state.cache)
        logits = model.logits(weights, hidden[:, : 2 * model.config.block_size])
        return state.replace(cache=cache, anchor=greedy(logits).max(axis=1))

    loop = functools.partial(jax.lax.fori_loop, 0, FORWARDS)
    run = jax.jit(
        lambda weights, state: loop(lambda _, s: forward(weights, s), state), donate_argnums=1
    )
    state = standing_at(model, batch, context, slots)
    program = run.lower(weights, state).compile()
    times = []
    for turn in range(repeats + 1):  # the first is a warm-up
        begin = time.perf_counter()
        state = jax.block_until_ready(program(weights, state))
        if turn:
            times.append((time.perf_counter() - begin) / FORWARDS * 1e3)
    return statistics.median(times)


def time_costs(
    model: LLM, batches: Sequence[int], rows: Sequence[int], context: int, repeats: int
) -> dict[int, list[tuple[int, float]]]:
    """Milliseconds per forward by batch and rows."""
    inner, weights = model.engine.model, model.params
    jobs = [(b, n) for b in batches for n in rows]
    costs: dict[int, list[tuple[int, float]]] = {b: [] for b in batches}
    for batch, n in tqdm(jobs, desc="costs", file=sys.stderr):
        costs[batch].append((n, time_rows(inner, weights, batch, n, context, repeats)))
    return costs


def measure_draft_lengths(
    model: LLM, prompts: Sequence[Sequence[int]], repeats: int = 3, **options: Any
) -> LengthRates:
    """Tokens per second (median of `repeats`) by draft length, compilation excluded.

    The runs of all lengths take turns, so that a slow spell of the machine hits them alike.

    Args:
      model: trained K is the longest length tried.
      prompts: of ids.
      repeats: runs per length, after a warm-up.
      options: of LLM.complete.
    """
    lengths = sorted(
        {k for k in LENGTHS if k < model.config.block_size} | {model.config.block_size}
    )
    rates: dict[int, list[float]] = {k: [] for k in lengths}
    with tqdm(total=len(lengths) * (repeats + 1), desc="draft length", file=sys.stderr) as bar:
        for turn in range(repeats + 1):
            for k in lengths:
                begin = time.perf_counter()
                answers = model.complete(prompts, strategy=Strategy(draft_length=k), **options)
                seconds = time.perf_counter() - begin
                if turn:  # the first compiles and warms up
                    rates[k].append(sum(len(a.tokens) for a in answers) / seconds)
                bar.update()
    medians = {k: round(statistics.median(of_length), 3) for k, of_length in rates.items()}
    return LengthRates(max(medians, key=medians.__getitem__), medians)


def add_draft_length(known: Calibration | None, rates: LengthRates) -> Calibration:
    """The calibration with this device's rates in place of older ones."""
    known = Calibration() if known is None else known
    by_device = known.draft_length | {jax.devices()[0].device_kind: rates}
    return replace(known, draft_length=by_device)


def table(calibration: Calibration, budgets: Sequence[int], block_size: int) -> str:
    """The best strategy per budget, the planner's choice by batch, and rates by draft length."""
    parts = [
        *([_strategy_lines(calibration, budgets, block_size)] if calibration.measurements else []),
        *(_cost_lines(calibration, kind, max(budgets), block_size) for kind in calibration.cost),
        *(_length_lines(kind, rates) for kind, rates in calibration.draft_length.items()),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _about(calibration: Calibration) -> str:
    """How acceptance was measured, for people."""
    about = calibration.about
    counts = [
        f"{about[name]} {what}"
        for name, what in {"prompts": "prompts", "max_new_tokens": "new tokens at most"}.items()
        if name in about
    ]
    return ", ".join(counts) or "their number is unknown"


def _strategy_lines(calibration: Calibration, budgets: Sequence[int], block_size: int) -> list[str]:
    many = calibration.about.get("prompts", 0) >= INTERVAL_PROMPTS
    paper = next(
        e
        for e in calibration.measurements
        if e.strategy == Strategy("orthrus", block_size, early_blocks=0)
    ).tokens_per_forward
    lines = [
        f"acceptance: {_about(calibration)}{'' if many else ': too few prompts for an interval'}; "
        f"draft temperature {calibration.draft_temperature:g}",
        "",
        "| rows | cycle | K | tree | early | fresh | accepted | hits | tokens per forward | pooled "
        "| over the paper's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    best: list[Measurement] = []
    for method in CYCLES.values():
        of_cycle = [e for e in calibration.measurements if e.strategy.method == method]
        for rows in budgets:
            if fitting := [e for e in of_cycle if e.strategy.rows <= rows]:
                best.append(max(fitting, key=lambda e: e.tokens_per_forward))
    for e in dict.fromkeys(best):
        s = e.strategy
        spread = f" ± {(e.interval[1] - e.interval[0]) / 2:.2f}" if many else ""
        lines.append(
            f"| {s.rows} | {s.flags()['cycle']} | {s.draft_length} | {s.tree_nodes or 'chain'} "
            f"| {s.early_blocks} | {s.fresh_blocks} | {e.accepted:.2f} | {e.hit_rate:.2f} "
            f"| {e.tokens_per_forward:.2f}{spread} | {e.pooled:.2f} "
            f"| {e.tokens_per_forward / paper:.2f} |"
        )
    return lines


def _cost_lines(calibration: Calibration, kind: str, rows: int, block_size: int) -> list[str]:
    lines = [f"{kind}, milliseconds per forward by rows:"]
    for batch, points in calibration.cost[kind].items():
        lines.append(f"batch {batch}: " + ", ".join(f"{n}: {ms:.2f}" for n, ms in points))
        if calibration.measurements:
            choice = planner.choose(calibration, rows, batch, block_size, kind)
            options = choice.strategy.given()
            flags = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in options.items())
            lines.append(f"  {flags}: {choice.why}")
    return lines


def _length_lines(kind: str, rates: LengthRates) -> list[str]:
    return [f"{kind}, the paper's cycle by draft length:"] + [
        f"draft length {k:3d}  {rate:10.1f} tokens/s{'  <- best' * (k == rates.draft_length)}"
        for k, rate in rates.tokens_per_second.items()
    ]


def draw(calibration: Calibration, path: str) -> None:
    """Plot tokens per forward and milliseconds per forward by rows."""
    with plots.figure(path, 2, (11, 4)) as (left, right):
        for cycle, style in {"paper": "x", "two-forward": "s", "one-forward": "o"}.items():
            method = CYCLES[cycle]
            of_cycle = [e for e in calibration.measurements if e.strategy.method == method]
            counts = [e.strategy.rows for e in of_cycle]
            left.plot(
                counts, [e.tokens_per_forward for e in of_cycle], style, label=cycle, alpha=0.6
            )
        left.set(xlabel="rows per forward", ylabel="tokens per forward", ylim=(0, None))
        left.legend()
        for kind, curves in calibration.cost.items():
            for batch, points in curves.items():
                rows, ms = zip(*points, strict=True)
                right.plot(rows, ms, "o-", label=f"{kind}, batch {batch}")
        right.set(xlabel="rows per forward", ylabel="milliseconds", ylim=(0, None))
        if calibration.cost:
            right.legend()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    check_output("--plot", args.plot, picture=True)
    directory = pathlib.Path(args.model)
    if not directory.is_dir():
        raise UserError(f"--model {args.model} is no directory: {planner.FILE} is written into it")
    planner.check_writable(directory)
    parts = PARTS if args.only is None else (args.only,)
    if args.prompts is None and parts != ("costs",):
        raise UserError("--prompts FILE.jsonl is needed, except with --only costs")
    texts = read_prompts(args.prompts)[: args.limit] if args.prompts else []
    about = {"prompts": len(texts), "max_new_tokens": args.max_new_tokens}
    about["digest"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    calibration = planner.load(directory) or Calibration()
    measured_before = bool(calibration.measurements)
    if "acceptance" in parts and measured_before and calibration.about != about:
        if not args.overwrite:
            raise UserError(
                f"{directory / planner.FILE} holds acceptance on other prompts "
                f"({_about(calibration)}): --overwrite to measure it again"
            )
        measured_before = False
    _check_costs(args, parts)
    model = load(args.model, **cli.runtime_options(args))
    if "acceptance" in parts and not model.trained:
        raise UserError(
            f"--model {args.model}: its diffusion view is untrained: there is no acceptance to "
            "measure"
        )
    ids = [encode(model.tokenizer, text, chat=True) for text in texts]
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    plan = Plan(Strategy(), batch_size=args.batch_size or 1)
    model.engine.check([Request(prompt, sampling) for prompt in ids], plan)
    if "acceptance" in parts and not measured_before:
        measured, temperature = _measure_acceptance(model, ids, args)
        calibration = replace(
            calibration, measurements=measured, draft_temperature=temperature, about=about
        )
        calibration.save(directory)
    if "costs" in parts:
        rows = sorted({1, model.config.block_size, *BUDGETS})
        repeats = args.repeats or 5
        curves = time_costs(model, args.batches, rows, args.context, repeats)
        by_device = calibration.cost | {jax.devices()[0].device_kind: curves}
        calibration = replace(calibration, cost=by_device)
        calibration.save(directory)
    if "draft-length" in parts:
        rates = measure_draft_lengths(
            model,
            ids[:LENGTH_PROMPTS],
            args.repeats or 3,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size or 1,
        )
        calibration = add_draft_length(calibration, rates)
        calibration.save(directory)
    print(table(calibration, BUDGETS, model.config.block_size))
    if args.plot:
        draw(calibration, args.plot)
    print(f"kept in {directory / planner.FILE}", file=sys.stderr)


def _check_costs(args: argparse.Namespace, parts: Sequence[str]) -> None:
    """Refuse a --context beyond the model's positions or the memory, before the model is loaded."""
    config = read_config(args.model).config
    if "costs" not in parts:
        return
    check_contexts("--context", [args.context], config)
    rows, most = max(BUDGETS), max(args.batches)
    model = Model(dataclasses.replace(config, dtype=args.dtype or config.dtype))
    check_memory(
        weight_bytes(model.config) + decoding_bytes(model, most, bucket(args.context + rows), rows),
        f"--batches {most} with --context {args.context}",
        "lower one of them",
    )


def _measure_acceptance(
    model: LLM, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> tuple[tuple[Measurement, ...], float]:
    """Answer the prompts, record the guesses, replay every strategy; and the draft temperature."""
    completions = model.complete(
        prompts, strategy="ar", max_new_tokens=args.max_new_tokens, batch_size=args.batch_size or 8,
        progress=True,
    )  # fmt: skip
    answers = [completion.tokens for completion in completions]
    size = model.config.block_size
    blocks = [size, *([size // 2] if size > 16 else [])]  # a long block's end is seldom reached
    bar = tqdm(blocks, desc="record", file=sys.stderr)
    recordings = [record(model, prompts, answers, block) for block in bar]
    temperature = fit_draft_temperature(recordings[0])
    return tuple(measure(recordings, temperature)), temperature


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a checkpoint's directory")
    add("--prompts", metavar="FILE.jsonl", help='one {"prompt": TEXT} per line')
    add("--only", choices=PARTS, help="measure one part, keep the others; default: all three")
    add("--limit", type=positive, default=64, metavar="N", help="prompts used, at most "
        f"{LENGTH_PROMPTS} of them for draft-length; default: %(default)s")  # fmt: skip
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="default: %(default)s")
    add("--batch-size", type=positive, metavar="N", help="prompts decoded together; default: 8 for "
        "acceptance, 1 for draft-length")  # fmt: skip
    add("--batches", type=positive_list, default=[1, 4, 16], help="of costs; default: 1,4,16")
    add("--context", type=positive, default=256, metavar="N", help="tokens in the cache for costs; "
        "default: %(default)s")  # fmt: skip
    add("--repeats", type=positive, metavar="N", help="of each timing; default: 5 for costs, 3 for "
        "draft-length")  # fmt: skip
    add("--overwrite", action="store_true", help="replace acceptance on other prompts")
    add("--plot", metavar="OUT.png", help="draw tokens and milliseconds per forward by rows")
    cli.add_runtime(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
