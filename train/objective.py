"""The objective of Orthrus: train the diffusion view to predict the frozen AR view's distribution.

On a clean row the AR view is the teacher. Anchors are drawn among its answer tokens. From each, a
block [anchor, MASK, ...] runs through the diffusion view in the same forward; it sees the clean
tokens before its anchor, and itself. The loss of every block token is the forward KL from the
teacher's distribution of the same next token, in float32.

Source: arXiv 2605.12825, training recipe. Knows no optimizer, no files and no steps.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, Params, Segment, View
from orthrus_jax.model.params import merge
from train.data import Rows
from train.divergence import Divergence, RowScores, head_of, score_against_teacher

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss to minimise; the defaults are the paper's.

    Attributes:
      anchors: A, blocks per packed row.
      divergence: from the teacher's distribution to the student's.
      gamma: weigh block position i by exp(-i / gamma), because a draft is accepted only if all
        before it are. None weighs all positions equally.
    """

    anchors: int = 256
    divergence: Divergence = Divergence.KL
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.anchors < 1:
            raise UserError(f"anchors={self.anchors} must be at least 1")
        if self.gamma is not None and not self.gamma > 0:
            raise UserError(f"gamma={self.gamma} must be above 0, or None for no weights")

    def weights(self, block: int) -> Array:
        """float32[K], by position in the block."""
        position = jnp.arange(block, dtype=jnp.float32)
        return jnp.ones(block) if self.gamma is None else jnp.exp(-position / self.gamma)


def objective_of(t: Any) -> Objective:
    """Read the objective of a configuration's `train`.

    Raises:
      UserError: for an unknown divergence or a value out of range.
    """
    names = [divergence.value for divergence in Divergence]
    divergence = Divergence(check_choice("train.divergence", t.divergence, names))
    return Objective(t.anchors, divergence, t.gamma or None)


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return a configuration's value if it is one of `choices`.

    Raises:
      UserError: otherwise, naming the choices.
    """
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}")
    return value


class Blocks(NamedTuple):
    """The diffusion blocks of a batch: A anchors per packed row, K tokens per block.

    Attributes:
      anchors: int32[B, A], position of each block's first token, ascending.
      supervised: bool[B, A, K]: block token i has position anchor + i, predicts the token after it,
        and is trained iff that token and all between it and the anchor belong to the anchor's own
        answer: never beyond a user's turn, nor in the next conversation.
    """

    anchors: Array
    supervised: Array


class LossSums(NamedTuple):
    """Sums over the supervised block tokens of a batch; batches add up, `means` divides.

    Attributes:
      weight: float32[], total weight.
      blocks: float32[], blocks with at least one supervised token.
      rows: float32[K], supervised tokens by position in the block.
      kl, agreement, accept_prob: float32[K], sums of the fields of RowScores.
      prefix_agreement: float32[K], blocks whose tokens up to this position all equal the teacher's
        greedy tokens: greedy decoding from these anchors would accept them.
    """

    weight: Array
    blocks: Array
    rows: Array
    kl: Array
    agreement: Array
    accept_prob: Array
    prefix_agreement: Array

    def means(self) -> dict[str, Array]:
        """Means by position in the block, and the mean number of drafts accepted per block."""
        by_position = {
            name: total / jnp.maximum(self.rows, 1)
            for name, total in (
                ("kl", self.kl),
                ("agreement", self.agreement),
                ("overlap", self.accept_prob),  # the logs' name
            )
        }
        accepted = self.prefix_agreement[:-1].sum() / jnp.maximum(
            self.blocks, 1
        )  # the last token is no draft
        return by_position | {"expected_acceptance": accepted}


def sample_blocks(key: Array, rows: Rows, anchors: int, block: int) -> Blocks:
    """Draw anchors without replacement among answer tokens a with 1 <= a <= L - K.

    A packed row with too few candidates repeats one of them, or position 1, without supervision
    there. The anchors of a row depend only on the key and the row's index in the batch.
    """
    batch, length = rows.tokens.shape
    position = jnp.arange(length)
    candidate = rows.answer & (position >= 1) & (position <= length - block)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    score, anchor = jax.lax.top_k(jnp.where(candidate, noise, -1.0), anchors)
    valid = score >= 0
    anchor = jnp.where(valid, anchor, jnp.where(valid[:, :1], anchor[:, :1], 1))
    # Sorted, so that the blocks of an attention tile see nearly the same slots.
    order = jnp.argsort(anchor, axis=1)
    anchor, valid = (jnp.take_along_axis(x, order, axis=1) for x in (anchor, valid))

    target = anchor[..., None] + jnp.arange(1, block + 1)  # [B, A, K]
    inside = target < length
    target = jnp.minimum(target, length - 1)
    stretch = _stretches(rows)
    same = _at(stretch, target) == _at(stretch, anchor)[..., None]
    supervised = valid[..., None] & inside & same & _at(rows.answer, target)
    return Blocks(anchor, supervised)


def _stretches(rows: Rows) -> Array:
    """Number the stretches of a row: one answer, or one prompt, of one document; int32[B, L].

    Without document masks a prompt, which is never empty, still parts two answers.
    """
    differs = lambda part: part[:, 1:] != part[:, :-1]
    begins = differs(rows.answer) | differs(rows.start)
    return jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def distillation_loss(
    diffusion: Params,
    frozen: Params,
    model: Model,
    rows: Rows,
    blocks: Blocks,
    objective: Objective,
) -> tuple[Array, LossSums]:
    """Sum the divergence over supervised block tokens; differentiate for `diffusion` alone.

    A step minimises the mean: this sum over `LossSums.weight`.

    Args:
      diffusion, frozen: the two subtrees of the parameters, stacked or not.
      model: static.
      rows: packed batch, arrays [B, L].
      blocks: from `sample_blocks`.
      objective: static.

    Returns:
      The weighted sum float32[], and the sums behind the logged metrics.
    """
    block = model.config.block_size
    student, teacher = both_views(diffusion, frozen, model, rows, blocks)
    source = blocks.anchors[..., None] + jnp.arange(block)  # same token, same position
    scores = score_against_teacher(
        model,
        objective.divergence,
        head_of(frozen),
        student,
        teacher,
        source.reshape(student.shape[:2]),
    )
    on = blocks.supervised
    scores = RowScores(*(part.reshape(on.shape) for part in scores))
    weight = objective.weights(block) * on
    agreeing = jnp.cumprod(jnp.where(on, scores.agreement, 0.0), axis=-1)
    by_position = lambda part: jnp.where(on, part, 0.0).sum(axis=(0, 1))
    sums = LossSums(
        weight=weight.sum(),
        blocks=on.any(-1).sum(dtype=jnp.float32),
        rows=on.sum(axis=(0, 1), dtype=jnp.float32),
        kl=by_position(scores.kl),
        agreement=by_position(scores.agreement),
        accept_prob=by_position(scores.accept_prob),
        prefix_agreement=agreeing.sum(axis=(0, 1)),
    )
    return (weight * jnp.where(on, scores.loss, 0.0)).sum(), sums


def both_views(
    diffusion: Params, frozen: Params, model: Model, rows: Rows, blocks: Blocks
) -> tuple[Array, Array]:
    """Run the clean rows (AR view) and all blocks (diffusion view) in one forward.

    Returns:
      student hidden states [B, A * K, E] and teacher hidden states [B, L, E].
    """
    config = model.config
    batch, length = rows.tokens.shape
    flat = lambda x: x.reshape(batch, -1)
    offset = jnp.arange(config.block_size)
    clean = Segment(
        rows.tokens,
        jnp.broadcast_to(jnp.arange(length), rows.tokens.shape),
        View.AR,
        start=rows.start,
    )
    anchor_token = _at(rows.tokens, blocks.anchors)[..., None]
    own_start = _at(rows.start, blocks.anchors)[..., None]
    masked = Segment(
        flat(jnp.where(offset == 0, anchor_token, config.mask_id)),
        flat(blocks.anchors[..., None] + offset),
        View.DIFFUSION,
        block=config.block_size,
        start=flat(jnp.broadcast_to(own_start, blocks.supervised.shape)),
    )
    (teacher, student), _ = model.forward(merge(frozen, diffusion), [clean, masked], None)
    return student, teacher


def _at(values: Array, index: Array) -> Array:
    """Gather values [B, L] at index [B, ...] -> [B, ...]."""
    batch = values.shape[0]
    return jnp.take_along_axis(values, index.reshape(batch, -1), axis=1).reshape(index.shape)
