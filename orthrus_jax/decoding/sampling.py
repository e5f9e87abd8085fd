"""How a token is chosen: logits to a distribution, noise to a token, drafts to what is accepted.

Every choice is keyed by (seed, noise id, position, purpose), and by nothing else: a text depends
neither on its batch-mates nor on how its tokens fell into cycles. A position may be drafted
in several cycles before it is emitted, each time from the same noise; only the cycle that emits it
looks at the outcome, so the noise that counts is still used once.

Sources: speculative sampling, arXiv 2211.17192 and 2302.01318; nucleus, arXiv 1904.09751; min-p,
arXiv 2407.01082. The order of the filters is that of Hugging Face `generate`: temperature, top-k,
top-p, min-p.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
NOISE = "threefry2x32"  # named, so that no process's default changes a text


class AcceptRule(enum.StrEnum):
    """When a sampled draft is accepted.

    REJECTION accepts as often as possible (speculative sampling): AR's distribution, another text.
    COUPLED draws draft and target from one noise and accepts equals: AR's very text for the seed.
    """

    REJECTION = "rejection"
    COUPLED = "coupled"


class Filters(struct.PyTreeNode):
    """Per-row truncation: top_k int32[B], top_p float32[B], min_p float32[B]."""

    top_k: Array
    top_p: Array
    min_p: Array


class Sampler(struct.PyTreeNode):
    """Per-row sampling. A part that no row uses is None, and is then not compiled.

    Attributes:
      temperature: float32[B]; a row of 0 is greedy.
      seed: uint32[B].
      noise_id: uint32[B], tells apart rows that share a seed (the prompt and the sample's number).
      filters: or None.
    """

    temperature: Array
    seed: Array
    noise_id: Array
    filters: Filters | None = None


class NoiseKey(enum.IntEnum):
    """What a position's noise is for; each purpose has noise of its own."""

    TOKEN = 0  # the token itself: AR's draw, both draws of COUPLED, a rejected draft's replacement
    DRAFT = 1  # REJECTION's proposal
    ACCEPT = 2  # whether REJECTION accepts it


class Drafts(NamedTuple):
    """Proposed tokens int32[B, K-1] and, where the drafter drew them, their q [B, K-1, V].

    Without `probs` a proposal is of one point: the drafter's likeliest token, with certainty.
    """

    tokens: Array
    probs: Array | None = None


class Acceptance(NamedTuple):
    """What a verification came to: tokens[:, : accepted + 1] are emitted.

    tokens is int32[B, K], accepted int32[B].
    """

    tokens: Array
    accepted: Array


def greedy(logits: Array) -> Array:
    """Return the first index of the largest logit: int32[...] of logits [..., V].

    It is V, no token, where the largest is not finite: NaN or infinity among the logits, or none
    that is allowed. The host refuses V when it reads the tokens back.

    argmax in two plain reductions: the CPU compiler vectorises these, and not argmax's paired one.
    """
    vocab = logits.shape[-1]
    best = logits.max(axis=-1, keepdims=True)
    is_best = (logits == best) & jnp.isfinite(best)
    return jnp.where(is_best, jnp.arange(vocab, dtype=jnp.int32), vocab).min(axis=-1)


def probabilities(logits: Array, sampler: Sampler) -> Array:
    """Return the distribution the sampler draws from: float32[B, T, V] of logits [B, T, V].

    A row of temperature 0 is one-hot at its likeliest token.
    """
    temperature = sampler.temperature[:, None, None]
    probs = jax.nn.softmax(logits / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
    if sampler.filters is not None:
        probs = _truncate(probs, sampler.filters)
    one_hot = jax.nn.one_hot(greedy(logits), logits.shape[-1])
    return jnp.where(temperature > 0, probs, one_hot)


def gumbel_sample(probs: Array, sampler: Sampler, positions: Array, purpose: NoiseKey) -> Array:
    """Draw the token of each position with that position's noise (Gumbel-max).

    Args:
      probs: [B, T, V], not necessarily normalised.
      sampler: its seed and noise id key the noise.
      positions: int32[B, T], of the tokens drawn.
      purpose: which of the position's noises.

    Returns:
      int32[B, T].
    """
    return greedy(gumbel_scores(probs, sampler, positions, purpose))


def gumbel_scores(probs: Array, sampler: Sampler, positions: Array, purpose: NoiseKey) -> Array:
    """Log-probabilities and noise, [B, T, V]: the largest is `gumbel_sample`'s."""
    keys = _keys(sampler, positions, purpose)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, probs.shape[-1:])))(keys)
    return jnp.log(probs) + noise


def accept_equal(drafts: Array, predicted: Array) -> Acceptance:
    """Accept the longest prefix of drafts [B, K-1] that equals `predicted` [B, K].

    drafts    [7 3 9 4]
    predicted [7 3 5 8 2]  ->  2 drafts accepted; emitted 7 3 5, all three the AR view's own.
    """
    agree = (drafts == predicted[:, :-1]).astype(jnp.int32)
    return Acceptance(predicted, jnp.cumprod(agree, axis=1).sum(axis=1))


def accept_rejection(
    drafts: Drafts, target: Array, sampler: Sampler, positions: Array
) -> Acceptance:
    """Accept each draft x with probability min(1, p(x) / q(x)), up to the first rejected.

    The rejected one is replaced by a draw from max(p - q, 0); after a full acceptance the next
    token is drawn from p. The emitted tokens are then distributed as p, whatever q is.

    Args:
      drafts: tokens [B, K-1] and their q, or None for a one-point q.
      target: p, [B, K, V].
      sampler: keys of the noise.
      positions: int32[B, K], of the tokens to be emitted.
    """
    tokens, q = drafts
    p_token = jnp.take_along_axis(target[:, :-1], tokens[..., None], axis=-1)[..., 0]
    q_token = 1.0 if q is None else jnp.take_along_axis(q, tokens[..., None], axis=-1)[..., 0]
    keys = _keys(sampler, positions[:, :-1], NoiseKey.ACCEPT)
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    kept = (uniform * q_token < p_token).astype(jnp.int32)
    accepted = jnp.cumprod(kept, axis=1).sum(axis=1)

    # The first row not accepted: the part of p that q has not offered; after the last draft, all.
    p = _at(target, accepted)
    if q is None:
        rejected = _at(jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=-1), accepted)
        left = jnp.where(jnp.arange(p.shape[-1]) == rejected[..., None], 0.0, p)
    else:
        left = jnp.maximum(p - _at(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), accepted), 0.0)
    # Rounding may leave nothing where p and q are all but equal: then draw from p.
    left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, p)
    own = gumbel_sample(left, sampler, _at(positions, accepted), NoiseKey.TOKEN)
    index = jnp.arange(target.shape[1])
    padded = jnp.pad(tokens, ((0, 0), (0, 1)))
    return Acceptance(jnp.where(index < accepted[:, None], padded, own), accepted)


def log_prob(logits: Array, tokens: Array) -> Array:
    """Log-probability of `tokens` [B, T] under softmax(logits [B, T, V]): float32[B, T]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _truncate(probs: Array, filters: Filters) -> Array:
    """Apply top-k, top-p and min-p in turn, each to the rest that the one before left."""
    off = lambda x: x[:, None, None]
    k = jnp.where(filters.top_k > 0, filters.top_k, probs.shape[-1])
    probs = threshold_mask(probs, lambda kept: kept.sum(-1, keepdims=True) >= off(k))
    mass = off(filters.top_p) * probs.sum(-1, keepdims=True)
    enough = lambda kept: jnp.where(kept, probs, 0).sum(-1, keepdims=True) >= mass
    probs = jnp.where(off(filters.top_p) < 1, threshold_mask(probs, enough), probs)
    floor = off(filters.min_p) * probs.max(-1, keepdims=True)
    probs = jnp.where(probs >= floor, probs, 0)
    return probs / probs.sum(-1, keepdims=True)


def threshold_mask(probs: Array, enough: Any) -> Array:
    """Zero all but the fewest likeliest tokens that are `enough`, without sorting the vocabulary.

    Bisect on the bits of the least probability kept: floats that are not negative are ordered as
    their bits are, so 30 sums find the exact threshold. Tokens equal to it are all kept.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough at `low`, not at `high`
        middle = low + (high - low) // 2
        is_enough = enough(bits >= middle)
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    bits = jax.lax.bitcast_convert_type(probs.astype(jnp.float32), jnp.int32)
    low = jnp.zeros_like(bits[..., :1])
    high = jnp.full_like(low, 0x40000000)  # the bits of 2.0, more than any probability
    threshold, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return jnp.where(bits >= threshold, probs, 0)


def _keys(sampler: Sampler, positions: Array, purpose: NoiseKey) -> Array:
    """One key for each of positions [B, T]."""

    def key(seed: Array, noise_id: Array, position: Array) -> Array:
        row = jax.random.fold_in(jax.random.key(seed, impl=NOISE), noise_id)
        return jax.random.fold_in(jax.random.fold_in(row, position), purpose)

    by_position = jax.vmap(key, in_axes=(None, None, 0))
    return jax.vmap(by_position)(sampler.seed, sampler.noise_id, positions)


def _at(rows: Array, index: Array) -> Array:
    """rows [B, T, ...] -> [B, 1, ...] at index [B]."""
    return jnp.take_along_axis(rows, index.reshape(-1, *(1,) * (rows.ndim - 1)), axis=1)
