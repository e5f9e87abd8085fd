"""Optimizer, train step and training loop. Knows no files; objective.py has the loss.

The state holds only the trained subtree and its optimizer: every step takes the frozen tree as an
argument, and none returns it.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from orthrus_jax import sharding
from orthrus_jax.decoding.sampling import NOISE
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, Params
from train import flops
from train.data import Rows
from train.objective import Blocks, LossSums, Objective, distillation_loss, sample_blocks

IN_FLIGHT = 2  # steps dispatched to the device before the host waits for one


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
      diffusion: the trained subtree, float32.
      optimizer: its state.
      step: int32[], the number of steps taken.
      broken_at: int32[], the first step whose loss, gradient or new weights were not finite; 0 if
        all were. A state that is saved has 0 there.
    """

    diffusion: Params
    optimizer: Any
    step: jax.Array
    broken_at: jax.Array


class Batches(Protocol):
    """An endless source of batches with a position that can be saved."""

    def __next__(self) -> Rows: ...

    def state(self) -> dict[str, Any]: ...


class CheckpointSaver(Protocol):
    """Saves checkpoints; see checkpoints.py."""

    def save(self, state: TrainState, data: dict[str, Any]) -> None: ...

    def save_best(self, state: TrainState, value: float) -> None: ...


class Interrupted(Exception):  # noqa: N818 (requested, not an error)
    """Training stopped on request, after saving its state."""


class NotFiniteError(UserError):
    """The loss, its gradient or the weights became NaN or infinite; nothing of that was saved."""


def adamw(
    learning_rate: float, steps: int, warmup: float, floor: float = 0.1
) -> optax.GradientTransformation:
    """The optimizer of arXiv 2605.12825: AdamW, betas (0.9, 0.95), clip 1, warm-up, cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(steps * warmup)), steps, end_value=learning_rate * floor
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)
    )


def check_batch(recipe: Any, mesh: Mesh | None) -> None:
    """Refuse a batch that does not divide into equal micro-batches over the mesh.

    Raises:
      UserError: naming the sizes.
    """
    ways = 1 if mesh is None else mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]
    if recipe.accumulate < 1 or recipe.batch_size % (recipe.accumulate * ways):
        raise UserError(
            f"train.batch_size={recipe.batch_size} does not divide into train.accumulate="
            f"{recipe.accumulate} micro-batches over {ways} device(s) that share out rows"
        )


def init_state(
    diffusion: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """Float32 master weights, copied from `diffusion`, and a fresh optimizer."""
    master = jax.tree.map(lambda x: jnp.array(x, jnp.float32), diffusion)
    state = TrainState(master, optimizer.init(master), jnp.int32(0), jnp.int32(0))
    return state if mesh is None else jax.device_put(state, sharding.tree_shardings(state, mesh))


def step_key(seed: jax.Array, step: jax.Array) -> jax.Array:
    """The key of a step's anchors: a function of (seed, step) alone, so no key needs saving."""
    return jax.random.fold_in(jax.random.key(seed, impl=NOISE), step)


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "objective"), donate_argnames=("state",)
)
def train_step(
    state: TrainState,
    frozen: Params,
    rows: Rows,
    seed: jax.Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: Objective,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step on the mean loss of all micro-batches.

    Args:
      state: donated.
      frozen: the frozen subtree.
      rows: M micro-batches, arrays [M, B, L]; their gradients are summed in float32.
      seed: uint32[].
      model, optimizer, objective: static.

    Returns:
      The next state and float32 metrics: loss, grad_norm, supervised_rows, and `LossSums.means`.
    """
    micro, batch = rows.tokens.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(micro * batch, -1), rows)
    blocks = sample_blocks(
        step_key(seed, state.step), flat, objective.anchors, model.config.block_size
    )
    blocks = jax.tree.map(lambda x: x.reshape(micro, batch, *x.shape[1:]), blocks)
    gradient_of = jax.value_and_grad(distillation_loss, has_aux=True)

    def micro_step(rows: Rows, blocks: Blocks) -> tuple[jax.Array, LossSums, Params]:
        rows, blocks = _over_devices(model, (rows, blocks))
        (loss, sums), gradient = gradient_of(
            state.diffusion, frozen, model, rows, blocks, objective
        )
        return loss, sums, gradient

    if micro == 1:
        totals = micro_step(*jax.tree.map(lambda x: x[0], (rows, blocks)))
    else:
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(micro_step, *jax.tree.map(lambda x: x[0], (rows, blocks))),
        )
        add = lambda total, batch: (jax.tree.map(jnp.add, total, micro_step(*batch)), None)
        totals, _ = jax.lax.scan(add, zeros, (rows, blocks))
    loss, sums, gradient = totals
    weight = jnp.maximum(sums.weight, 1e-6)
    gradient = jax.tree.map(lambda g: g / weight, gradient)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.diffusion)
    weights, norm = optax.apply_updates(state.diffusion, updates), optax.tree.norm(gradient)
    finite = [jnp.isfinite(x).all() for x in (loss, norm, *jax.tree.leaves(weights))]
    now = jnp.where(jnp.stack(finite).all(), 0, state.step + 1)
    broken_at = jnp.where(state.broken_at > 0, state.broken_at, now)
    new = TrainState(weights, optimizer_state, state.step + 1, broken_at)
    if model.mesh is not None:  # keep the old state's shardings
        new = jax.lax.with_sharding_constraint(new, sharding.tree_shardings(new, model.mesh))
    return new, {
        "loss": loss / weight,
        "grad_norm": norm,
        "supervised_rows": sums.rows.sum(),
        "broken_at": broken_at,
        **sums.means(),
    }


def _over_devices(model: Model, batch: Any) -> Any:
    """Keep a micro-batch's rows sharded over the mesh."""
    if model.mesh is None:
        return batch
    spec = jax.sharding.NamedSharding(model.mesh, P(sharding.BATCH))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), batch)


def to_devices(rows: Rows, micro: int, model: Model) -> Rows:
    """Place this host's rows [n, L] of a batch, as arrays [micro, B, L] over all hosts' devices."""
    cut = Rows(*(x.reshape(micro, -1, x.shape[-1]) for x in rows))
    if model.mesh is None:
        return jax.tree.map(jnp.asarray, cut)
    where = sharding.rows_sharding(model.mesh, axis=1)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), cut)


def fit(
    recipe: Any,
    objective: Objective,
    model: Model,
    frozen: Params,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    log: Callable[[dict[str, Any]], None],
    evaluate: Callable[[Params], dict[str, Any]],
    *,
    saver: CheckpointSaver | None = None,
    stop: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Train from `state`, which is donated, to `recipe.steps` steps.

    Args:
      recipe: steps, accumulate, log_every, eval_every, save_every, seed.
      objective, model, optimizer: static; the last from `adamw`.
      frozen: the frozen subtree, stacked or not, as `state.diffusion` is.
      batches: yields this host's rows of each global batch.
      log: called with the record of every logged step.
      evaluate: measures real decoding with a diffusion subtree, every `eval_every` steps and at the
        end. The best checkpoint has the highest "acceptance_length" that it returns, or else the
        highest expected acceptance of the loss.
      saver: saves every `save_every` steps and at the end; None saves nothing.
      stop: called after every step, on every host, with its number; True stops training.

    Raises:
      Interrupted: when `stop` returned True, after saving the state.
      NotFiniteError: when a step was not finite; see `_steps`.
    """
    first, meter = int(state.step), flops.Meter(model, objective)
    steps = _steps(recipe, objective, model, frozen, state, optimizer, batches, meter)
    quiet = jax.process_index() > 0
    with tqdm(total=recipe.steps, initial=first, unit="step", desc="train", disable=quiet) as bar:
        for i, (state, metrics) in enumerate(steps, first + 1):
            bar.update()
            due = _due(recipe, i, is_first=i == first + 1, stopping=stop(i))
            if due.save or due.log:
                _check_finite(state.broken_at)
            if due.log:
                record = {"step": i, **_on_host(metrics), **meter.lap()}
                if due.evaluate:
                    record |= evaluate(state.diffusion)
                    accepted = record.get("acceptance_length", record["expected_acceptance"])
                    bar.set_description(f"train, acceptance {accepted:.2f}")
                    if saver is not None:
                        saver.save_best(state, accepted)
                    meter.lap()  # evaluation is no training time
                bar.set_postfix(loss=f"{record['loss']:.3f}")
                log(record)
            if saver is not None and due.save:
                saver.save(state, batches.state())
            if due.stop:
                raise Interrupted
    return state


def _steps(
    recipe: Any,
    objective: Objective,
    model: Model,
    frozen: Params,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    meter: flops.Meter,
) -> Iterator[tuple[TrainState, dict[str, jax.Array]]]:
    """Take the steps that are left; yield each state and its metrics, still on the devices.

    Raises:
      NotFiniteError: when a step was not finite, at most IN_FLIGHT steps after it and before any
        state of it is evaluated or saved.
    """
    in_flight: collections.deque[jax.Array] = collections.deque()
    for _ in range(int(state.step), recipe.steps):
        rows = to_devices(next(batches), recipe.accumulate, model)
        state, metrics = train_step(
            state, frozen, rows, jnp.uint32(recipe.seed),
            model=model, optimizer=optimizer, objective=objective,
        )  # fmt: skip
        meter.add(rows.tokens.shape[0] * rows.tokens.shape[1], rows.tokens.shape[2])
        in_flight.append(metrics.pop("broken_at"))
        if len(in_flight) > IN_FLIGHT:
            _check_finite(in_flight.popleft())  # waits for that step
        yield state, metrics


class _Due(NamedTuple):
    """What follows a step."""

    evaluate: bool
    log: bool
    save: bool
    stop: bool


def _due(recipe: Any, step: int, *, is_first: bool, stopping: bool) -> _Due:
    """What is due after a step: a run that stops is logged and saved, not evaluated."""
    last = step == recipe.steps
    evaluate = last or (step % recipe.eval_every == 0 and not stopping)
    return _Due(
        evaluate,
        log=evaluate or stopping or step % recipe.log_every == 0 or is_first,
        save=last or stopping or step % recipe.save_every == 0,
        stop=stopping and not last,
    )


def _on_host(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in sharding.to_host(metrics).items()}


def _check_finite(broken_at: jax.Array) -> None:
    if step := int(broken_at):
        raise NotFiniteError(
            f"the loss, its gradient or the weights are NaN or infinite at step {step}, of which "
            "nothing was saved: lower train.learning_rate and give --change_recipe, which goes on "
            "from the last checkpoint, or --overwrite"
        )
