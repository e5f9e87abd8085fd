"""Divergence of the diffusion view from its teacher, without a [tokens, vocabulary] array.

Block tokens are scored tile by tile, and the gradient for the student's hidden states is computed
in the same pass: the residuals of the backward pass are as wide as the model, not the vocabulary.
Blocks overlap, so a clean position is the teacher of several block tokens; it is projected once.
"""

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from orthrus_jax.model import Model, Params
from orthrus_jax.sharding import BATCH, TENSOR, param_spec

Array = jax.Array
TEACHER_TILE = 512  # clean positions projected at once
STUDENT_TILE = 512  # block tokens projected at once


class Divergence(enum.Enum):
    """The loss between the teacher's distribution p and the student's q.

    KL is sum p log(p / q), the paper's. TV is sum |p - q| / 2: sampling accepts the draft with
    probability 1 - TV. CE is -log q at the teacher's likeliest token, the one that greedy decoding
    accepts.
    """

    KL = "kl"
    TV = "tv"
    CE = "ce"


class RowScores(NamedTuple):
    """Each block token against its teacher, float32[..., N].

    Attributes:
      loss: the divergence to minimise; the only field with a gradient.
      kl: KL(p || q), in nats.
      agreement: 1 where both views' likeliest token is the same, else 0.
      accept_prob: sum min(p, q), the probability that sampling accepts the draft.
    """

    loss: Array
    kl: Array
    agreement: Array
    accept_prob: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def score_against_teacher(
    model: Model,
    divergence: Divergence,
    head: Params,
    student: Array,
    teacher: Array,
    source: Array,
) -> RowScores:
    """Score every student token [B, N, E] against the teacher at the same position.

    Args:
      model: static.
      divergence: static.
      head: the parameters that `model.logits` reads, see `head_of`.
      student: [B, N, E], final-normed; the only input with a gradient.
      teacher: [B, L, E], final-normed.
      source: int32[B, N], each student token's teacher position.
    """
    return _score_all(model, divergence, head, student, teacher, source)[0]


def head_of(frozen: Params) -> Params:
    """The part of the frozen tree that maps hidden states to logits."""
    name = "lm_head" if "lm_head" in frozen else "embed_tokens"
    return {name: frozen[name]}


def _score_all(
    model: Model,
    divergence: Divergence,
    head: Params,
    student: Array,
    teacher: Array,
    source: Array,
) -> tuple[RowScores, Array]:
    """Scores [B, N], and the gradient of `loss` for the student's hidden states [B, N, E]."""
    mesh = model.mesh
    if mesh is None:
        score = functools.partial(_score_row, model, _Vocabulary(None, 0), divergence, head)
        return jax.lax.map(lambda row: score(*row), (student, teacher, source))

    # Each device scores its own rows, over its own part of the vocabulary.
    part = model.config.vocab_size // mesh.shape[TENSOR]
    local = Model(dataclasses.replace(model.config, vocab_size=part, mask_token_id=None))

    def on_device(head: Params, *rows: Array) -> tuple[RowScores, Array]:
        vocabulary = _Vocabulary(TENSOR, jax.lax.axis_index(TENSOR) * part)
        score = functools.partial(_score_row, local, vocabulary, divergence, head)
        return jax.lax.map(lambda row: score(*row), rows)

    def shard(path: Any, leaf: Array) -> P:  # not sharded along the model width
        return P(*(a if a == TENSOR else None for a in param_spec(path, leaf.shape, mesh)))

    shards = jax.tree_util.tree_map_with_path(shard, head)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(shards, P(BATCH), P(BATCH), P(BATCH)),
        out_specs=P(BATCH),
        check_vma=False,
    )(head, student, teacher, source)


def _backward(
    model: Model, divergence: Divergence, gradient: Array, cotangent: RowScores
) -> tuple[Any, ...]:
    scaled = gradient * cotangent.loss[..., None].astype(gradient.dtype)
    return None, scaled, None, None


score_against_teacher.defvjp(_score_all, _backward)


class _Vocabulary(NamedTuple):
    """Reductions over a vocabulary that may be sharded over a mesh axis."""

    axis: str | None
    first: Array | int  # this part's first token

    def sum(self, x: Array) -> Array:
        x = x.sum(-1, keepdims=True)
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def max(self, x: Array) -> Array:
        x = x.max(-1, keepdims=True)
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def argmax(self, x: Array) -> Array:
        """The first token with the largest value."""
        token = self.tokens(x)
        best = jnp.where(x == self.max(x), token, jnp.iinfo(jnp.int32).max)
        best = best.min(-1, keepdims=True)
        return best if self.axis is None else jax.lax.pmin(best, self.axis)

    def tokens(self, x: Array) -> Array:
        return self.first + jnp.arange(x.shape[-1], dtype=jnp.int32)

    def log_softmax(self, x: Array) -> Array:
        x = x - self.max(x)
        return x - jnp.log(self.sum(jnp.exp(x)))


def _score_row(
    model: Model,
    vocabulary: _Vocabulary,
    divergence: Divergence,
    head: Params,
    student: Array,
    teacher: Array,
    source: Array,
) -> tuple[RowScores, Array]:
    """Score one batch row: student [N, E], teacher [L, E], source [N].

    Students are sorted by teacher position. A tile of teachers is projected, then its students in
    tiles of their own. The last of these may reach into the next teacher tile's students; that
    tile overwrites what is written there.
    """
    rows, positions = student.shape[0], teacher.shape[0]
    tile, window = min(STUDENT_TILE, rows), min(TEACHER_TILE, positions)
    windows = -(-positions // window)
    order = jnp.argsort(source)
    pad = lambda x: jnp.pad(x[order], ((0, tile),) + ((0, 0),) * (x.ndim - 1))
    students, sources = pad(student), pad(source)
    begins = jnp.searchsorted(sources[:rows], jnp.arange(windows + 1) * window)
    begins = begins.at[-1].set(rows)

    def over_teachers(j: Array, carry: tuple[RowScores, Array]) -> tuple[RowScores, Array]:
        first = jnp.minimum(j * window, positions - window)
        rows_of = jax.lax.dynamic_slice_in_dim(teacher, first, window)
        log_p = vocabulary.log_softmax(model.logits(head, rows_of))

        def over_students(i: Array, carry: tuple[RowScores, Array]) -> tuple[RowScores, Array]:
            at = begins[j] + i * tile
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, tile)
            own = jnp.clip(cut(sources) - first, 0, window - 1)
            logits, pull_back = jax.vjp(functools.partial(model.logits, head), cut(students))
            scores, d_logits = _compare(vocabulary, divergence, log_p[own], logits)
            gradient = pull_back(d_logits)[0]
            if vocabulary.axis is not None:
                gradient = jax.lax.psum(gradient, vocabulary.axis)
            put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=0)
            return jax.tree.map(put, carry, (scores, gradient))

        tiles = (begins[j + 1] - begins[j] + tile - 1) // tile
        return jax.lax.fori_loop(0, tiles, over_students, carry)

    zeros = jnp.zeros(rows + tile)
    results = jax.lax.fori_loop(
        0, windows, over_teachers, (RowScores(*[zeros] * 4), jnp.zeros_like(students))
    )
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: x[:rows][back], results)


def _compare(
    vocabulary: _Vocabulary, divergence: Divergence, log_p: Array, logits: Array
) -> tuple[RowScores, Array]:
    """Scores [n] of logits [n, V] against log p [n, V], and the loss's gradient for the logits."""
    log_q = vocabulary.log_softmax(logits)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    best = vocabulary.argmax(log_p)
    kl = vocabulary.sum(p * (log_p - log_q))
    accept_prob = vocabulary.sum(jnp.minimum(p, q))
    if divergence is Divergence.KL:
        loss, gradient = kl, q - p
    elif divergence is Divergence.CE:
        is_best = (vocabulary.tokens(q) == best).astype(q.dtype)
        loss, gradient = -vocabulary.sum(is_best * log_q), q - is_best
    else:
        side = jnp.sign(q - p) / 2
        loss, gradient = 1 - accept_prob, q * (side - vocabulary.sum(q * side))
    agreement = (best == vocabulary.argmax(log_q)).astype(jnp.float32)
    return RowScores(*(x[:, 0] for x in (loss, kl, agreement, accept_prob))), gradient
