"""The pairwise head's training: blocks recorded on the answers, then cross-entropy over candidates.

After the view is trained, its blocks run once at anchors of the training answers; their likeliest
tokens are kept. The head learns to pick the answer's token among them, given the answer's token
before, or to say that it is none of them. Minutes at most. Knows no file of a checkpoint.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from orthrus_jax import sharding
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.guesses import top_ids
from orthrus_jax.decoding.sampling import NOISE
from orthrus_jax.decoding.strategy import CANDIDATES
from orthrus_jax.errors import UserError
from orthrus_jax.files import write_atomic
from orthrus_jax.model import Model, Params, pairwise
from orthrus_jax.model.pairwise import HEAD, Head
from train import hosts, trainer
from train.data import Loader, Rows
from train.log import Log
from train.objective import both_views, sample_blocks

Array = Any  # numpy on the host, jax inside a step
FOLDER, BLOCKS, ABOUT = "head", "blocks.npz", "blocks.json"  # in the run


class RecordedBlocks(NamedTuple):
    """The guesses of N blocks, and the answers' own tokens.

    Attributes:
      tokens: int32[N, K + 1], the anchor and the K tokens after it.
      supervised: bool[N, K], these are answer tokens.
      guesses: int32[N, K, M], the M likeliest at each position.
      log_q: float32[N, K, M].
    """

    tokens: Array
    supervised: Array
    guesses: Array
    log_q: Array


class TrainedView(NamedTuple):
    """A model whose diffusion view is trained; its subtrees may be stacked."""

    model: Model
    frozen: Params
    diffusion: Params


def train_head(
    config: Any,
    view: TrainedView,
    rows: Rows,
    evaluate: Callable[[Params], dict[str, Any]],
    step: int,
) -> Head | None:
    """Train a head for a trained view; keep it only if held-out prompts are drafted better with it.

    Args:
      config: the run's; `head` and what says how blocks are run. One record is added to the run's
        log: the loss, and acceptance without and with the head.
      view: whose drafts the head orders.
      rows: the packed training answers.
      evaluate: decodes held-out prompts with a diffusion subtree, as `trainer.fit` has it; a head
        in the subtree is used.
      step: of the record, the view's last.

    Returns:
      The head, on every host; None if it lowers the acceptance, or `head.steps` is 0.
    """
    if not config.head.steps:
        return None
    recorded = recorded_blocks(config, view, rows)
    table = sharding.to_host(view.frozen["embed_tokens"]["embedding"])
    head, loss = fit(config.head, recorded, view.model.config, table, config.seed)
    plain, drafted = evaluate(view.diffusion), evaluate(view.diffusion | {HEAD: head})
    measured = [name for name in plain if name != "sample"]
    record = {"step": step, "pairwise_loss": loss}
    record |= {f"plain_{name}": plain[name] for name in measured}
    record |= {f"pairwise_{name}": drafted[name] for name in measured}
    with Log(pathlib.Path(config.run), step) as log:
        log.write(record)
    without, with_head = (e.get("acceptance_length", 0.0) for e in (plain, drafted))
    if measured and with_head <= without:
        print(f"pairwise head left out: {with_head:.2f} drafts accepted, {without:.2f} without")
        return None
    return head


def recorded_blocks(config: Any, trained: TrainedView, rows: Rows) -> RecordedBlocks:
    """Blocks of this view in RUN/head; recorded first where that holds none or another view's."""
    folder = pathlib.Path(config.run) / FOLDER
    view = hashlib.sha256()
    for leaf in jax.tree.leaves(sharding.to_host(trained.diffusion)):
        view.update(np.ascontiguousarray(leaf).tobytes())
    about = {
        "view": view.hexdigest(),
        "rows": len(rows.tokens),
        "blocks": config.head.blocks,
        "seed": config.seed,
    }
    path, own = folder / BLOCKS, folder / ABOUT
    known = path.exists() and own.exists() and json.loads(own.read_text()) == about
    hosts.wait()  # all have looked before the first writes
    if known:
        with np.load(path) as arrays:
            return RecordedBlocks(**arrays)
    recorded = record(config, trained, rows)
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        own.unlink(missing_ok=True)
        np.savez(path, **recorded._asdict())
        write_atomic(own, json.dumps(about, indent=2) + "\n")
    return recorded


def record(config: Any, view: TrainedView, rows: Rows) -> RecordedBlocks:
    """Run blocks at random anchors of the answers until `head.blocks` are recorded.

    Raises:
      UserError: when the rows hold no answer that an anchor fits into.
    """
    t, wanted = config.train, config.head.blocks
    batch = t.batch_size // t.accumulate
    loader = Loader(rows, batch, config.seed, jax.process_index(), jax.process_count())
    parts: list[RecordedBlocks] = []
    # Other anchors than training had: its keys are of smaller numbers.
    key = jax.random.fold_in(jax.random.key(config.seed, impl=NOISE), 1 << 31)
    count = 0
    quiet = not hosts.is_first()
    most = 4 * -(-wanted // (batch * t.anchors))  # rows of few answers give fewer blocks
    with tqdm(total=wanted, unit="block", desc="record", disable=quiet) as bar:
        for i in range(most):
            placed = jax.tree.map(lambda x: x[0], trainer.to_devices(next(loader), 1, view.model))
            run = functools.partial(_record, model=view.model, anchors=t.anchors)
            part = run(view.diffusion, view.frozen, placed, jax.random.fold_in(key, i))
            part = sharding.to_host(part)
            kept = part.supervised.any(axis=1)
            parts.append(RecordedBlocks(*(x[kept] for x in part)))
            bar.update(int(kept.sum()))
            count += int(kept.sum())
            if count >= wanted:
                break
    if not count:
        raise UserError(f"{config.run}: no block of {t.block_size} tokens fits a row")
    return RecordedBlocks(*(np.concatenate(x)[:wanted] for x in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames=("model", "anchors"))
def _record(
    diffusion: Params, frozen: Params, rows: Rows, key: jax.Array, *, model: Model, anchors: int
) -> RecordedBlocks:
    """The blocks at `anchors` places of each row [B, L], as N = B * anchors blocks."""
    block = model.config.block_size
    blocks = sample_blocks(key, rows, anchors, block)
    student, _ = both_views(diffusion, frozen, model, rows, blocks)
    batch = student.shape[0]

    def likeliest(states: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_q = jax.nn.log_softmax(model.logits(frozen, states), axis=-1)
        tokens = top_ids(log_q, min(CANDIDATES, log_q.shape[-1]))
        return tokens, jnp.take_along_axis(log_q, tokens, axis=-1)

    # A block of each row at a time: logits of all would not fit.
    by_anchor = student.reshape(batch, anchors, block, -1).swapaxes(0, 1)
    guesses, log_q = jax.lax.map(likeliest, by_anchor)
    flat = lambda x: x.swapaxes(0, 1).reshape(batch * anchors, block, -1)
    place = blocks.anchors[..., None] + jnp.arange(block + 1)
    place = jnp.minimum(place, rows.tokens.shape[1] - 1).reshape(batch, -1)
    tokens = jnp.take_along_axis(rows.tokens, place, axis=1).reshape(-1, block + 1)
    supervised = blocks.supervised.reshape(-1, block)
    return RecordedBlocks(tokens, supervised, flat(guesses), flat(log_q))


def fit(
    recipe: Any, recorded: RecordedBlocks, sizes: ModelConfig, embedding: Array, seed: int
) -> tuple[Head, float]:
    """Minimise the cross-entropy by Adam, on one device.

    Args:
      recipe: the configuration's `head`.
      recorded: the blocks.
      sizes: the model's.
      embedding: [V, E], frozen.
      seed: of the first weights and the batches.

    Returns:
      The head, numpy float32, and the mean loss (nats per position) of the last tenth of the steps.
    """
    first, order = jax.random.split(jax.random.key(seed, impl=NOISE))
    head = pairwise.init(sizes, recipe.kind, recipe.rank, first)
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    optimizer = optax.adam(schedule)
    weight = jnp.exp(-jnp.arange(recorded.supervised.shape[1]) / recipe.gamma)

    def step(
        state: tuple[Head, Any], key: jax.Array, blocks: RecordedBlocks, table: jax.Array
    ) -> tuple[tuple[Head, Any], jax.Array]:
        head, moments = state
        index = jax.random.randint(key, (recipe.batch_size,), 0, len(blocks.tokens))
        batch = RecordedBlocks(*(x[index] for x in blocks))
        loss, gradient = jax.value_and_grad(cross_entropy)(head, batch, table, weight)
        updates, moments = optimizer.update(gradient, moments, head)
        return (optax.apply_updates(head, updates), moments), loss

    @jax.jit
    def run(head: Head, blocks: RecordedBlocks, table: jax.Array) -> tuple[Head, jax.Array]:
        keys = jax.random.split(order, recipe.steps)
        take = lambda state, key: step(state, key, blocks, table)
        (head, _), losses = jax.lax.scan(take, (head, optimizer.init(head)), keys)
        return head, losses[-max(1, recipe.steps // 10) :].mean()

    local = jax.local_devices()[0]
    arguments = jax.device_put((head, recorded, jnp.asarray(embedding)), local)
    head, loss = jax.device_get(run(*arguments))
    return head, float(loss)


def cross_entropy(
    head: Head, blocks: RecordedBlocks, embedding: jax.Array, weight: jax.Array
) -> jax.Array:
    """Mean -log p of the answer's token among the guesses, or of "none of them": float32[].

    Args:
      head: trained.
      blocks: a batch.
      embedding: [V, E], frozen.
      weight: float32[K], by position in the block.
    """
    previous, _ = pairwise.vectors(head, embedding, blocks.tokens[:, :-1])
    _, current = pairwise.vectors(head, embedding, blocks.guesses)
    pair = jnp.einsum("nkr,nkmr->nkm", previous, current)
    log_p, none = pairwise.log_probs(head, blocks.log_q, pair)
    right = blocks.guesses == blocks.tokens[:, 1:, None]
    own = jnp.where(right, log_p, 0.0).sum(axis=-1)
    loss = -jnp.where(right.any(axis=-1), own, none)
    on = weight * blocks.supervised
    return (on * loss).sum() / jnp.maximum(on.sum(), 1e-6)
