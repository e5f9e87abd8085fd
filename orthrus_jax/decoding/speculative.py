"""Exact parallel decoding: the AR loop, and the draft-verify-accept loop of Orthrus.

Each loop is one `lax.while_loop` under one `jax.jit`. How a token is chosen and a draft judged is
sampling.py; what a loop carries is state.py.

Source: arXiv 2605.12825, sections on the shared cache and lossless verification.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.decoding.sampling import (
    Drafts,
    Proposal,
    Purpose,
    Rule,
    Verdict,
    accept_equal,
    accept_rejection,
    draw,
    greedy,
    probabilities,
)
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    choose,
    count_cycle,
    emit,
    forbid_early_end,
    next_positions,
    until_done,
)
from orthrus_jax.model.segment import ar_segment, block_segment

Array = jax.Array


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def ar_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    cycles: Array | None = None,
    leave: Array | None = None,
) -> DecodeState:
    """Decode one token a forward, the baseline, until every row is done. `state` is donated.

    `cycles` and `leave` pause the loop: see `orthrus_decode`.
    """

    def step(state: DecodeState) -> DecodeState:
        none = Drafts(jnp.zeros((state.anchor.shape[0], 0), jnp.int32))
        logits, cache = verify(model, params, state, none)
        return accept(
            state.replace(cache=cache), accept_equal(none.tokens, choose(state, logits)), logits
        )

    return until_done(step, state, cycles, leave)


@partial(
    jax.jit,
    static_argnames=("model", "block_size", "rule", "proposal"),
    donate_argnames=("state",),
)
def orthrus_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    block_size: int | None = None,
    rule: Rule = Rule.REJECTION,
    proposal: Proposal = Proposal.ARGMAX,
    cycles: Array | None = None,
    leave: Array | None = None,
) -> DecodeState:
    """Decode with two forwards a cycle, draft and verify, until every row is done.

    Greedy, and under Rule.COUPLED, it emits what `ar_decode` emits; under Rule.REJECTION what it
    emits is distributed alike.

    Args:
      model: static.
      params: both views' parameters.
      state: donated.
      block_size: rows of a block, static; None is the trained K (config.block_size). Every value
        from 2 to K is exact.
      rule, proposal: static; see sampling.py. They matter only with a sampler.
      cycles: int32[], return after so many cycles even if rows are left; None is no limit.
      leave: int32[], return as soon as no more than so many rows are left; None is 0.
    """
    block_size = block_size or model.config.block_size
    if not 2 <= block_size <= model.config.block_size:
        raise ValueError(f"block_size={block_size} must be from 2 to {model.config.block_size}")

    def cycle(state: DecodeState) -> DecodeState:
        drafts = draft(model, params, state, block_size, rule, proposal)
        logits, cache = verify(model, params, state, drafts)
        return accept(state.replace(cache=cache), judge(state, drafts, logits, rule), logits)

    return until_done(cycle, state, cycles, leave)


def draft(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    block_size: int,
    rule: Rule = Rule.REJECTION,
    proposal: Proposal = Proposal.ARGMAX,
) -> Drafts:
    """Guess the block_size - 1 tokens after the anchor in one diffusion pass."""
    mask = model.config.mask_token_id
    assert mask is not None, "drafting needs config.mask_token_id"
    block = block_segment(state.anchor, state.position, block_size, mask)
    (hidden,), _ = model.forward(params, [block], state.cache)
    # Row j guesses the token after its own position, so the last row's guess is one too many.
    logits = model.logits(params, hidden[:, :-1])
    if state.sampler is None or rule is Rule.COUPLED:
        return Drafts(choose(state, logits))
    logits = forbid_early_end(state, logits)
    if proposal is Proposal.ARGMAX:
        return Drafts(greedy(logits))
    q = probabilities(logits, state.sampler)
    return Drafts(draw(q, state.sampler, next_positions(state, q), Purpose.DRAFT), q)


def verify(
    model: DecodingModel, params: Any, state: DecodeState, drafts: Drafts
) -> tuple[Array, Any]:
    """Run [anchor, drafts] through the AR view in one causal pass.

    Returns:
      The AR view's logits [B, K, V] for the token after each of these rows, and the cache with
      their keys and values written behind the live slots.
    """
    tokens = jnp.concatenate([state.anchor[:, None], drafts.tokens], axis=1)
    rows = ar_segment(tokens, state.position)
    (hidden,), cache = model.forward(params, [rows], state.cache)
    return model.logits(params, hidden), cache


def judge(state: DecodeState, drafts: Drafts, logits: Array, rule: Rule) -> Verdict:
    """How many drafts stand, and the AR view's own token behind them."""
    if state.sampler is None or rule is Rule.COUPLED:
        return accept_equal(drafts.tokens, choose(state, logits))
    target = probabilities(forbid_early_end(state, logits), state.sampler)
    return accept_rejection(drafts, target, state.sampler, next_positions(state, logits))


def accept(state: DecodeState, verdict: Verdict, logits: Array) -> DecodeState:
    """Emit what the verdict accepts, and count the cycle."""
    active, count = ~state.done, state.count
    state = emit(state, verdict.tokens, verdict.accepted, logits)
    return count_cycle(state, active, jnp.minimum(verdict.accepted, state.count - count))
