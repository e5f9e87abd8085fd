"""The state every decoding loop carries, and what a loop does to it: choose, emit, stop, insert.

Each sequence of a batch has its own position, accepts its own number of drafts per cycle and
finishes apart.
Nothing here knows of text, tokenizers or timing, nor of what lies below `DecodingModel`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from orthrus_jax.attention.quantised import QuantisedCache
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.sampling import (
    Drafts,
    NoiseKey,
    Sampler,
    greedy,
    gumbel_sample,
    log_prob,
    probabilities,
)
from orthrus_jax.model.segment import Segment
from orthrus_jax.sharding import batch_sharding

Array = jax.Array


class DecodingModel(Protocol):
    """What decoding asks of a model; `model.Model` is one. Instances are hashable and static."""

    @property
    def config(self) -> ModelConfig: ...

    def init_cache(self, batch: int, slots: int) -> Any: ...

    def forward(
        self, params: Any, segments: list[Segment], cache: Any, taps: tuple[int, ...] = ()
    ) -> Any: ...

    def logits(self, params: Any, hidden: Array) -> Array: ...

    def pair_vectors(self, params: Any, tokens: Array, positions: Array) -> tuple[Array, Array]:
        """The pairwise head's vectors of tokens; positions broadcast against tokens [B, ...]."""


class Drafter(Protocol):
    """Who proposes drafts to `speculative_decode`. Instances are hashable and static.

    A drafter only proposes: whatever it says, the emitted text is the AR view's own. One that is
    wrong is only slow.
    """

    @property
    def lookahead(self) -> int:
        """Drafts per cycle: slots that a verification writes after the anchor's."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the base whose hidden states `observe` reads; () for none."""

    def init(self, batch: int, slots: int) -> Any:
        """The carry before the first cycle, DecodeState.drafter: arrays [B, ...], or None."""

    def propose(self, params: Any, state: "DecodeState") -> tuple[Drafts, Any]:
        """Guess the `lookahead` tokens after the anchor; return them and the new carry."""

    def observe(self, params: Any, state: "DecodeState", taps: Any, accepted: Array) -> Any:
        """The carry after a verification.

        Args:
          params: of the base and the drafter.
          state: after the accepted tokens were emitted; `state.drafter` is `propose`'s carry.
          taps: per tapped layer, the verified rows' hidden states [B, K, E]; () without taps.
          accepted: int32[B], drafts accepted.
        """


class DecodeState(struct.PyTreeNode):
    """Everything a loop carries. N is the most tokens any sequence of this state can emit.

    Attributes:
      tokens: int32[B, N], the emitted tokens; entries from `count` on are undefined.
      count: int32[B], tokens emitted.
      budget: int32[B], tokens the sequence may emit in all.
      anchor: int32[B], the last emitted token, whose keys and values are not in the cache yet.
      position: int32[B], the anchor's position, which is also the number of live cache slots.
      done: bool[B], the sequence has emitted an end token or spent its budget.
      cycles: int32[B], draft-verify pairs (or AR steps) it took part in.
      accepted: int32[B, N], drafts accepted and emitted in each cycle; -1 where there was none.
      eos: int32[B, E], the ids that end each sequence; -1 is none.
      cache: the shared cache.
      sampler: how tokens are drawn, or None for greedy decoding.
      min_tokens: int32[B], no end token before so many tokens; or None.
      logprobs: float32[B, N], log p of each emitted token under the AR view; or None.
      drafter: what the drafter carries from cycle to cycle: the next draft where a forward drafts
        while it verifies (overlapped.py), a `Drafter`'s own carry; or None.

    A field that is None is not compiled.
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
    drafter: Any = None


def shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """The sharding of each array of a state: sequences shared out, and the heads of its cache."""
    rest = jax.tree.map(lambda x: batch_sharding(x.shape, mesh), state.replace(cache=None))
    return rest.replace(cache=state.cache.shardings())


def choose(state: DecodeState, logits: Array, depth: Array | None = None) -> Array:
    """The tokens AR decoding takes from logits [B, T, V] from the anchor on: int32[B, T].

    `depth` int32[B, T] is the distance of each row from the anchor; None is 0, 1, 2, ...
    """
    logits = mask_eos_until_min_tokens(state, logits, depth)
    if state.sampler is None:
        return greedy(logits)
    probs = probabilities(logits, state.sampler)
    positions = next_positions(state, logits, depth)
    return gumbel_sample(probs, state.sampler, positions, NoiseKey.TOKEN)


def emit(state: DecodeState, tokens: Array, accepted: Array, logits: Array) -> DecodeState:
    """Append tokens[:, : accepted + 1] to each sequence, cut after an end token and at the budget.

    Rollback happens here and is free: as many slots become live as tokens were emitted.

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
    position = state.position + emitted
    return state.replace(
        tokens=append(tokens, state.tokens),
        count=count,
        anchor=jnp.where(emitted > 0, newest, state.anchor),
        position=position,
        cache=state.cache.commit(position),
        done=state.done | ended | (count >= state.budget),
    )


def record_cycle(state: DecodeState, active: Array, kept: Array) -> DecodeState:
    """Record a cycle of the sequences `active` [B], in which `kept` [B] drafts were emitted."""
    now = jnp.arange(state.accepted.shape[1]) == state.cycles[:, None]
    return state.replace(
        cycles=state.cycles + active,
        accepted=jnp.where(now & active[:, None], kept[:, None], state.accepted),
    )


def next_positions(state: DecodeState, rows: Array, depth: Array | None = None) -> Array:
    """Positions int32[B, T] of the tokens after rows [B, T, ...], `depth` from the anchor."""
    depth = jnp.arange(rows.shape[1]) if depth is None else depth
    return state.position[:, None] + 1 + depth


def mask_eos_until_min_tokens(
    state: DecodeState, logits: Array, depth: Array | None = None
) -> Array:
    """Mask end tokens where fewer than min_tokens would come before them."""
    if state.min_tokens is None:
        return logits
    depth = jnp.arange(logits.shape[1]) if depth is None else depth
    early = state.count[:, None] + depth < state.min_tokens[:, None]
    is_end = (jnp.arange(logits.shape[-1]) == state.eos[..., None]).any(axis=1)
    return jnp.where(early[..., None] & is_end[:, None], -jnp.inf, logits)


@partial(jax.jit, donate_argnames=("state",))
def stop(state: DecodeState, rows: Array) -> DecodeState:
    """Mark sequences `rows` bool[B] done, as after a stop string. `state` is donated."""
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


@jax.jit
def extract(cache: Any, at: Array) -> Any:
    """A copy of the cache of row `at` int32[], as a batch of one."""
    return cache.extract(at)


def until_done(
    step: Callable[[DecodeState], DecodeState],
    state: DecodeState,
    max_cycles: Array | None,
    min_active: Array | None,
    reach: int,
) -> DecodeState:
    """Repeat `step` until at most `min_active` sequences are unfinished, or `max_cycles` times.

    A step writes slots of `reach` positions, the anchor's included, and reads no further. A
    quantised cache is encoded between steps, in a loop around theirs, when one could read a tile
    that is not there.
    """

    def going(carry: tuple[DecodeState, Array]) -> Array:
        state, taken = carry
        more = (~state.done).sum() > (0 if min_active is None else min_active)
        return more if max_cycles is None else more & (taken < max_cycles)

    advance = lambda carry: (step(carry[0]), carry[1] + 1)
    if not isinstance(state.cache, QuantisedCache):
        state, _ = jax.lax.while_loop(going, advance, (state, jnp.int32(0)))
        return state

    def while_ready(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        ready = lambda carry: going(carry) & carry[0].cache.ready(reach)
        return jax.lax.while_loop(ready, advance, (settled(carry[0], reach), carry[1]))

    state, _ = jax.lax.while_loop(going, while_ready, (state, jnp.int32(0)))
    return state


def settled(state: DecodeState, reach: int) -> DecodeState:
    """The state, its cache ready for a cycle over `reach` positions, the anchor's included."""
    if not isinstance(state.cache, QuantisedCache):
        return state
    return state.replace(cache=state.cache.settle(reach))
