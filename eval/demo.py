"""Measure the demo: `python -m eval.demo --run runs/demo`, after train.main.

The demo benchmark (held-out problems of train/problems.py, both loops, graded, by harness.py),
repeated for a range of the speedup; and a cost table: the time of an AR step and of a draft-verify
cycle, here and at a larger shape. Writes report.json and report.png to the directory of --run.
`--model` measures any other model on the same problems. Knows no way of its own to decode or grade.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

import orthrus_jax
from eval import calibrate, harness, plots, report, run_directory
from eval.arguments import check_directory, positive
from eval.benchmarks import BENCHMARKS
from eval.records import LOOPS, Row
from eval.run_directory import RunDirectory
from eval.speed import time_forwards
from orthrus_jax import cli
from orthrus_jax.config import ModelConfig
from orthrus_jax.engine import planner
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import first_line, read_jsonl, write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, Params, params
from orthrus_jax.tokenizer import encode
from train.problems import problems

PARAMETERS = ("base_parameters", "trained_parameters")  # in train.json, and in the report
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
PROMPTS, NEW_TOKENS = 120, 224  # the longest answers fit
LARGER: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1920,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
}


def cycle_cost(config: ModelConfig, weights: Params, block_size: int) -> dict[str, float]:
    """Time an AR step and a draft-verify cycle at batch 1 after 128 tokens.

    Returns:
      Milliseconds of each and their ratio, the tokens that a cycle must emit to break even; and the
      number of frozen parameters.
    """
    times = time_forwards(Model(config), weights, 1, 128, block_size, repeats=7)
    cost = {name: times[name] for name in ("ar_step_ms", "cycle_ms", "cycle_in_ar_steps")}
    return {"parameters": params.count(params.split(weights)[0]), **cost}


def _costs(model: LLM, block_size: int) -> dict[str, Any]:
    """The cost table: `cycle_cost` of this model, and of a larger one with random weights."""
    larger = dataclasses.replace(model.config, **LARGER)
    random = params.init(Model(larger), jax.random.key(0))
    return {
        "cost": cycle_cost(model.config, model.params, block_size),
        "cost_of_larger_shape": cycle_cost(larger, random, block_size),
    }


def summarize(results: Sequence[Row]) -> dict[str, Any]:
    """The figures of the report from `metrics.numbers` of each repeat.

    The texts are the same in all repeats; times are medians, the speedup's range is that of the
    repeats (of a single one, that of its chunks).
    """
    first, ratios = results[0], [result["speedup"] for result in results]
    rate = lambda loop: statistics.median(r["loops"][loop]["tokens_per_second"] for r in results)
    orthrus = first["loops"]["orthrus"]
    names = ["acceptance_length", "acceptance_by_position"]
    names += ["tokens_per_forward", "tokens_per_forward_pooled"]
    return {
        "prompts": first["answered"],
        "block_size": first["loaded"]["draft_length"],
        "exact_match": first["same_text"],
        **{name: orthrus[name] for name in names},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)] if ratios[1:] else first["speedup_range"],
        **{f"tokens_per_second_{loop}": rate(loop) for loop in LOOPS},
        **{f"accuracy_{loop}": first["loops"][loop]["accuracy"] for loop in LOOPS},
        "hardware": first["hardware"],
        "dtype": first["loaded"]["dtype"],
    }


def draw(path: pathlib.Path, figures: Row, training: Sequence[Row]) -> None:
    """Plot the training, if it is known, acceptance by position, and tokens/s of both loops."""
    columns = 3 if training else 2
    with plots.figure(path, columns, (4.4 * columns, 3.8)) as axes:
        if training:
            _draw_training(axes[0], training)
        plots.draw_acceptance(axes[-2], [("", figures, plots.COLORS["orthrus"])])
        drafts = len(figures["acceptance_by_position"])
        axes[-2].set(title=f"Acceptance, mean {figures['acceptance_length']:.2f} of {drafts}")
        loops = {"ar": "AR", "orthrus": "Orthrus"}
        plots.draw_rates(
            axes[-1],
            [
                (name, figures[f"tokens_per_second_{loop}"], plots.COLORS[loop])
                for loop, name in loops.items()
            ],
        )
        low, high = figures["speedup_range"]
        axes[-1].set(
            title=f"Speedup {figures['speedup']:.2f} ({low:.2f}-{high:.2f}), "
            f"exact match {figures['exact_match']:.3f}"
        )


def _draw_training(axis: Any, records: Sequence[Row]) -> None:
    """Plot loss and held-out acceptance against steps."""
    axis.plot([r["step"] for r in records], [r["loss"] for r in records], color="tab:gray")
    axis.set(xlabel="step", ylabel="forward KL (nats)", title="Training", yscale="log")
    held_out = [r for r in records if "acceptance_length" in r]
    twin = axis.twinx()
    twin.plot([r["step"] for r in held_out], [r["acceptance_length"] for r in held_out], "o-")
    twin.set(ylim=(0, None))
    twin.set_ylabel("acceptance length, held-out", color="tab:blue")


def text(figures: Row, args: argparse.Namespace) -> str:
    """The figures for a terminal."""
    cost, larger = figures["cost"], figures["cost_of_larger_shape"]
    low, high = figures["speedup_range"]
    return (
        f"{figures['prompts']} held-out prompts, greedy, {figures['dtype']}, "
        f"batch {args.batch_size}, {figures['hardware']}\n"
        f"  exact match       {figures['exact_match']:.3f}\n"
        f"  accuracy          {figures['accuracy_orthrus']:.3f} (AR {figures['accuracy_ar']:.3f})\n"
        f"  acceptance length {figures['acceptance_length']:.2f} drafts of "
        f"{len(figures['acceptance_by_position'])}\n"
        f"  tokens/forward    {figures['tokens_per_forward']:.2f} "
        f"(pooled {figures['tokens_per_forward_pooled']:.2f})\n"
        f"  tokens/s          {figures['tokens_per_second_orthrus']:.0f} "
        f"(AR {figures['tokens_per_second_ar']:.0f})\n"
        f"  speedup           {figures['speedup']:.2f}x ({low:.2f}-{high:.2f} in "
        f"{args.repeats} interleaved runs)\n"
        f"  one cycle costs   {cost['cycle_in_ar_steps']:.2f} AR steps here, "
        f"{larger['cycle_in_ar_steps']:.2f} at {larger['parameters'] / 1e6:.0f} M parameters "
        "(random weights)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    if args.mode != "both" or args.temperature:
        raise UserError("eval.demo compares both loops greedily: leave out --mode, --temperature")
    run, finished = pathlib.Path(args.run), args.model is None
    stages, training = _training(run) if finished else ({"seconds": {}}, [])
    out = pathlib.Path(args.out or run / "benchmark")
    replaced = args.out is None and not args.resume
    if not replaced:
        RunDirectory(out, resume=args.resume)  # refused before anything is measured
    begin = time.perf_counter()
    args.model = args.model or str(run / "model")
    model = orthrus_jax.load(args.model, **cli.runtime_options(args))
    model.engine.resolve(harness.measured_strategy(args, model))
    if replaced:
        run_directory.remove(out)
    rates = _tune(model, args) if finished else None

    results = []
    for turn in range(1, args.repeats + 1):
        args.out = str(out if turn == 1 else out / f"repeat-{turn}")
        results.append(harness.measure(BENCHMARKS["demo"], args, model))
    figures = summarize(results)
    figures |= _costs(model, figures["block_size"])
    figures |= {name: stages[name] for name in PARAMETERS if name in stages}
    if rates is not None:
        figures["tokens_per_second_by_block_size"] = rates.tokens_per_second
    figures["seconds"] = stages["seconds"] | {"measure": time.perf_counter() - begin}
    where = run if finished else out
    write_atomic(where / "report.json", json.dumps(figures, indent=2) + "\n")
    draw(where / "report.png", figures, training)
    if not finished:
        print(report.text({out.name: results[0]}), end="\n\n")
    print(text(figures, args))
    print(f"written: {where / 'report.json'}, {where / 'report.png'}, {out / report.PAGE}")


def _training(run: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The stages and the logged steps of a finished training.

    Raises:
      UserError: for a directory that holds none, holds damaged files or cannot be written to.
    """
    if not (run / "train.json").exists():
        raise UserError(f"{run} holds no finished training: run train.main first")
    check_directory("--run", run)
    try:
        stages = json.loads((run / "train.json").read_text(encoding="utf-8"))
        seconds = {name: float(value) for name, value in stages["seconds"].items()}
        every = (record for _, record in read_jsonl(run / "train.jsonl"))
        records = [record for record in every if "pairwise_loss" not in record]  # the head's
        for record in records:
            float(record["step"]), float(record["loss"]), float(record.get("acceptance_length", 0))
        counts = {name: int(stages[name]) for name in PARAMETERS}
    except OSError as error:
        raise UserError(f"{run} cannot be read: {first_line(error)}") from None
    except UserError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{run}: train.json or train.jsonl is damaged ({first_line(error)}): give --model "
            f"{run / 'model'} to measure without them"
        ) from None
    return {"seconds": seconds, **counts}, records


def _tune(model: LLM, args: argparse.Namespace) -> planner.LengthRates | None:
    """Measure and keep the draft length, unless an option sets it; a resumed run keeps its own."""
    if args.draft_length is not None or args.rows is not None:
        return None
    if args.resume and model.calibration is not None and model.draft_length is not None:
        return model.calibration.draft_length[jax.devices()[0].device_kind]
    planner.check_writable(args.model)
    prompts = (
        encode(model.tokenizer, p.question, chat=True) for p in problems("train", 10_001, 60)
    )
    short = [prompt for prompt in prompts if len(prompt) <= 64][:12]
    rates = calibrate.measure_draft_lengths(
        model, short, repeats=2, max_new_tokens=args.max_new_tokens
    )
    calibrate.add_draft_length(model.calibration, rates).save(args.model)
    model.draft_length = rates.draft_length
    return rates


def _parser() -> argparse.ArgumentParser:
    benchmark = BENCHMARKS["demo"]
    parser = harness.command_parser(
        *(benchmark.name, benchmark.title), model="RUN/model", data="made here",
        new_tokens=NEW_TOKENS, out="RUN/benchmark, replaced",
    )  # fmt: skip
    add = parser.add_argument
    add("--run", default="runs/demo", metavar="RUN", help="directory of train.main; default: "
        "%(default)s")  # fmt: skip
    add("--prompts", dest="limit", type=positive, metavar="N", help="the same as --limit; default: "
        f"{PROMPTS}")  # fmt: skip
    add("--repeats", type=positive, default=3, metavar="N", help="default: %(default)s")
    parser.description = "Measure the demo: both loops, greedy, float32 unless --dtype is given."
    parser.set_defaults(model=None, limit=PROMPTS, dtype="float32")
    return parser


if __name__ == "__main__":
    run_command(main)
