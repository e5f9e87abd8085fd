"""Measure what rows earn and what they cost: `python -m eval.calibrate`, for `--rows`.

The model answers the prompts once, greedily, one token a forward. What its drafting view guesses
along these answers is recorded, and every way to spend up to 256 rows a forward is played through
(eval/recorded.py: the same cycles, token for token, that decoding takes). Then a forward is timed
at several numbers of rows and batches. Both go into calibration.json beside the model, where
`--rows` of the other commands finds them. Acceptance is kept when only costs are measured anew, as
on another device.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eval.recorded import Outcome, Recording, record, simulate
from eval.speed import numbers, standing_at
from orthrus_jax import cli
from orthrus_jax.cli import read_prompts
from orthrus_jax.decoding.overlapped import Scheme
from orthrus_jax.decoding.sampling import greedy
from orthrus_jax.engine import bucket, planner
from orthrus_jax.engine.planner import Calibration, Earned, Split
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.llm import LLM, load
from orthrus_jax.model import Model, ar_segment
from orthrus_jax.tokenizer import encode

BUDGETS = (16, 32, 64, 96, 160, 256)
COUNTS = (1, 2, 4, 6, 10, 14, 20)  # of blocks
TRUSTS = (1.0, 0.8, 0.65, 0.5)
FORWARDS = 8  # of one timed call
SEED = 0  # of the intervals


def splits(block: int, budgets: Sequence[int] = BUDGETS) -> list[Split]:
    """Ways to spend each budget: chains and trees, early blocks, fresh ones, and both."""
    found = [Split("paper", block), Split("two-forward", block)]
    found += [Split("one-forward", block, 0, e) for e in COUNTS if e <= block]
    found += [Split("one-forward", block, 0, 0, n) for n in COUNTS]
    for rows in budgets:
        if rows > block:
            found.append(Split("two-forward", block, rows - 1))
        for early in COUNTS:
            for fresh in sorted({0, early // 4}):
                nodes = rows - 1 - block * (early + fresh)
                if nodes >= max(2, early - 1):
                    found.append(Split("one-forward", block, nodes, early, fresh))
    return [s for s in dict.fromkeys(found) if s.rows <= max(budgets)]


def earned(split: Split, outcome: Outcome) -> Earned:
    """Tokens a forward with a bootstrap interval over prompts."""
    each = outcome.tokens / outcome.forwards
    draws = np.random.default_rng(SEED).integers(0, len(each), (2000, len(each)))
    low, high = np.quantile(each[draws].mean(axis=1), (0.025, 0.975))
    return Earned(
        split,
        tokens_per_forward=float(each.mean()),
        interval=(float(low), float(high)),
        pooled=float(outcome.tokens.sum() / outcome.forwards.sum()),
        accepted=outcome.accepted,
        hits=outcome.hits,
    )


def play(
    recordings: Sequence[Recording], trust: float, budgets: Sequence[int] = BUDGETS
) -> list[Earned]:
    """Every split along every recording, one of each block length."""
    jobs = [(r, s) for r in recordings for s in splits(r.block_size, budgets)]
    bar = tqdm(jobs, desc="splits", file=sys.stderr)
    scheme = lambda split: dataclasses.replace(split.scheme, trust=trust)
    return [earned(split, simulate(r, split.cycle, scheme(split))) for r, split in bar]


def trusted(recording: Recording) -> float:
    """The trust with which a tree and a few early blocks earn most."""
    block = recording.block_size
    found = {}
    for trust in tqdm(TRUSTS, desc="trust", file=sys.stderr):
        outcome = simulate(
            recording, "one-forward", Scheme(block, nodes=2 * block, early=4, trust=trust)
        )
        found[trust] = (outcome.tokens / outcome.forwards).mean()
    return max(TRUSTS, key=found.__getitem__)


def time_rows(
    model: Model, weights: Any, batch: int, rows: int, context: int, repeats: int
) -> float:
    """Milliseconds of a forward of `rows` rows behind `context` tokens, the median of `repeats`.

    The head reads as many rows as a verification of two blocks would have, at most.
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
    found = []
    for turn in range(repeats + 1):  # the first warms
        begin = time.perf_counter()
        state = jax.block_until_ready(program(weights, state))
        if turn:
            found.append((time.perf_counter() - begin) / FORWARDS * 1e3)
    return statistics.median(found)


def time_costs(
    model: LLM, batches: Sequence[int], rows: Sequence[int], context: int, repeats: int
) -> dict[int, list[tuple[int, float]]]:
    """Milliseconds a forward by batch and rows."""
    inner, weights = model.engine.model, model.params
    jobs = [(b, n) for b in batches for n in rows]
    costs: dict[int, list[tuple[int, float]]] = {b: [] for b in batches}
    for batch, n in tqdm(jobs, desc="costs", file=sys.stderr):
        costs[batch].append((n, time_rows(inner, weights, batch, n, context, repeats)))
    return costs


def table(found: Calibration, budgets: Sequence[int], block_size: int) -> str:
    """The best split of each budget by tokens a forward, and the planner's choice by batch."""
    paper = next(
        e for e in found.earned if e.split == Split("paper", block_size)
    ).tokens_per_forward
    lines = [
        f"trust {found.trust:g}",
        "",
        "| rows | cycle | K | tree | early | fresh | accepted | hits | tokens a forward | pooled "
        "| over the paper's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    best: list[Earned] = []
    for cycle in ("paper", "two-forward", "one-forward"):
        for rows in budgets:
            fitting = [e for e in found.earned if e.split.cycle == cycle and e.split.rows <= rows]
            if fitting:
                best.append(max(fitting, key=lambda e: e.tokens_per_forward))
    for e in dict.fromkeys(best):
        s, half = e.split, (e.interval[1] - e.interval[0]) / 2
        lines.append(
            f"| {s.rows} | {s.cycle} | {s.draft_length} | {s.tree_nodes or 'chain'} "
            f"| {s.early_blocks} | {s.fresh_blocks} | {e.accepted:.2f} | {e.hits:.2f} "
            f"| {e.tokens_per_forward:.2f} ± {half:.2f} | {e.pooled:.2f} "
            f"| {e.tokens_per_forward / paper:.2f} |"
        )
    for kind, curves in found.cost.items():
        lines += ["", f"{kind}, milliseconds a forward by rows:"]
        for batch, points in curves.items():
            lines.append(f"batch {batch}: " + ", ".join(f"{n}: {ms:.2f}" for n, ms in points))
            chosen = planner.choose(found, max(budgets), batch, block_size, kind)
            lines.append(f"  {chosen.split.options}: {chosen.why}")
    return "\n".join(lines)


def draw(found: Calibration, path: str) -> None:
    """Plot what rows earn beside what they cost."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for cycle, style in {"paper": "x", "two-forward": "s", "one-forward": "o"}.items():
        points = [
            (e.split.rows, e.tokens_per_forward) for e in found.earned if e.split.cycle == cycle
        ]
        left.plot(*zip(*points, strict=True), style, label=cycle, alpha=0.6)
    left.set(xlabel="rows a forward", ylabel="tokens a forward", ylim=(0, None))
    left.legend()
    for kind, curves in found.cost.items():
        for batch, points in curves.items():
            rows, ms = zip(*points, strict=True)
            right.plot(rows, ms, "o-", label=f"{kind}, batch {batch}")
    right.set(xlabel="rows a forward", ylabel="milliseconds", ylim=(0, None))
    if found.cost:
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args(argv)
    directory = pathlib.Path(args.model)
    if not directory.is_dir():
        raise UserError(f"--model {args.model} is no directory: {planner.FILE} is written into it")
    known = planner.load(directory)
    texts = read_prompts(args.prompts)[: args.limit]
    asked = {"prompts": len(texts), "max_new_tokens": args.max_new_tokens}
    asked["digest"] = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    if known is not None and known.about != asked and not args.overwrite:
        raise UserError(
            f"{directory / planner.FILE} holds acceptance on other prompts ({known.about}): "
            "--overwrite to measure it anew"
        )
    model = load(args.model, **cli.runtime_options(args))
    if not model.trained:
        raise UserError(f"--model {args.model}: its diffusion view is untrained, it earns nothing")
    kept, trust = None, 1.0
    if known is not None and known.about == asked:
        kept, trust = known.earned, known.trust
    if kept is None:
        ids = [encode(model.tokenizer, text, chat=True) for text in texts]
        answers = model.complete(
            ids, mode="ar", max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
            progress=True,
        )  # fmt: skip
        said = [answer.tokens for answer in answers]
        size = model.config.block_size
        blocks = [size, *([size // 2] if size > 16 else [])]  # a long block's end is seldom reached
        bar = tqdm(blocks, desc="record", file=sys.stderr)
        recordings = [record(model, ids, said, block) for block in bar]
        trust = trusted(recordings[0])
        kept = tuple(play(recordings, trust))
    rows = sorted({1, model.config.block_size, *BUDGETS})
    cost = dict(known.cost) if known is not None else {}
    kind = jax.devices()[0].device_kind
    cost[kind] = time_costs(model, args.batches, rows, args.context, args.repeats)
    found = Calibration(kept, cost, asked, trust)
    path = found.save(directory)
    print(table(found, BUDGETS, model.config.block_size))
    if args.plot:
        draw(found, args.plot)
    print(f"kept in {path}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.calibrate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a trained checkpoint's directory")
    add("--prompts", required=True, metavar="FILE.jsonl", help='one {"prompt": TEXT} a line')
    add("--limit", type=int, default=64, metavar="N", help="prompts used; default: %(default)s")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--batch-size", type=int, default=8, metavar="N", help="of answering; default: %(default)s")
    add("--batches", type=numbers, default=[1, 4, 16], help="timed; default: 1,4,16")
    add("--context", type=int, default=256, metavar="N", help="timed behind; default: %(default)s")
    add("--repeats", type=int, default=5, metavar="N", help="of each timing; default: %(default)s")
    add("--overwrite", action="store_true", help="forget acceptance on other prompts")
    add("--plot", metavar="OUT.png", help="draw tokens and cost by rows")
    cli.add_runtime(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
