"""Measure a training step on this device, part by part: `python -m train.bench --config FILE`.

Times one step of one micro-batch of the configuration's own shape, with random weights and rows
that are one answer each (the most there is to see), beside its parts: the forward of the teacher,
forward and backward of the blocks, vocabulary, optimizer. The floor is the arithmetic of the step
at the rate that one large matrix product reaches here. Writes step.json into the run directory.
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

from orthrus_jax import params
from orthrus_jax.config import ModelConfig, preset_of
from orthrus_jax.errors import UserError
from orthrus_jax.files import write_atomic
from orthrus_jax.model import Model, Params, Segment, View
from train import cli, flops, pretrain, trainer
from train.data import Rows
from train.divergence import head_of, score_against_teacher
from train.objective import Blocks, Objective, both_views, objective_of, sample_blocks

REPEATS = 5
PRODUCT = {"cpu": 2048}  # side of the matrices whose product sets the floor; elsewhere 8192


def sizes_of(config: Any) -> ModelConfig:
    """The sizes that a configuration trains: its own `model`, or those its base is named after.

    Raises:
      UserError: where it gives neither.
    """
    t = config.train
    found = pretrain.sizes(config) if "model" in config else preset_of(config.base)
    return dataclasses.replace(found, block_size=t.block_size, dtype=t.dtype)


def matmul_rate(dtype: str) -> float:
    """Operations a second of one large matrix product."""
    side = PRODUCT.get(jax.default_backend(), 8192)
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / min(_seconds({"": lambda: product(x, x)})[""])


def _seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each call, warm and interleaved: a slow spell of the machine hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(REPEATS + 1), desc="measure", unit="round"):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in found.items()}


class Parts:
    """One micro-batch on one device, and the programs that a step of it consists of."""

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
        """What is timed, by name; each is compiled by its first call."""
        run = {"model": self.model, "objective": self.objective}
        student, teacher = _hidden(self.diffusion, self.frozen, self.rows, self.blocks, self.model)
        state = trainer.init_state(self.diffusion, self.optimizer)
        update = jax.jit(functools.partial(_update, self.optimizer))

        def step() -> Any:
            nonlocal state  # donated
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
    """Both views forward, and back from every block row."""

    def total(diffusion: Params) -> Any:
        student, teacher = both_views(diffusion, frozen, model, rows, blocks)
        return student.astype(jnp.float32).sum(), teacher

    return jax.value_and_grad(total, has_aux=True)(diffusion)


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def _vocabulary(
    student: Any, teacher: Any, head: Params, blocks: Blocks, *, model: Model, objective: Objective
) -> Any:
    """Every block row's divergence and its gradient."""
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
    """All figures of a configuration's step: milliseconds, rates and the floor."""
    parts = Parts(config)
    rows, length = parts.rows.tokens.shape
    found = _seconds(parts.calls())
    ms = {name: statistics.median(seconds) * 1e3 for name, seconds in found.items()}
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
        "step_ms_range": [min(found["step"]) * 1e3, max(found["step"]) * 1e3],
        "forward_ms": ms["forward"],
        "parts_ms": shares | {"rest": ms["step"] - sum(shares.values())},
        "work_gflop": {name: n / 1e9 for name, n in work.items()},
        "matmul_gflops": rate / 1e9,
        "floor_ms": floor,
        "over_floor": ms["step"] / floor,
        "tokens_per_second": rows * length / ms["step"] * 1e3,
        "mfu": sum(work.values()) / ms["step"] * 1e3 / peak if peak else None,
    }


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{found['parameters'] / 1e6:.1f} M parameters; {found['rows']} rows of "
        f"{found['row_length']}, {found['anchors']} blocks of {found['block_size']} a row; "
        f"{found['device']}, jax {found['jax']}",
        "",
        "| part | ms | share | GFLOP | GFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for name, ms in found["parts_ms"].items():
        work = found["work_gflop"].get(name)
        rates = f"{work:.1f} | {work / ms * 1e3:.0f}" if work else " | "
        lines.append(f"| {name} | {ms:.1f} | {ms / found['step_ms']:.0%} | {rates} |")
    low, high = found["step_ms_range"]
    total = sum(found["work_gflop"].values())
    lines += [
        f"| step | {found['step_ms']:.1f} ({low:.1f}-{high:.1f}) | | {total:.1f} "
        f"| {total / found['step_ms'] * 1e3:.0f} |",
        f"| floor | {found['floor_ms']:.1f} | | {total:.1f} | {found['matmul_gflops']:.0f} |",
        "",
        f"{found['over_floor']:.2f} times the floor, {found['tokens_per_second']:.0f} tokens/s"
        + (f", MFU {found['mfu']:.0%}" if found["mfu"] else ""),
    ]
    return "\n".join(lines)


def main(config: Any, overwrite: bool) -> None:
    """Measure, print, write step.json."""
    path = pathlib.Path(config.run) / "step.json"
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there: give another --config.run, or --overwrite")
    found = measure(config)
    print(table(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(
        main,
        default="configs/small.py",
        description=__doc__ or "",
        switches=cli.OVERWRITE,
    )
