"""Guesses: the drafter's likeliest tokens, and their odds given the token before each.

Decides which M tokens per position may be proposed, and reads no logits after that: a pairwise head
scores these M alone. Knows no cycle; which guesses become drafts is tree.py's.
"""

from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.decoding import tree as trees
from orthrus_jax.decoding.sampling import (
    NoiseKey,
    greedy,
    gumbel_scores,
    probabilities,
)
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    mask_eos_until_min_tokens,
    next_positions,
)
from orthrus_jax.decoding.tree import TopK
from orthrus_jax.model import pairwise

Array = jax.Array


def guess(state: DecodeState, logits: Array, count: int, draft_temperature: float) -> TopK:
    """The `count` likeliest tokens per position after the anchor, from the view's logits [B, D, V].

    `draft_temperature` is Strategy's: it changes their probabilities, not their order.
    """
    scores = logits
    if state.sampler is not None:
        temperature = state.sampler.temperature[:, None, None]
        scores = mask_eos_until_min_tokens(state, logits)
        scores = scores / jnp.where(temperature > 0, temperature, 1.0)
    tokens = top_ids(scores, count)
    scaled = scores / draft_temperature
    mass = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    return TopK(tokens, jnp.exp(jnp.take_along_axis(scaled, tokens, axis=-1) - mass))


def given_previous(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    guesses: TopK,
    draft_temperature: float = 1.0,
) -> TopK:
    """The guesses with their odds given the token before, by the pairwise head.

    Args:
      model: static.
      params: with the head's, under `pairwise.HEAD`.
      state: its anchor comes before the first guess.
      guesses: probs [B, D, M].
      draft_temperature: that of `guess`.

    Returns:
      The same tokens, probs [B, D, M, M]: of each guess given each guess of the position before;
      at the first position given the anchor, M times the same. 0 where no guess is known.
    """
    batch, _, count = guesses.tokens.shape
    positions = next_positions(state, guesses.tokens)
    previous, current = model.pair_vectors(params, guesses.tokens, positions[..., None])
    anchor = model.pair_vectors(params, state.anchor[:, None], state.position[:, None])[0]
    first = jnp.broadcast_to(anchor[:, None], (batch, 1, count, anchor.shape[-1]))
    before = jnp.concatenate([first, previous[:, :-1]], axis=1)
    pair = jnp.einsum("bdpr,bdcr->bdpc", before, current) / draft_temperature
    if state.sampler is not None:
        temperature = state.sampler.temperature[:, None, None, None]
        pair = pair / jnp.where(temperature > 0, temperature, 1.0)
    least = jnp.finfo(jnp.float32).tiny
    log_q = jnp.log(jnp.maximum(guesses.probs, least))[:, :, None]
    log_p, _ = pairwise.log_probs(params[pairwise.HEAD], log_q, pair)
    return TopK(guesses.tokens, jnp.where(guesses.probs[:, :, None] > 0, jnp.exp(log_p), 0.0))


def pairwise_chain(
    model: DecodingModel, params: Any, state: DecodeState, logits: Array, count: int
) -> Array:
    """One draft per position, greedily given the one before: int32[B, D] of logits [B, D, V].

    `count` is M, the candidates per position.
    """
    guesses = guess(state, logits, count, 1.0)
    odds = given_previous(model, params, state, guesses).probs
    return trees.chosen(guesses.tokens, trees.follow(odds))


def coupled_chain(
    model: DecodingModel, params: Any, state: DecodeState, logits: Array, count: int
) -> Array:
    """Likewise, each drawn with the noise of its position, as the AR view's own token is.

    The candidates are those that the noise favours; a row of temperature 0 has no noise.
    """
    assert state.sampler is not None
    logits = mask_eos_until_min_tokens(state, logits)
    drawn = state.sampler.temperature[:, None, None] > 0
    probs = jnp.where(drawn, probabilities(logits, state.sampler), jax.nn.softmax(logits, axis=-1))
    positions = next_positions(state, logits)
    noisy = gumbel_scores(probs, state.sampler, positions, NoiseKey.TOKEN)
    tokens = top_ids(jnp.where(drawn, noisy, jnp.log(probs)), count)
    at = lambda scores: jnp.take_along_axis(scores, tokens, axis=-1)
    guesses = TopK(tokens, at(probs))
    possible = guesses.probs > 0
    noise = jnp.where(drawn & possible, at(noisy) - jnp.log(guesses.probs), 0.0)
    odds = given_previous(model, params, state, guesses).probs
    return trees.chosen(tokens, trees.follow(jnp.log(odds) + noise[:, :, None]))


def top_ids(scores: Array, count: int) -> Array:
    """The ids of the `count` highest scores [..., V], highest first.

    On a TPU, where top_k sorts the whole vocabulary, all but the highest may be missed one time in
    twenty (arXiv 2206.14286): guesses only propose.
    """
    if count == 1:
        return greedy(scores)[..., None]
    least = jnp.finfo(scores.dtype).min  # among nothing but -inf it would name none: -1
    return jax.lax.platform_dependent(
        scores,
        tpu=lambda x: jax.lax.approx_max_k(jnp.maximum(x, least), count)[1],
        default=lambda x: jax.lax.top_k(x, count)[1],
    )
