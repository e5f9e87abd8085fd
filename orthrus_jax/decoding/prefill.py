"""Prefill: read prompts into the cache with the AR view, and emit each sequence's first token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.attention.quantised import QuantisedCache
from orthrus_jax.decoding.sampling import Sampler
from orthrus_jax.decoding.state import DecodeState, DecodingModel, choose, emit
from orthrus_jax.model.segment import ar_segment

Array = jax.Array
PREFILL_CHUNK = 512  # rows per forward for longer prompts, which bounds the memory


def capacity(slots: int, lookahead: int) -> int:
    """Return how many tokens, prompt and answer, a sequence of `slots` can hold.

    A sequence at its last anchor still writes `lookahead` slots after it.
    """
    return slots - lookahead


@partial(
    jax.jit,
    static_argnames=("model", "slots", "max_new_tokens", "logprobs", "lookahead"),
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
    lookahead: int | None = None,
    cache: Any = None,
    start: Array | None = None,
) -> DecodeState:
    """Read the prompts with the AR view and emit each sequence's first token, the first anchor.

    Args:
      model: static.
      params: both views' parameters.
      prompts: int32[B, P], padded on the right with anything; P <= slots.
      lengths: int32[B], tokens of each prompt, at least 1.
      budget: int32[B], tokens each may emit; cut to what the cache can hold. One of budget 0
        (a filler) is done at once.
      eos: int32[B, E] or int32[E] for all rows, the ids that end a row (-1 for none); they are
        emitted.
      slots: cache slots per sequence, static.
      max_new_tokens: N, the width of the output, static.
      sampler, min_tokens, logprobs: see DecodeState.
      lookahead: slots that a cycle writes after its anchor, static; None is a block's, K - 1.
      cache: continue with this one, of `slots` slots, donated; None is a new one.
      start: int32[B], with a cache: its live slots. The prompts are then what follows, and
        start + P <= slots. Of a quantised cache `start` must be resumable.
    """
    batch, padded = prompts.shape
    if padded > slots:
        raise ValueError(f"a prompt padded to {padded} rows does not fit {slots} cache slots")
    cache = model.init_cache(batch, slots) if start is None else cache
    read = _prefill_in_passes if isinstance(cache, QuantisedCache) else _prefill_cache
    last, cache = read(model, params, prompts, lengths, cache, start)
    total = lengths if start is None else start + lengths
    lookahead = model.config.block_size - 1 if lookahead is None else lookahead
    room = jnp.minimum(capacity(slots, lookahead) - total, max_new_tokens)
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


def _prefill_cache(
    model: DecodingModel,
    params: Any,
    tokens: Array,
    lengths: Array,
    cache: Any,
    start: Array | None,
) -> tuple[Array, Any]:
    """Write tokens [B, P] to the cache; return the hidden state [B, 1, E] of each row's last."""
    padded = tokens.shape[1]
    # Of a new cache alone it is known, when compiling, that live slots end with the prompt.
    max_kv_len = padded if start is None else None
    start = jnp.zeros_like(lengths) if start is None else start
    if padded <= PREFILL_CHUNK:
        (hidden,), cache = model.forward(
            params, [ar_segment(tokens, start, max_kv_len=max_kv_len)], cache
        )
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1), cache

    def chunk(i: Array | int, cache: Any) -> tuple[Array, Array, Any]:
        # The last chunk is moved back to end with the prompts: slots read twice are written alike.
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


def _prefill_in_passes(
    model: DecodingModel,
    params: Any,
    tokens: Array,
    lengths: Array,
    cache: QuantisedCache,
    start: Array | None,
) -> tuple[Array, QuantisedCache]:
    """`_prefill_cache` with a quantised cache: each pass as short as a verification may be.

    So a prompt is read as decoding would read it, whatever pieces it comes in, and tiles are
    encoded between passes. A sequence that has ended writes stale slots after its last one.
    """
    rows = min(tokens.shape[1], cache.config.longest_pass, cache.config.tile)
    begin = jnp.zeros_like(lengths) if start is None else start
    cache = cache.resume(begin)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % rows)))

    def one_pass(i: Array | int, cache: QuantisedCache) -> tuple[Array, Array, QuantisedCache]:
        part = jax.lax.dynamic_slice_in_dim(tokens, i * rows, rows, axis=1)
        first = begin + jnp.minimum(i * rows, lengths)
        (hidden,), cache = model.forward(params, [ar_segment(part, first)], cache.settle(rows))
        index = lengths - 1 - i * rows
        here = (index >= 0) & (index < rows)
        last = jnp.take_along_axis(hidden, jnp.clip(index, 0, rows - 1)[:, None, None], axis=1)
        end = begin + jnp.minimum((i + 1) * rows, lengths)
        return last, here[:, None, None], cache.commit(end)

    def step(i: Array, carry: tuple[Array, QuantisedCache]) -> tuple[Array, QuantisedCache]:
        hidden, here, cache = one_pass(i, carry[1])
        return jnp.where(here, hidden, carry[0]), cache

    last, _, cache = one_pass(0, cache)
    return jax.lax.fori_loop(1, -(-lengths.max() // rows), step, (last, cache))
