"""The reference of the audit: programs in which the AR view reads an emitted text again.

There are two. `one_row` is AR decoding itself: one token per forward, over a cache that only it
writes. `no_cache` reads prompt and text in one pass of many rows, so that a fault of the cache
which all decoding shares shows too. How far the two disagree on AR's own text is the noise floor:
no other shape of the same arithmetic does better, and none is demanded of Orthrus.

Near-ties. The gap of a token is the logits by which the AR view's argmax leads it. Rounding in
another shape moves each logit by about e * s, s the standard deviation of the row's logits (a
relative error of e in the last hidden state, whatever the scale of the model), and a gap by
sqrt(2) times that. In bfloat16 and float16 matmuls accumulate in float32 and each of the 2 L
additions to the residual stream is rounded once: e is about u * sqrt(2 L + 1), u half the dtype's
eps. Eight times that is allowed: 0.08 s for 3 layers of bfloat16, 0.24 s for 28, where the gap of
a wrong token is typically 0.4 to 4 s. In float32 the allowance is 1e-3 s, far above the CPU's
rounding (1e-5 s) and far below the gap that a fault leaves; accelerators multiply float32 in
shorter floats unless jax_default_matmul_precision is "highest", and are allowed their rounding.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from orthrus_jax import decoding
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import sampling
from orthrus_jax.decoding.sampling import NoiseKey, Sampler
from orthrus_jax.model import Model, ar_segment, block_segment

Array = jax.Array
POSITIONS = 16  # of a text read in one pass, whose logits exist at once; divides a bucket


def near_tie(config: ModelConfig) -> float:
    """The widest gap that rounding explains, in standard deviations of the row's logits."""
    multiplied = config.dtype
    settings: Any = jax.config
    precise = settings.jax_default_matmul_precision in ("highest", "float32")
    if config.dtype == "float32" and not precise:
        # The meaning of "default" on each; TF32 has float16's significand.
        multiplied = {"gpu": "float16", "tpu": "bfloat16"}.get(jax.default_backend(), "float32")
    unit = float(jnp.finfo(multiplied).eps) / 2
    return max(8 * unit * math.sqrt(2 * config.num_hidden_layers + 1), 1e-3)


class Texts(struct.PyTreeNode):
    """Texts to read again: row b's answer is its counts[b] tokens from index lengths[b] on.

    Attributes:
      rows: int32[B, P + N], prompt and answer without a gap, then anything.
      lengths: int32[B], tokens of each prompt, at most P.
      counts: int32[B], tokens of each answer, at most N.
      rivals: int32[B, N], another candidate for each of the answer's tokens.
      anchors: int32[B, N], the index in the row of the anchor each token was drafted from.
      sampler: the one they were drawn with, or None for greedy texts.
    """

    rows: Array
    lengths: Array
    counts: Array
    rivals: Array
    anchors: Array
    sampler: Sampler | None = None


class TokenCheck(NamedTuple):
    """The AR view's choice at each token: arrays [B, N], or [n] of one text.

    Attributes:
      best: int32, the token it takes.
      gap: float32, logits by which `best` leads the emitted token; 0 where they are equal.
      rival_gap: float32, logits by which the rival leads the emitted token; may be negative.
      spread: float32, the standard deviation of the logits.
    """

    best: Any
    gap: Any
    rival_gap: Any
    spread: Any


class TokenStats(NamedTuple):
    """Where each emitted token x falls in the AR view's p: float32 [B, N], or [n] of one text.

    Attributes:
      log_prob_residual: log p(x) - E[log p].
      log_prob_variance: the variance of log p under p.
      accept_prob: min(1, q(x) / p(x)), with which draft x is accepted, less its mean under p.
      accept_prob_variance: its variance under p.
      own: p(x).
      log_prob: of x without temperature.
      spread: the standard deviation of the logits.
      before: the mass of ids below x.
      likelier: the mass of tokens likelier than x (of equals, those of lower id).
    """

    log_prob_residual: Any
    log_prob_variance: Any
    accept_prob: Any
    accept_prob_variance: Any
    own: Any
    log_prob: Any
    spread: Any
    before: Any
    likelier: Any


def token_check(
    logits: Array, tokens: Array, rivals: Array, positions: Array, sampler: Sampler | None
) -> TokenCheck:
    """Compare `tokens` [B, T] with the AR view's choice from logits [B, T, V].

    Args:
      logits: float32[B, T, V], each of the row before its token.
      tokens, rivals: int32[B, T].
      positions: int32[B, T], of the tokens.
      sampler: its temperature times the positions' noise is added, as in a coupled draw.
    """
    scores = logits
    if sampler is not None:
        keys = sampling._keys(sampler, positions, NoiseKey.TOKEN)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
        scores = logits + sampler.temperature[:, None, None] * noise
    of = lambda x: jnp.take_along_axis(scores, x[..., None], axis=-1)[..., 0]
    return TokenCheck(
        best=sampling.greedy(scores),
        gap=scores.max(axis=-1) - of(tokens),
        rival_gap=of(rivals) - of(tokens),
        spread=logits.std(axis=-1),
    )


def token_stats(logits: Array, p: Array, q: Array, tokens: Array) -> TokenStats:
    """Place `tokens` in the AR view's distributions.

    Args:
      logits: float32[B, T, V], p's before temperature.
      p: float32[B, T, V], the AR view's probabilities.
      q: float32[B, T, V], the drafter's.
      tokens: int32[B, T].
    """
    own = jnp.take_along_axis(p, tokens[..., None], axis=-1)
    ids, x = jnp.arange(p.shape[-1]), tokens[..., None]
    mass = lambda where: jnp.where(where, p, 0).sum(axis=-1)

    def against_mean(f: Array) -> tuple[Array, Array]:
        mean = (p * f).sum(axis=-1, keepdims=True)
        at_x = jnp.take_along_axis(f - mean, x, axis=-1)[..., 0]
        return at_x, (p * (f - mean) ** 2).sum(axis=-1)

    possible = jnp.where(p > 0, p, 1.0)
    log_prob_residual, log_prob_variance = against_mean(jnp.log(possible))
    accept_prob, accept_prob_variance = against_mean(jnp.minimum(q / possible, 1.0))
    return TokenStats(
        log_prob_residual=log_prob_residual,
        log_prob_variance=log_prob_variance,
        accept_prob=accept_prob,
        accept_prob_variance=accept_prob_variance,
        own=own[..., 0],
        log_prob=sampling.log_prob(logits, tokens),
        spread=logits.std(axis=-1),
        before=mass(ids < x),
        likelier=mass((p > own) | ((p == own) & (ids < x))),
    )


@functools.partial(jax.jit, static_argnames=("model", "padded", "block"))
def one_row(
    model: Model,
    params: Any,
    texts: Texts,
    *,
    padded: int,
    block: int = 0,
) -> TokenCheck | TokenStats:
    """Read each text as AR decoding does, one row per forward.

    Args:
      model: static.
      params: of the model.
      texts: with prompts of up to `padded` (P) tokens.
      padded: static.
      block: static, rows of the drafts' blocks: the result is then TokenStats. With 0 it is a
        TokenCheck.

    Returns:
      Arrays [B, N]; entries after an answer's end mean nothing.
    """
    batch, total = texts.rows.shape
    state = decoding.prefill(
        model,
        params,
        texts.rows[:, :padded],
        texts.lengths,
        jnp.ones(batch, jnp.int32),
        jnp.full(1, -1, jnp.int32),
        slots=total,
        max_new_tokens=1,
    )
    token_at = lambda index: jnp.take_along_axis(texts.rows, index, axis=1)

    def read(t: Array, cache: Any) -> tuple[Any, Any]:
        # The prompt's last token is read a second time: the first token is checked like the rest.
        at = texts.lengths[:, None] - 1 + t
        (hidden,), cache = model.forward(params, [ar_segment(token_at(at), at[:, 0])], cache)
        logits = model.logits(params, hidden)
        target, of_step = token_at(at + 1), lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
        if not block:
            return token_check(logits, target, of_step(texts.rivals), at + 1, texts.sampler), cache
        anchor, mask = of_step(texts.anchors), model.config.mask_id
        segment = block_segment(token_at(anchor)[:, 0], anchor[:, 0], block, mask)
        (hidden,), _ = model.forward(params, [segment], cache)  # it sees the slots below its anchor
        guess = model.logits(params, jnp.take_along_axis(hidden, (at - anchor)[..., None], axis=1))
        assert texts.sampler is not None, "a greedy text has no distribution"
        p = sampling.probabilities(logits, texts.sampler)
        q = jax.nn.one_hot(sampling.greedy(guess), p.shape[-1])  # what the drafter proposes
        return token_stats(logits, p, q, target), cache

    def step(t: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        results, cache = carry
        new, cache = read(t, cache)
        put = lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, t, axis=1)
        return jax.tree.map(put, results, new), cache

    shapes, _ = jax.eval_shape(read, jnp.int32(0), state.cache)
    empty = jax.tree.map(lambda x: jnp.zeros((batch, total - padded), x.dtype), shapes)
    results, _ = jax.lax.fori_loop(0, texts.counts.max(), step, (empty, state.cache))
    return results


@functools.partial(jax.jit, static_argnames=("model", "padded"))
def no_cache(model: Model, params: Any, texts: Texts, *, padded: int) -> TokenCheck:
    """Do what `one_row` does, in one pass over prompt and text without a cache."""
    batch, total = texts.rows.shape
    zeros = jnp.zeros(batch, jnp.int32)
    (hidden,), _ = model.forward(params, [ar_segment(texts.rows, zeros)], None)
    at = texts.lengths[:, None] - 1 + jnp.arange(total - padded)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    targets = jnp.take_along_axis(texts.rows, at + 1, axis=1)

    def read(some: tuple[Array, ...]) -> Any:
        hidden, tokens, rivals, positions = (x.swapaxes(0, 1) for x in some)
        logits = model.logits(params, hidden)
        check = token_check(logits, tokens, rivals, positions, texts.sampler)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), check)

    # Logits of a few positions at a time: those of all would take N vocabularies of memory.
    parts = lambda x: x.swapaxes(0, 1).reshape(-1, POSITIONS, batch, *x.shape[2:])
    results = jax.lax.map(read, tuple(map(parts, (hidden, targets, texts.rivals, at + 1))))
    return jax.tree.map(lambda x: x.reshape(-1, batch).swapaxes(0, 1), results)
