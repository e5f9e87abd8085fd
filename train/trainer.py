"""Optimizer, train step and loop. The objective is objective.py; files and commands are main.py.

The state holds the diffusion subtree and its optimizer alone: the frozen tree is an argument of
every step and is returned by none.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from orthrus_jax.model import Model, Params
from train.data import Rows
from train.objective import distillation_loss


class TrainState(NamedTuple):
    """What training changes: the diffusion subtree, its optimizer's state, and steps taken."""

    diffusion: Params
    optimizer: Any
    step: jax.Array


def adamw(learning_rate: float, steps: int, warmup: float) -> optax.GradientTransformation:
    """The paper's optimizer: AdamW, betas (0.9, 0.95), clip 1, warm-up, cosine to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(steps * warmup)), steps, end_value=learning_rate / 10
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)
    )


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "anchors"), donate_argnames=("state",)
)
def train_step(
    state: TrainState,
    frozen: Params,
    rows: Rows,
    seed: jax.Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    anchors: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step on a batch. The anchors' key is a function of (seed, step) alone."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    value_and_grad = jax.value_and_grad(distillation_loss, has_aux=True)
    (loss, metrics), gradient = value_and_grad(state.diffusion, frozen, model, rows, key, anchors)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.diffusion)
    diffusion = optax.apply_updates(state.diffusion, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient), **metrics}
    return TrainState(diffusion, optimizer_state, state.step + 1), metrics


def fit(
    recipe: Any,
    model: Model,
    frozen: Params,
    diffusion: Params,
    batches: Iterator[Rows],
    log: pathlib.Path,
    evaluate: Callable[[Params], dict[str, float]],
) -> Params:
    """Train for `recipe.steps` steps and return the diffusion subtree.

    Args:
      recipe: steps, learning_rate, warmup, anchors, eval_every, seed.
      model: static.
      frozen, diffusion: the two subtrees; `diffusion` is copied, not consumed.
      batches: packed batches, at least `steps` of them.
      log: a JSONL file, one line every logged step; written anew.
      evaluate: measures real decoding with a diffusion subtree; called every `eval_every` steps and
        at the end.
    """
    optimizer = adamw(recipe.learning_rate, recipe.steps, recipe.warmup)
    own = jax.tree.map(lambda x: jnp.array(x, jnp.float32), diffusion)
    state = TrainState(own, optimizer.init(own), jnp.int32(0))
    step = functools.partial(train_step, model=model, optimizer=optimizer, anchors=recipe.anchors)
    with log.open("w", encoding="utf-8") as file, tqdm(total=recipe.steps, unit="step") as bar:
        bar.set_description("train")
        for i in range(1, recipe.steps + 1):
            state, metrics = step(state, frozen, next(batches), jnp.uint32(recipe.seed))
            bar.update()
            last = i == recipe.steps
            if not (last or i % recipe.log_every == 0 or i == 1):
                continue
            record = {"step": i, **{k: v.tolist() for k, v in jax.device_get(metrics).items()}}
            if last or i % recipe.eval_every == 0:
                record |= evaluate(state.diffusion)
                bar.set_description(f"train, acceptance {record['acceptance_length']:.2f}")
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            file.write(json.dumps(record) + "\n")
            file.flush()
    return state.diffusion
