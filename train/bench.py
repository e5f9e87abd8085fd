"""Time a training step on this device, part by part: `python -m train.bench --config FILE`.

Times one step of one micro-batch of the configuration's shape, with random weights and rows of one
answer each (attention then sees the most tokens), and its parts: the teacher's forward, forward and
backward of the blocks, vocabulary, optimizer. The floor is the time of the step's arithmetic at the
rate of one large matrix product. Writes step.json into the run directory.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from orthrus_jax import runtime
from orthrus_jax.config import ModelConfig, preset_of
from orthrus_jax.errors import UserError
from orthrus_jax.files import write_atomic
from orthrus_jax.model import Model, Params, Segment, View, params
from train import cli, flops, lock, pretrain, settings, setup, trainer
from train.data import Rows
from train.divergence import head_of, score_against_teacher
from train.objective import Blocks, Objective, both_views, objective_of, sample_blocks

REPEATS = 5
PRODUCT = {"cpu": 2048}  # side of the floor's square matrices; 8192 on other devices


def sizes_of(config: Any) -> ModelConfig:
    """The sizes that a configuration trains: its own `model`, or the preset that its base names.

    Raises:
      UserError: for a configuration with neither.
    """
    t = config.train
    sizes = pretrain.sizes(config) if "model" in config else preset_of(config.base)
    return dataclasses.replace(sizes, block_size=t.block_size, dtype=t.dtype)


def matmul_rate(dtype: str) -> float:
    """Operations per second of one large matrix product."""
    side = PRODUCT.get(jax.default_backend(), 8192)
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / min(_seconds({"": lambda: product(x, x)})[""])


def _seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each call, warm and interleaved, so that a slow spell affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(REPEATS + 1), desc="measure", unit="round"):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in times.items()}


class Parts:
    """One micro-batch on one device, and the programs that make up its step."""

    def __init__(self, config: Any) -> None:
        t = config.train
        trainer.check_batch(t, None)
        sizes = sizes_of(config)
        self.model = Model(sizes, None, t.remat)
        self.objective = objective_of(t)
        weights = params.init(self.model, jax.random.key(0))
        self.frozen, self.diffusion = params.split(
            weights, freeze=() if t.train_o_proj else ("o_proj",)
        )
        self.frozen = jax.tree.map(lambda x: x.astype(t.dtype), self.frozen)
        if t.stack_layers:
            self.frozen, self.diffusion = map(params.stack, (self.frozen, self.diffusion))
        self.optimizer = trainer.adamw(t.learning_rate, t.steps, t.warmup)
        shape = (t.batch_size // t.accumulate, t.row_length)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, sizes.vocab_size - 1)
        on = jnp.ones(shape, bool)
        self.rows = Rows(tokens, jnp.zeros(shape, jnp.int32), on, on)
        key = trainer.step_key(jnp.uint32(0), jnp.int32(0))  # the anchors of the first step
        self.blocks = sample_blocks(key, self.rows, self.objective.anchors, sizes.block_size)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The programs to time, by name; the first call of each compiles it."""
        run = {"model": self.model, "objective": self.objective}
        student, teacher = _hidden(self.diffusion, self.frozen, self.rows, self.blocks, self.model)
        state = trainer.init_state(self.diffusion, self.optimizer)
        update = jax.jit(functools.partial(_update, self.optimizer))

        def step() -> Any:
            nonlocal state  # train_step donates it
            micro = jax.tree.map(lambda x: x[None], self.rows)
            state, metrics = trainer.train_step(
                state, self.frozen, micro, jnp.uint32(0), optimizer=self.optimizer, **run
            )
            return state, metrics

        both = (self.diffusion, self.frozen, self.rows, self.blocks)
        fresh = jax.tree.map(jnp.copy, state)
        return {
            "step": step,
            "teacher": lambda: _teacher(self.frozen, self.diffusion, self.rows, self.model),
            "forward": lambda: _hidden(*both, self.model),
            "views": lambda: _gradient(*both, self.model),
            "vocabulary": lambda: _vocabulary(
                student, teacher, head_of(self.frozen), self.blocks, **run
            ),
            "optimizer": lambda: update(fresh.diffusion, fresh.optimizer, fresh.diffusion),
        }


@functools.partial(jax.jit, static_argnames="model")
def _teacher(frozen: Params, diffusion: Params, rows: Rows, model: Model) -> Any:
    positions = jnp.broadcast_to(jnp.arange(rows.tokens.shape[1]), rows.tokens.shape)
    clean = Segment(rows.tokens, positions, View.AR, start=rows.start)
    return model.forward(params.merge(frozen, diffusion), [clean], None)[0]


@functools.partial(jax.jit, static_argnames="model")
def _hidden(diffusion: Params, frozen: Params, rows: Rows, blocks: Blocks, model: Model) -> Any:
    return both_views(diffusion, frozen, model, rows, blocks)


@functools.partial(jax.jit, static_argnames="model")
def _gradient(diffusion: Params, frozen: Params, rows: Rows, blocks: Blocks, model: Model) -> Any:
    """Both views forward, and backward from every block token."""

    def total(diffusion: Params) -> Any:
        student, teacher = both_views(diffusion, frozen, model, rows, blocks)
        return student.astype(jnp.float32).sum(), teacher

    return jax.value_and_grad(total, has_aux=True)(diffusion)


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def _vocabulary(
    student: Any, teacher: Any, head: Params, blocks: Blocks, *, model: Model, objective: Objective
) -> Any:
    """The divergence of every block token and its gradient."""
    source = blocks.anchors[..., None] + jnp.arange(model.config.block_size)

    def total(student: Any) -> Any:
        rows = source.reshape(student.shape[:2])
        scores = score_against_teacher(model, objective.divergence, head, student, teacher, rows)
        return scores.loss.sum()

    return jax.value_and_grad(total)(student)


def _update(optimizer: Any, gradient: Params, state: Any, weights: Params) -> Any:
    updates, state = optimizer.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state


def measure(config: Any) -> dict[str, Any]:
    """Measurements of a configuration's step: milliseconds, rates and the floor."""
    parts = Parts(config)
    rows, length = parts.rows.tokens.shape
    times = _seconds(parts.calls())
    ms = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
    work = {n: rows * f for n, f in flops.per_row(parts.model, parts.objective, length).items()}
    rate = matmul_rate(config.train.dtype)
    floor = sum(work.values()) / rate * 1e3
    shares = {
        "teacher": ms["teacher"],
        "blocks": ms["views"] - ms["teacher"],
        "vocabulary": ms["vocabulary"],
        "optimizer": ms["optimizer"],
    }
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": params.count(params.split(parts.frozen)[0]),
        "rows": rows,
        "row_length": length,
        "anchors": parts.objective.anchors,
        "block_size": parts.model.config.block_size,
        "step_ms": ms["step"],
        "step_ms_range": [min(times["step"]) * 1e3, max(times["step"]) * 1e3],
        "forward_ms": ms["forward"],
        "parts_ms": shares | {"rest": ms["step"] - sum(shares.values())},
        "work_gflop": {name: n / 1e9 for name, n in work.items()},
        "matmul_gflops": rate / 1e9,
        "floor_ms": floor,
        "over_floor": ms["step"] / floor,
        "tokens_per_second": rows * length / ms["step"] * 1e3,
        "mfu": sum(work.values()) / ms["step"] * 1e3 / peak if peak else None,
    }


def table(result: dict[str, Any]) -> str:
    """The measurements as text."""
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters; {result['rows']} rows of "
        f"{result['row_length']}, {result['anchors']} blocks of {result['block_size']} per row; "
        f"{result['device']}, jax {result['jax']}",
        "",
        "| part | ms | share | GFLOP | GFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for name, ms in result["parts_ms"].items():
        work = result["work_gflop"].get(name)
        rates = f"{work:.1f} | {work / ms * 1e3:.0f}" if work else " | "
        lines.append(f"| {name} | {ms:.1f} | {ms / result['step_ms']:.0%} | {rates} |")
    low, high = result["step_ms_range"]
    total = sum(result["work_gflop"].values())
    lines += [
        f"| step | {result['step_ms']:.1f} ({low:.1f}-{high:.1f}) | | {total:.1f} "
        f"| {total / result['step_ms'] * 1e3:.0f} |",
        f"| floor | {result['floor_ms']:.1f} | | {total:.1f} | {result['matmul_gflops']:.0f} |",
        "",
        f"{result['over_floor']:.2f} times the floor, {result['tokens_per_second']:.0f} tokens/s"
        + (f", MFU {result['mfu']:.0%}" if result["mfu"] else ""),
    ]
    return "\n".join(lines)


def main(config: Any, overwrite: bool) -> None:
    """Measure, print, write step.json."""
    settings.check(config, "run", "train")
    runtime.check_devices()
    sizes = sizes_of(config)
    setup.check_memory("the step", sizes, config.train.train_o_proj)
    path = pathlib.Path(config.run) / "step.json"
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give another --config.run, or --overwrite")
    with lock.held(path.parent, "nothing was written: give the same command again"):
        result = measure(config)
        print(table(result))
        write_atomic(path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(
        main,
        default="configs/small.py",
        description=__doc__ or "",
        switches=cli.OVERWRITE,
    )
