"""Exact parallel decoding: prefill, the AR loop, and the draft-verify-accept loop of Orthrus.

Each loop is one `lax.while_loop` under one `jax.jit`. Rows of a batch own their position, accept
their own number of drafts a cycle and finish apart. How a token is chosen and a draft judged is
sampling.py. Nothing here knows of text, tokenizers or timing, nor of what lies behind `Model`: a
scripted model with the same methods drives every path.

Source: arXiv 2605.12825, sections on the shared cache and lossless verification.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.sampling import (
    Drafts,
    Proposal,
    Purpose,
    Rule,
    Sampler,
    Verdict,
    accept_equal,
    accept_rejection,
    draw,
    greedy,
    log_prob,
    probabilities,
)
from orthrus_jax.model import Segment, ar_segment, block_segment
from orthrus_jax.sharding import of_rows

Array = jax.Array
PREFILL_CHUNK = 512  # longer prompts are read in pieces of this many rows: memory stays bounded


class DecodingModel(Protocol):
    """What decoding asks of a model; `model.Model` is one. Instances are hashable and static."""

    @property
    def config(self) -> ModelConfig: ...

    def init_cache(self, batch: int, slots: int) -> Any: ...

    def forward(
        self, params: Any, segments: list[Segment], cache: Any
    ) -> tuple[list[Array], Any]: ...

    def logits(self, params: Any, hidden: Array) -> Array: ...


class DecodeState(struct.PyTreeNode):
    """Everything a loop carries. N is the most tokens any row of this state can emit.

    Attributes:
      tokens: int32[B, N], the emitted tokens; entries from `count` on mean nothing.
      count: int32[B], tokens emitted.
      budget: int32[B], tokens this row may emit in all.
      anchor: int32[B], the last emitted token, whose keys and values are not in the cache yet.
      position: int32[B], the anchor's position, which is also the number of live cache slots.
      done: bool[B], the row has emitted an end token or spent its budget.
      cycles: int32[B], draft-verify pairs (or AR steps) the row took part in.
      accepted: int32[B, N], drafts accepted and emitted in each cycle; -1 where there was none.
      eos: int32[B, E], the ids that end each row; -1 is none.
      cache: the shared cache.
      sampler: how tokens are drawn, or None for greedy decoding.
      min_tokens: int32[B], no end token before so many tokens; or None.
      logprobs: float32[B, N], log p of each emitted token under the AR view; or None.
      ahead: the next draft, where a forward drafts for the one after it (ahead.py); or None.

    What is None is not compiled.
    """

    tokens: Array
    count: Array
    budget: Array
    anchor: Array
    position: Array
    done: Array
    cycles: Array
    accepted: Array
    eos: Array
    cache: Any
    sampler: Sampler | None = None
    min_tokens: Array | None = None
    logprobs: Array | None = None
    ahead: Any = None


def shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Where each array of a state lies on a mesh: its rows shared out, and its cache's heads."""
    rest = jax.tree.map(lambda x: of_rows(x.shape, mesh), state.replace(cache=None))
    return rest.replace(cache=state.cache.shardings())


def capacity(slots: int, reach: int) -> int:
    """Return how many tokens, prompt and answer, a row of `slots` can hold.

    A row on its last anchor still writes `reach` slots behind it.
    """
    return slots - reach


@partial(
    jax.jit,
    static_argnames=("model", "slots", "max_new_tokens", "logprobs", "reach"),
    donate_argnames=("cache",),
)
def prefill(
    model: DecodingModel,
    params: Any,
    prompts: Array,
    lengths: Array,
    budget: Array,
    eos: Array,
    *,
    slots: int,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    min_tokens: Array | None = None,
    logprobs: bool = False,
    reach: int | None = None,
    cache: Any = None,
    start: Array | None = None,
) -> DecodeState:
    """Read the prompts with the AR view and emit each row's first token, the first anchor.

    Args:
      model: static.
      params: both views' parameters.
      prompts: int32[B, P], padded on the right with anything; P <= slots.
      lengths: int32[B], tokens of each prompt, at least 1.
      budget: int32[B], tokens each row may emit; cut to what the cache can hold. A row of budget 0
        (a filler) is done at once.
      eos: int32[B, E] or int32[E] for all rows, the ids that end a row (-1 for none); they are
        emitted.
      slots: cache slots a row, static.
      max_new_tokens: N, the width of the output, static.
      sampler, min_tokens, logprobs: see DecodeState.
      reach: slots that a cycle writes behind its anchor, static; None is a block's, K - 1.
      cache: continue with this one, of `slots` slots, donated; None is a new one.
      start: int32[B], with a cache: its live slots. The prompts are then what follows, and
        start + P <= slots.
    """
    batch, padded = prompts.shape
    if padded > slots:
        raise ValueError(f"a prompt padded to {padded} rows does not fit {slots} cache slots")
    last, cache = _read(
        model,
        params,
        prompts,
        lengths,
        model.init_cache(batch, slots) if start is None else cache,
        start,
    )
    total = lengths if start is None else start + lengths
    reach = model.config.block_size - 1 if reach is None else reach
    room = jnp.minimum(capacity(slots, reach) - total, max_new_tokens)
    zeros = jnp.zeros(batch, jnp.int32)
    state = DecodeState(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        count=zeros,
        budget=jnp.minimum(budget, room),
        anchor=zeros,
        position=total - 1,
        done=jnp.minimum(budget, room) <= 0,
        cycles=zeros,
        accepted=jnp.full((batch, max_new_tokens), -1, jnp.int32),
        eos=jnp.broadcast_to(eos, (batch, eos.shape[-1])),
        cache=cache,
        sampler=sampler,
        min_tokens=min_tokens,
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32) if logprobs else None,
    )
    logits = model.logits(params, last)
    return emit(state, choose(state, logits), zeros, logits)


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


def choose(state: DecodeState, logits: Array, depth: Array | None = None) -> Array:
    """The tokens AR decoding takes from logits [B, T, V] behind the anchor: int32[B, T].

    `depth` int32[B, T] is how far behind the anchor each row lies; None is 0, 1, 2, ...
    """
    logits = forbid_early_end(state, logits, depth)
    if state.sampler is None:
        return greedy(logits)
    probs = probabilities(logits, state.sampler)
    return draw(probs, state.sampler, next_positions(state, logits, depth), Purpose.TOKEN)


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


def count_cycle(state: DecodeState, active: Array, kept: Array) -> DecodeState:
    """Note a cycle of the rows `active` [B], in which `kept` [B] drafts were emitted."""
    now = jnp.arange(state.accepted.shape[1]) == state.cycles[:, None]
    return state.replace(
        cycles=state.cycles + active,
        accepted=jnp.where(now & active[:, None], kept[:, None], state.accepted),
    )


def emit(state: DecodeState, tokens: Array, accepted: Array, logits: Array) -> DecodeState:
    """Append tokens[:, : accepted + 1] to each row, cut after an end token and at the budget.

    Rollback is here and is free: only as many slots become live as tokens were emitted.

    Args:
      state: before.
      tokens: int32[B, T].
      accepted: int32[B].
      logits: [B, T, V] that the tokens were chosen from.
    """
    index = jnp.arange(tokens.shape[1])
    is_end = (tokens[..., None] == state.eos[:, None]).any(-1)
    after_end = jnp.cumsum(is_end, axis=1) - is_end > 0
    room = jnp.minimum(accepted + 1, state.budget - state.count)
    emitted = ((index < room[:, None]) & ~after_end & ~state.done[:, None]).sum(1, dtype=jnp.int32)

    offset = jnp.arange(state.tokens.shape[1]) - state.count[:, None]
    source = jnp.clip(offset, 0, tokens.shape[1] - 1)
    fresh = (offset >= 0) & (offset < emitted[:, None])
    append = lambda new, old: jnp.where(fresh, jnp.take_along_axis(new, source, axis=1), old)
    count = state.count + emitted
    last = jnp.maximum(emitted - 1, 0)[:, None]
    ended = jnp.take_along_axis(is_end, last, axis=1)[:, 0] & (emitted > 0)
    newest = jnp.take_along_axis(tokens, last, axis=1)[:, 0]
    if state.logprobs is not None:
        state = state.replace(logprobs=append(log_prob(logits, tokens), state.logprobs))
    return state.replace(
        tokens=append(tokens, state.tokens),
        count=count,
        anchor=jnp.where(emitted > 0, newest, state.anchor),
        position=state.position + emitted,
        done=state.done | ended | (count >= state.budget),
    )


@partial(jax.jit, donate_argnames=("state",))
def stop(state: DecodeState, rows: Array) -> DecodeState:
    """Mark rows bool[B] done, as a stop string found in their text asks. `state` is donated."""
    return state.replace(done=state.done | rows)


@partial(jax.jit, donate_argnames=("state",))
def insert(state: DecodeState, row: DecodeState, at: Array) -> DecodeState:
    """Put a freshly prefilled batch of one in place of row `at` int32[]. `state` is donated.

    Both have the same slots, N, E and optional parts.
    """
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new[0], at, axis=0)
    cache = state.cache.insert(row.cache, at)
    rest = jax.tree.map(put, state.replace(cache=None), row.replace(cache=None))
    return rest.replace(cache=cache)


def _read(
    model: DecodingModel,
    params: Any,
    tokens: Array,
    lengths: Array,
    cache: Any,
    start: Array | None,
) -> tuple[Array, Any]:
    """Write tokens [B, P] to the cache; return the hidden state [B, 1, E] of each row's last."""
    padded = tokens.shape[1]
    # Only a new cache's live slots are known, when compiling, to end with the prompt.
    span = padded if start is None else None
    start = jnp.zeros_like(lengths) if start is None else start
    if padded <= PREFILL_CHUNK:
        (hidden,), cache = model.forward(params, [ar_segment(tokens, start, span=span)], cache)
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1), cache

    def chunk(i: Array | int, cache: Any) -> tuple[Array, Array, Any]:
        # The last chunk is moved back to end with the prompts: what it reads twice it writes alike.
        first = jnp.minimum(i * PREFILL_CHUNK, padded - PREFILL_CHUNK)
        rows = jax.lax.dynamic_slice_in_dim(tokens, first, PREFILL_CHUNK, axis=1)
        (hidden,), cache = model.forward(params, [ar_segment(rows, start + first)], cache)
        index = lengths - 1 - first
        here = (index >= 0) & (index < PREFILL_CHUNK)
        index = jnp.clip(index, 0, PREFILL_CHUNK - 1)[:, None, None]
        return jnp.take_along_axis(hidden, index, axis=1), here[:, None, None], cache

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        last, cache = carry
        hidden, here, cache = chunk(i, cache)
        return jnp.where(here, hidden, last), cache

    last, _, cache = chunk(0, cache)
    chunks = (lengths.max() + PREFILL_CHUNK - 1) // PREFILL_CHUNK
    return jax.lax.fori_loop(1, chunks, step, (last, cache))


def next_positions(state: DecodeState, rows: Array, depth: Array | None = None) -> Array:
    """Positions int32[B, T] of the tokens behind rows [B, T, ...], `depth` behind the anchor."""
    depth = jnp.arange(rows.shape[1]) if depth is None else depth
    return state.position[:, None] + 1 + depth


def forbid_early_end(state: DecodeState, logits: Array, depth: Array | None = None) -> Array:
    """Forbid end tokens where fewer than min_tokens would stand before them."""
    if state.min_tokens is None:
        return logits
    depth = jnp.arange(logits.shape[1]) if depth is None else depth
    early = state.count[:, None] + depth < state.min_tokens[:, None]
    is_end = (jnp.arange(logits.shape[-1]) == state.eos[..., None]).any(axis=1)
    return jnp.where(early[..., None] & is_end[:, None], -jnp.inf, logits)


def until_done(
    step: Callable[[DecodeState], DecodeState],
    state: DecodeState,
    cycles: Array | None,
    leave: Array | None,
) -> DecodeState:
    """Repeat `step` until at most `leave` rows are not done, or `cycles` times."""

    def going(carry: tuple[DecodeState, Array]) -> Array:
        state, taken = carry
        more = (~state.done).sum() > (0 if leave is None else leave)
        return more if cycles is None else more & (taken < cycles)

    advance = lambda carry: (step(carry[0]), carry[1] + 1)
    state, _ = jax.lax.while_loop(going, advance, (state, jnp.int32(0)))
    return state
