"""Tokens per second at concurrency: `python -m eval.speed --throughput --batch-sizes 1,4,16,64`.

Every request reads the same number of tokens and writes the same number, whatever it says: the
model's end tokens end nothing, so that no strategy looks fast because its answers are short. Twice
as many requests as rows, and a finished row goes to the next. Strategies run in turn; all programs
are compiled, and what `auto` learns is learned, in one round before the clocks start.
"""

import collections
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Auto, Completion, Request, SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import params

ROUNDS = 2  # requests per row
SEED = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: every batch size at every length of the prompts.

    Attributes:
      batches: requests decoded together.
      inputs: tokens of each prompt.
      outputs: tokens of each answer.
      repeats: timed rounds.
    """

    batches: Sequence[int]
    inputs: Sequence[int]
    outputs: int
    repeats: int


def measure(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    strategies: Mapping[str, Strategy | Auto],
    sizes: Sizes,
) -> dict[str, Any]:
    """All figures, as --json has them.

    Args:
      model: whose end tokens are left out here.
      prompts: ids, of which requests of equal length are made; none: random ids.
      strategies: by name, timed in turn; speedups are over the first.
      sizes: see there.

    Raises:
      UserError: before anything is measured, for sizes that the memory has no room for.
    """
    model = endless(model)
    shapes = [(batch, length) for batch in sizes.batches for length in sizes.inputs]
    for batch, length in shapes:
        _check(model, strategies.values(), batch, length, sizes.outputs)
    results = []
    total = len(shapes) * len(strategies) * (sizes.repeats + 1)
    with tqdm(total=total, desc="throughput", unit="round", file=sys.stderr) as bar:
        for batch, length in shapes:
            requests = fixed_length(prompts, ROUNDS * batch, length, model.config.vocab_size)
            modes = _time(model, requests, strategies, batch, sizes, bar)
            shape = {"batch": batch, "requests": len(requests)}
            shape |= {"input_tokens": length, "output_tokens": sizes.outputs}
            results.append(shape | {"modes": modes})
    return {
        "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}",
        "dtype": model.config.dtype,
        "parameters": params.count(params.split(model.params)[0]),
        "prompts": "given" if prompts else "random ids",
        "throughput": results,
    }


def endless(model: LLM) -> LLM:
    """The same model without end tokens."""
    return LLM(
        dataclasses.replace(model.config, eos_token_ids=()),
        model.params,
        model.tokenizer,
        trained=model.trained,
        draft_length=model.draft_length,
        mesh=model.engine.programs.mesh,
        calibration=model.calibration,
    )


def fixed_length(
    prompts: Sequence[Sequence[int]], count: int, length: int, vocab_size: int
) -> list[list[int]]:
    """So many prompts of exactly `length` ids.

    Each ends with one of `prompts`, or its end; what is missing before it are the prompts before.
    """
    if not prompts:
        rng = np.random.default_rng(SEED)
        return rng.integers(0, vocab_size, (count, length)).tolist()
    requests = []
    for i in range(count):
        ids: list[int] = []
        at = i
        while len(ids) < length:
            ids = [*prompts[at % len(prompts)], *ids]
            at -= 1
        requests.append(ids[-length:])
    return requests


def _check(model: LLM, strategies: Any, batch: int, length: int, outputs: int) -> None:
    """Refuse a shape that the engine would refuse, before any is measured."""
    request = Request([0] * length, SamplingParams(max_new_tokens=outputs))
    for strategy in strategies:
        plan = model.plan_of(strategy, batch_size=batch)
        model.engine.check([request], plan)
        try:
            model.engine.open(plan, model.engine.capacity([request], plan)).close()
        except UserError as error:
            raise UserError(f"--batch-sizes {batch} with --contexts {length}: {error}") from None


def _time(
    model: LLM,
    requests: list[list[int]],
    strategies: Mapping[str, Strategy | Auto],
    batch: int,
    sizes: Sizes,
    bar: Any,
) -> dict[str, dict[str, Any]]:
    """The figures of each strategy at one batch size and length."""
    totals: dict[str, list[float]] = {name: [] for name in strategies}
    singles: dict[str, list[float]] = {name: [] for name in strategies}
    answers: dict[str, list[Completion]] = {}
    for round_ in range(sizes.repeats + 1):
        for name, strategy in strategies.items():
            bar.set_postfix_str(f"batch {batch}, {len(requests[0])} in, {name}")
            begin = time.perf_counter()
            answers[name] = model.complete(
                requests, strategy=strategy, batch_size=batch, max_new_tokens=sizes.outputs
            )
            seconds = time.perf_counter() - begin
            assert all(len(answer.tokens) == sizes.outputs for answer in answers[name])
            if round_:
                totals[name].append(len(requests) * sizes.outputs / seconds)
                rates = [sizes.outputs / answer.seconds for answer in answers[name]]
                singles[name].append(statistics.fmean(rates))
            bar.update()
    first = next(iter(strategies))
    return {
        name: {
            "tokens_per_second": statistics.median(totals[name]),
            "range": [min(totals[name]), max(totals[name])],
            "per_request": statistics.median(singles[name]),
            "per_request_range": [min(singles[name]), max(singles[name])],
            "speedup": statistics.median(
                [a / b for a, b in zip(totals[name], totals[first], strict=True)]
            ),
            "same_text": statistics.mean(
                a.tokens == b.tokens for a, b in zip(answers[name], answers[first], strict=True)
            ),
            "strategies": _ran(answers[name]),
        }
        for name in strategies
    }


def _ran(answers: Sequence[Completion]) -> list[dict[str, Any]]:
    """The strategies of the last round, and the cycles of each."""
    cycles: collections.Counter[Strategy] = collections.Counter()
    for answer in answers:
        for strategy, n in answer.strategies:
            cycles[strategy] += n
    return [strategy.given() | {"cycles": n} for strategy, n in cycles.most_common()]


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.1f} M parameters, {result['dtype']}, "
        f"{result['hardware']}; prompts: {result['prompts']}",
        "",
        "| batch | tokens in | out | loop | tokens/s in all (range) | per request (range) "
        "| speedup | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in result["throughput"]:
        for name, f in shape["modes"].items():
            whole, single = f["range"], f["per_request_range"]
            lines.append(
                f"| {shape['batch']} | {shape['input_tokens']} | {shape['output_tokens']} | {name}"
                f" | {f['tokens_per_second']:.0f} ({whole[0]:.0f}-{whole[1]:.0f})"
                f" | {f['per_request']:.1f} ({single[0]:.1f}-{single[1]:.1f})"
                f" | {f['speedup']:.2f} | {f['same_text']:.3f} |"
            )
    return "\n".join(lines)
