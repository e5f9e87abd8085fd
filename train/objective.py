"""The objective of Orthrus: teach the diffusion view to guess what the frozen AR view will say.

On a clean row the AR view is the teacher. Anchors are drawn on its answers; from each, a block
[anchor, MASK, ...] runs through the diffusion view in the same forward, seeing the clean row below
its anchor and itself. Every block row is pulled towards the teacher's distribution of the same
token by forward KL, in float32.

Source: arXiv 2605.12825, training recipe. Nothing here knows of optimizers, files or steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthrus_jax.model import Model, Params, Segment, View
from orthrus_jax.params import merge
from train.data import Rows

Array = jax.Array


class Blocks(NamedTuple):
    """The diffusion blocks of a batch. A anchors a row, K rows a block.

    Attributes:
      anchors: int32[B, A], position of each block's first row.
      supervised: bool[B, A, K]: block row i stands at anchor + i, guesses the token after it, and
        is trained iff that token belongs to the same answer.
    """

    anchors: Array
    supervised: Array


class RowScores(NamedTuple):
    """How each block row stands to its teacher, float32[N]: KL(p || q), top-1 agreement, overlap.

    overlap = sum min(p, q) is the probability that sampling accepts the row's draft.
    """

    kl: Array
    agreement: Array
    overlap: Array


def sample_blocks(key: Array, rows: Rows, anchors: int, block: int) -> Blocks:
    """Draw anchors without replacement among answer tokens a with 1 <= a <= L - K.

    A row with too few candidates repeats one of them, or position 1, and trains nothing there.
    """
    length = rows.tokens.shape[1]
    position = jnp.arange(length)
    candidate = rows.answer & (position >= 1) & (position <= length - block)
    noise = jnp.where(candidate, jax.random.uniform(key, rows.answer.shape), -1.0)
    score, anchor = jax.lax.top_k(noise, anchors)
    valid = score >= 0
    anchor = jnp.where(valid, anchor, jnp.where(valid[:, :1], anchor[:, :1], 1))

    target = anchor[..., None] + jnp.arange(1, block + 1)  # [B, A, K]
    inside = target < length
    target = jnp.minimum(target, length - 1)
    same = _at(rows.start, target) == _at(rows.start, anchor)[..., None]
    supervised = valid[..., None] & inside & same & _at(rows.answer, target)
    return Blocks(anchor, supervised)


def distillation_loss(
    diffusion: Params, frozen: Params, model: Model, rows: Rows, key: Array, anchors: int
) -> tuple[Array, dict[str, Array]]:
    """Mean forward KL over supervised block rows; differentiate for `diffusion` alone.

    Args:
      diffusion, frozen: the two subtrees of the parameters.
      model: static.
      rows: packed batch, arrays [B, L].
      key: for the anchors.
      anchors: A, blocks a row.

    Returns:
      The loss, and metrics by position in the block, float32[K]: `kl`, `agreement` (the guess is
      the teacher's own), `overlap` (probability that sampling accepts it).
    """
    config = model.config
    blocks = sample_blocks(key, rows, anchors, config.block_size)
    student, teacher = both_views(diffusion, frozen, model, rows, blocks)
    source = blocks.anchors[..., None] + jnp.arange(config.block_size)  # same token, same position
    scores = kl_to_teacher(model, frozen, student, teacher, source.reshape(student.shape[:2]))
    by_block = RowScores(*(part.reshape(blocks.supervised.shape) for part in scores))
    count = blocks.supervised.sum(axis=(0, 1))
    by_position = {
        name: jnp.where(blocks.supervised, part, 0.0).sum(axis=(0, 1)) / jnp.maximum(count, 1)
        for name, part in by_block._asdict().items()
    }
    loss = jnp.where(blocks.supervised, by_block.kl, 0.0).sum() / jnp.maximum(count.sum(), 1)
    return loss, by_position


def both_views(
    diffusion: Params, frozen: Params, model: Model, rows: Rows, blocks: Blocks
) -> tuple[Array, Array]:
    """Run the clean rows (AR) and all blocks (diffusion) in one lockstep forward.

    Returns:
      student hidden states [B, A * K, E] and teacher hidden states [B, L, E].
    """
    config = model.config
    batch, length = rows.tokens.shape
    flat = lambda x: x.reshape(batch, -1)
    offset = jnp.arange(config.block_size)
    mask = config.mask_token_id
    assert mask is not None, "training needs config.mask_token_id"
    clean = Segment(
        rows.tokens,
        jnp.broadcast_to(jnp.arange(length), rows.tokens.shape),
        View.AR,
        start=rows.start,
    )
    anchor_token = _at(rows.tokens, blocks.anchors)[..., None]
    own_start = _at(rows.start, blocks.anchors)[..., None]
    masked = Segment(
        flat(jnp.where(offset == 0, anchor_token, mask)),
        flat(blocks.anchors[..., None] + offset),
        View.DIFFUSION,
        block=config.block_size,
        start=flat(jnp.broadcast_to(own_start, blocks.supervised.shape)),
    )
    (teacher, student), _ = model.forward(merge(frozen, diffusion), [clean, masked], None)
    return student, teacher


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kl_to_teacher(
    model: Model, frozen: Params, student: Array, teacher: Array, source: Array
) -> RowScores:
    """Score every student row [B, N, E] against the teacher row [B, L, E] at `source` [B, N].

    One batch row at a time: its L teacher rows are projected to the vocabulary once, however many
    blocks overlap there. The gradient (q - p for the logits) is taken in the same pass, so that no
    [rows, vocabulary] array outlives its batch row. It flows to `student` and from `kl` only.
    """
    return _scores_and_gradient(model, frozen, student, teacher, source)[0]


def _scores_and_gradient(
    model: Model, frozen: Params, student: Array, teacher: Array, source: Array
) -> tuple[RowScores, Array]:
    project = functools.partial(model.logits, frozen)

    def one_row(row: tuple[Array, Array, Array]) -> tuple[RowScores, Array]:
        student, teacher, source = row
        log_p = jax.nn.log_softmax(project(teacher))[source]
        logits, pull_back = jax.vjp(project, student)
        log_q = jax.nn.log_softmax(logits)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        scores = RowScores(
            kl=(p * (log_p - log_q)).sum(-1),
            agreement=(log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32),
            overlap=jnp.minimum(p, q).sum(-1),
        )
        return scores, pull_back(q - p)[0]

    return jax.lax.map(one_row, (student, teacher, source))


def _backward(model: Model, gradient: Array, cotangent: RowScores) -> tuple[Any, ...]:
    return None, gradient * cotangent.kl[..., None].astype(gradient.dtype), None, None


kl_to_teacher.defvjp(_scores_and_gradient, _backward)


def _at(values: Array, index: Array) -> Array:
    """values [B, L] at index [B, ...] -> [B, ...]."""
    batch = values.shape[0]
    return jnp.take_along_axis(values, index.reshape(batch, -1), axis=1).reshape(index.shape)
