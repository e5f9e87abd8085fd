"""Exact parallel decoding: prefill, the AR loop, and the draft-verify-accept loop of Orthrus.

Each loop is one `lax.while_loop` under one `jax.jit`. Rows of a batch own their position, accept
their own number of drafts a cycle and finish apart. Nothing here knows of text, tokenizers or
timing, nor of what lies behind `Model`: a scripted model with the same methods drives every path.

Source: arXiv 2605.12825, sections on the shared cache and lossless verification.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Segment, ar_segment, block_segment

Array = jax.Array


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
      done: bool[B], the row has emitted an EOS or spent its budget.
      cycles: int32[B], draft-verify pairs (or AR steps) the row took part in.
      accepted: int32[B, N], drafts accepted and emitted in each cycle; -1 where there was none.
      cache: the shared cache.
    """

    tokens: Array
    count: Array
    budget: Array
    anchor: Array
    position: Array
    done: Array
    cycles: Array
    accepted: Array
    cache: Any


def capacity(slots: int, block_size: int) -> int:
    """Return how many tokens, prompt and answer, a row of `slots` can hold.

    A row on its last anchor still writes a whole block behind it.
    """
    return slots - (block_size - 1)


@partial(jax.jit, static_argnames=("model", "slots", "max_new_tokens"))
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
) -> DecodeState:
    """Read the prompts with the AR view and emit each row's first token, the first anchor.

    Args:
      model: static.
      params: both views' parameters.
      prompts: int32[B, P], padded on the right with anything; P <= slots.
      lengths: int32[B], tokens of each prompt, at least 1.
      budget: int32[B], tokens each row may emit; cut to what the cache can hold. A row of budget 0
        (a filler) is done at once.
      eos: int32[E], the ids that end a row; they are emitted.
      slots: cache slots a row, static.
      max_new_tokens: N, the width of the output, static.
    """
    batch, padded = prompts.shape
    if padded > slots:
        raise ValueError(f"a prompt padded to {padded} rows does not fit {slots} cache slots")
    rows = ar_segment(prompts, jnp.zeros_like(lengths), span=padded)
    (hidden,), cache = model.forward(params, [rows], model.init_cache(batch, slots))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = _greedy(model.logits(params, last))
    room = jnp.minimum(capacity(slots, model.config.block_size) - lengths, max_new_tokens)
    zeros = jnp.zeros(batch, jnp.int32)
    state = DecodeState(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        count=zeros,
        budget=jnp.minimum(budget, room),
        anchor=zeros,
        position=lengths - 1,
        done=jnp.minimum(budget, room) <= 0,
        cycles=zeros,
        accepted=jnp.full((batch, max_new_tokens), -1, jnp.int32),
        cache=cache,
    )
    return emit(state, first, zeros, eos)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def ar_decode(model: DecodingModel, params: Any, state: DecodeState, eos: Array) -> DecodeState:
    """Decode one token a forward, the baseline, until every row is done. `state` is donated."""

    def step(state: DecodeState) -> DecodeState:
        no_drafts = jnp.zeros((state.anchor.shape[0], 0), jnp.int32)
        predicted, cache = verify(model, params, state, no_drafts)
        return accept(state.replace(cache=cache), no_drafts, predicted, eos)

    return _until_done(step, state)


@partial(jax.jit, static_argnames=("model", "block_size"), donate_argnames=("state",))
def orthrus_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    eos: Array,
    *,
    block_size: int | None = None,
) -> DecodeState:
    """Decode with two forwards a cycle, draft and verify, until every row is done.

    Emits what `ar_decode` emits. `state` is donated. `block_size` may be smaller than the trained K
    (config.block_size, the default); every value from 2 is exact.
    """
    block_size = block_size or model.config.block_size
    if not 2 <= block_size <= model.config.block_size:
        raise ValueError(f"block_size={block_size} must be from 2 to {model.config.block_size}")

    def cycle(state: DecodeState) -> DecodeState:
        drafts = draft(model, params, state, block_size)
        predicted, cache = verify(model, params, state, drafts)
        return accept(state.replace(cache=cache), drafts, predicted, eos)

    return _until_done(cycle, state)


def draft(model: DecodingModel, params: Any, state: DecodeState, block_size: int) -> Array:
    """Guess the block_size - 1 tokens after the anchor in one diffusion pass: int32[B, K - 1]."""
    mask = model.config.mask_token_id
    assert mask is not None, "drafting needs config.mask_token_id"
    block = block_segment(state.anchor, state.position, block_size, mask)
    (hidden,), _ = model.forward(params, [block], state.cache)
    # Row j guesses the token after its own position, so the last row's guess is one too many.
    return _greedy(model.logits(params, hidden[:, :-1]))


def verify(
    model: DecodingModel, params: Any, state: DecodeState, drafts: Array
) -> tuple[Array, Any]:
    """Run [anchor, drafts] through the AR view in one causal pass.

    Returns:
      int32[B, K], the AR view's own next token after each of these rows, and the cache with their
      keys and values written behind the live slots.
    """
    tokens = jnp.concatenate([state.anchor[:, None], drafts], axis=1)
    rows = ar_segment(tokens, state.position)
    (hidden,), cache = model.forward(params, [rows], state.cache)
    return _greedy(model.logits(params, hidden)), cache


def accept(state: DecodeState, drafts: Array, predicted: Array, eos: Array) -> DecodeState:
    """Emit the longest prefix of drafts [B, K-1] that equals `predicted` [B, K], plus one AR token.

    drafts    [7 3 9 4]
    predicted [7 3 5 8 2]  ->  2 drafts accepted; emitted 7 3 5, all three the AR view's own.
    """
    agree = (drafts == predicted[:, :-1]).astype(jnp.int32)
    accepted = jnp.cumprod(agree, axis=1).sum(axis=1)
    active = ~state.done
    count = state.count
    state = emit(state, predicted, accepted, eos)
    kept = jnp.minimum(accepted, state.count - count)
    now = jnp.arange(state.accepted.shape[1]) == state.cycles[:, None]
    return state.replace(
        cycles=state.cycles + active,
        accepted=jnp.where(now & active[:, None], kept[:, None], state.accepted),
    )


def emit(state: DecodeState, predicted: Array, accepted: Array, eos: Array) -> DecodeState:
    """Append predicted[:, : accepted + 1] to each row, cut after an EOS and at the budget.

    Rollback is here and is free: only as many slots become live as tokens were emitted.
    """
    index = jnp.arange(predicted.shape[1])
    is_eos = (predicted[..., None] == eos).any(-1)
    after_eos = jnp.cumsum(is_eos, axis=1) - is_eos > 0
    room = jnp.minimum(accepted + 1, state.budget - state.count)
    emitted = ((index < room[:, None]) & ~after_eos & ~state.done[:, None]).sum(1, dtype=jnp.int32)

    offset = jnp.arange(state.tokens.shape[1]) - state.count[:, None]
    source = jnp.clip(offset, 0, predicted.shape[1] - 1)
    fresh = (offset >= 0) & (offset < emitted[:, None])
    count = state.count + emitted
    last = jnp.maximum(emitted - 1, 0)[:, None]
    ended = jnp.take_along_axis(is_eos, last, axis=1)[:, 0] & (emitted > 0)
    return state.replace(
        tokens=jnp.where(fresh, jnp.take_along_axis(predicted, source, axis=1), state.tokens),
        count=count,
        anchor=jnp.where(
            emitted > 0, jnp.take_along_axis(predicted, last, axis=1)[:, 0], state.anchor
        ),
        position=state.position + emitted,
        done=state.done | ended | (count >= state.budget),
    )


def _greedy(logits: Array) -> Array:
    """Return the first index of the largest logit: int32[...] of logits [..., V].

    argmax in two plain reductions: the CPU compiler vectorises these, and not argmax's paired one.
    """
    vocab = logits.shape[-1]
    is_best = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(is_best, jnp.arange(vocab, dtype=jnp.int32), vocab).min(axis=-1)


def _until_done(step: Callable[[DecodeState], DecodeState], state: DecodeState) -> DecodeState:
    return jax.lax.while_loop(lambda state: ~state.done.all(), step, state)
