"""Measure the demo's checkpoint against its own AR decoding: `python -m eval.demo --run runs/demo`.

Same weights, same held-out prompts, batch 1, both loops compiled and warm, runs interleaved. Writes
report.json and report.png beside the model.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import orthrus_jax
from eval.speed import time_forwards
from orthrus_jax import cli, runtime, tune
from orthrus_jax.config import ModelConfig
from orthrus_jax.engine import Completion
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, Params, params
from orthrus_jax.tokenizer import encode
from train.problems import Problem, is_correct, problems

LARGER: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1920,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
}


def cycle_cost(config: ModelConfig, weights: Params, block_size: int) -> dict[str, float]:
    """Time an AR step and a draft-verify cycle at batch 1 behind 128 tokens.

    Returns milliseconds of each and their ratio: the tokens a cycle must emit to break even.
    """
    found = time_forwards(Model(config), weights, 1, 128, block_size, repeats=7)
    cost = {name: found[name] for name in ("ar_step_ms", "cycle_ms", "cycle_in_ar_steps")}
    return {"parameters": params.count(params.split(weights)[0]), **cost}


def measure(
    model: LLM, prompts: list[list[int]], repeats: int, **options: Any
) -> dict[str, list[list[Completion]]]:
    """Decode all prompts `repeats` times in each mode, in turn: AR, Orthrus, AR, Orthrus, ..."""
    runs: dict[str, list[list[Completion]]] = {"ar": [], "orthrus": []}
    for mode in runs:  # compile and warm
        model.complete(prompts[:2], mode=mode, **options)
    with tqdm(total=2 * repeats, desc="measure", unit="run") as bar:
        for _ in range(repeats):
            for mode, found in runs.items():
                found.append(model.complete(prompts, mode=mode, **options))
                bar.update()
    return runs


def tokens_per_second(run: list[Completion]) -> float:
    """Return emitted tokens over wall-clock, prefill included, compilation excluded."""
    return sum(len(c.tokens) for c in run) / sum(c.seconds for c in run)


def report(
    runs: dict[str, list[list[Completion]]], made: list[Problem], block_size: int
) -> dict[str, Any]:
    """Reduce the runs to the report's numbers; definitions are those of docs/design.md."""
    ar, orthrus = runs["ar"][0], runs["orthrus"][0]
    rates = {mode: [tokens_per_second(run) for run in found] for mode, found in runs.items()}
    ratios = [o / a for a, o in zip(rates["ar"], rates["orthrus"], strict=True)]
    cycles = np.concatenate([c.accepted for c in orthrus])
    return {
        "prompts": len(made),
        "block_size": block_size,
        "exact_match": float(
            np.mean([a.tokens == o.tokens for a, o in zip(ar, orthrus, strict=True)])
        ),
        "acceptance_length": float(cycles.mean()),
        "acceptance_by_position": [float((cycles >= i).mean()) for i in range(1, block_size)],
        "tokens_per_forward": float(np.mean([c.tokens_per_forward for c in orthrus])),
        "tokens_per_forward_pooled": sum(len(c.tokens) for c in orthrus)
        / sum(c.forwards for c in orthrus),
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "tokens_per_second_ar": statistics.median(rates["ar"]),
        "tokens_per_second_orthrus": statistics.median(rates["orthrus"]),
        "accuracy_ar": float(
            np.mean([is_correct(c.text, p) for c, p in zip(ar, made, strict=True)])
        ),
        "accuracy_orthrus": float(
            np.mean([is_correct(c.text, p) for c, p in zip(orthrus, made, strict=True)])
        ),
        "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}",
        "dtype": "float32",
    }


def draw(path: pathlib.Path, result: dict[str, Any], training: list[dict[str, Any]]) -> None:
    """Plot loss and acceptance against steps, acceptance by position, tokens/s of both loops."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot([r["step"] for r in training], [r["loss"] for r in training], color="tab:gray")
    left.set(xlabel="step", ylabel="forward KL (nats)", title="Training", yscale="log")
    found = [r for r in training if "acceptance_length" in r]
    twin = left.twinx()
    twin.plot([r["step"] for r in found], [r["acceptance_length"] for r in found], "o-")
    twin.set(ylim=(0, None))
    twin.set_ylabel("acceptance length, held-out", color="tab:blue")

    shares = result["acceptance_by_position"]
    middle.bar(range(1, len(shares) + 1), shares)
    middle.set(
        xlabel="draft position",
        ylabel="accepted (share of cycles)",
        ylim=(0, 1),
        title=f"Acceptance, mean {result['acceptance_length']:.2f} of {len(shares)}",
    )
    rates = [result["tokens_per_second_ar"], result["tokens_per_second_orthrus"]]
    bars = right.bar(["AR", "Orthrus"], rates, color=["tab:gray", "tab:blue"])
    right.bar_label(bars, fmt="%.0f")
    right.set(
        ylabel="tokens/s, batch 1",
        title=f"Speedup {result['speedup']:.2f}, exact match {result['exact_match']:.3f}",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m eval.demo", description=__doc__)
    parser.add_argument(
        "--run", default="runs/demo", help="directory of train.main; default: %(default)s"
    )
    parser.add_argument(
        "--prompts", type=int, default=120, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    cli.add_compile_cache(parser)
    args = parser.parse_args(argv)
    runtime.enable_compilation_cache(args.compile_cache)
    run = pathlib.Path(args.run)
    if not (run / "train.json").exists():
        raise UserError(f"{run} holds no finished training: run train.main first")
    begin = time.perf_counter()
    stages = json.loads((run / "train.json").read_text())
    training = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]

    model = orthrus_jax.load(run / "model", dtype="float32")
    ids = lambda made: [encode(model.tokenizer, p.question, chat=True) for p in made]
    options = {"max_new_tokens": 224}
    short = [prompt for prompt in ids(problems("train", 10_001, 60)) if len(prompt) <= 64][:12]
    rates = tune.measure(model, short, repeats=2, **options)
    block_size = tune.save(run / "model", rates)
    made = list(problems("held-out", 10_002, args.prompts))
    runs = measure(model, ids(made), args.repeats, draft_length=block_size, **options)

    result = report(runs, made, block_size) | {"tokens_per_second_by_block_size": rates}
    result |= {name: stages[name] for name in ("base_parameters", "trained_parameters")}
    larger = dataclasses.replace(model.config, **LARGER)
    result["cost"] = cycle_cost(model.config, model.params, block_size)
    random = params.init(Model(larger), jax.random.key(0))
    result["cost_of_larger_shape"] = cycle_cost(larger, random, block_size)
    result["seconds"] = stages["seconds"] | {"measure": time.perf_counter() - begin}
    (run / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(run / "report.png", result, training)
    print(
        f"{result['prompts']} held-out prompts, greedy, float32, batch 1, {result['hardware']}\n"
        f"  exact match       {result['exact_match']:.3f}\n"
        f"  accuracy          {result['accuracy_orthrus']:.3f} (AR {result['accuracy_ar']:.3f})\n"
        f"  acceptance length {result['acceptance_length']:.2f} drafts of {block_size - 1}\n"
        f"  tokens/forward    {result['tokens_per_forward']:.2f} "
        f"(pooled {result['tokens_per_forward_pooled']:.2f})\n"
        f"  tokens/s          {result['tokens_per_second_orthrus']:.0f} "
        f"(AR {result['tokens_per_second_ar']:.0f})\n"
        f"  speedup           {result['speedup']:.2f}x "
        f"({result['speedup_range'][0]:.2f}-{result['speedup_range'][1]:.2f} in "
        f"{args.repeats} interleaved runs)\n"
        f"  one cycle costs   {result['cost']['cycle_in_ar_steps']:.2f} AR steps here, "
        f"{result['cost_of_larger_shape']['cycle_in_ar_steps']:.2f} at "
        f"{result['cost_of_larger_shape']['parameters'] / 1e6:.0f} M parameters (random weights)\n"
        f"written: {run / 'report.json'}, {run / 'report.png'}"
    )


if __name__ == "__main__":
    run_command(main)
