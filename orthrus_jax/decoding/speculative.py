"""Exact parallel decoding: the AR loop, and the draft-verify-accept loop with any drafter.

One cycle of `speculative_decode`, for a sequence whose last emitted token is the anchor:

  1. the drafter proposes K - 1 tokens after the anchor,
  2. the AR view reads [anchor, drafts] in one causal forward: `verify`,
  3. the longest prefix it agrees with is accepted: `verify_drafts`,
  4. these tokens and the AR view's own next one are emitted: `accept`.

Each loop is one `lax.while_loop` under one `jax.jit`. How a token is chosen is sampling.py; what a
loop carries is state.py. Source: arXiv 2605.12825, sections on the shared cache and lossless
verification.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.decoding.sampling import (
    Acceptance,
    AcceptRule,
    Drafts,
    accept_equal,
    accept_rejection,
    probabilities,
)
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    Drafter,
    choose,
    emit,
    mask_eos_until_min_tokens,
    next_positions,
    record_cycle,
    until_done,
)
from orthrus_jax.model.segment import ar_segment

Array = jax.Array


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def ar_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    max_cycles: Array | None = None,
    min_active: Array | None = None,
) -> DecodeState:
    """Decode one token per forward, the baseline, until every sequence is done.

    `state` is donated. `max_cycles` and `min_active` pause the loop: see `speculative_decode`.
    """

    def step(state: DecodeState) -> DecodeState:
        none = Drafts(jnp.zeros((state.anchor.shape[0], 0), jnp.int32))
        logits, cache, _ = verify(model, params, state, none)
        state = state.replace(cache=cache)
        return accept(state, accept_equal(none.tokens, choose(state, logits)), logits)[0]

    return until_done(step, state, max_cycles, min_active, reach=1)


@partial(jax.jit, static_argnames=("model", "drafter", "rule"), donate_argnames=("state",))
def speculative_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    drafter: Drafter,
    rule: AcceptRule = AcceptRule.REJECTION,
    max_cycles: Array | None = None,
    min_active: Array | None = None,
) -> DecodeState:
    """Draft, verify, accept, until every sequence is done.

    Greedy, and under AcceptRule.COUPLED, the text is `ar_decode`'s; under AcceptRule.REJECTION it
    is distributed alike, whatever the drafter proposes.

    Args:
      model: static.
      params: of the base and the drafter.
      state: donated; its prefill's `lookahead` is at least the drafter's.
      drafter: static.
      rule: static; matters only with a sampler.
      max_cycles: int32[], return after so many cycles even if sequences are unfinished; None is no
        limit.
      min_active: int32[], return once at most so many sequences are unfinished; None is 0.
    """

    def cycle(state: DecodeState) -> DecodeState:
        drafts, carry = drafter.propose(params, state)
        logits, cache, taps = verify(model, params, state, drafts, drafter.taps)
        verdict = verify_drafts(state, drafts, logits, rule)
        state = state.replace(cache=cache, drafter=carry)
        state, accepted = accept(state, verdict, logits)
        return state.replace(drafter=drafter.observe(params, state, taps, accepted))

    return until_done(cycle, state, max_cycles, min_active, reach=drafter.lookahead + 1)


def verify(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    drafts: Drafts,
    taps: tuple[int, ...] = (),
) -> tuple[Array, Any, Any]:
    """Run [anchor, drafts] through the AR view in one causal pass.

    Returns:
      The AR view's logits [B, K, V] for the token after each of these rows; the cache with their
      keys and values written after the live slots; and their hidden states at the layers `taps`.
    """
    tokens = jnp.concatenate([state.anchor[:, None], drafts.tokens], axis=1)
    rows = ar_segment(tokens, state.position)
    tapped: Any = ()
    if taps:
        (hidden,), cache, tapped = model.forward(params, [rows], state.cache, taps)
    else:
        (hidden,), cache = model.forward(params, [rows], state.cache)
    return model.logits(params, hidden), cache, tapped


def verify_drafts(
    state: DecodeState, drafts: Drafts, logits: Array, rule: AcceptRule
) -> Acceptance:
    """How many drafts are accepted, and the AR view's own token after them."""
    if state.sampler is None or rule == AcceptRule.COUPLED:
        return accept_equal(drafts.tokens, choose(state, logits))
    target = probabilities(mask_eos_until_min_tokens(state, logits), state.sampler)
    return accept_rejection(drafts, target, state.sampler, next_positions(state, logits))


def accept(state: DecodeState, verdict: Acceptance, logits: Array) -> tuple[DecodeState, Array]:
    """Emit the accepted tokens and record the cycle; return how many drafts were emitted, [B]."""
    active, count = ~state.done, state.count
    state = emit(state, verdict.tokens, verdict.accepted, logits)
    kept = jnp.minimum(verdict.accepted, state.count - count)
    return record_cycle(state, active, kept), kept
