"""One forward a cycle: the next block is drafted while this one is verified.

The paper's cycle is two forwards, draft and verify. But segments move through the layers together,
and a diffusion block reads keys that AR rows wrote in the same layer: so a forward that verifies
[anchor, d_1 ... d_K-1] can also run blocks for the draft after it. Block E(n), "exactly n drafts
will stand", is anchored at row n, sees the rows below it, and is the very input the view was
trained on. Which n comes true is known only afterwards, so the blocks of the likeliest n are run.

    rows of one forward, K = 4, early blocks for n = 3 and n = 1 (. is a mask):

    AR      a d d d         verified; the AR view adds its own token behind the last that stands
    E(3)          d . . .   if all three stand
    E(1)      d . . .       if one stands

When n stands, E(n) has guesses for the token that the AR view has just said (its first row, of no
use any more) and for those behind it: they are the next draft. When no block was run for n, what is
left of the old draft is. Either way the next forward verifies something, and every forward emits at
least the AR view's own token. What is emitted never depends on which blocks were run: they only
propose, and were chosen before the tokens behind them were drawn.

Why that is exact, and related work: docs/decoding.md.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from orthrus_jax.decode import (
    DecodeState,
    DecodingModel,
    Drafts,
    accept,
    choose,
    judge,
    until_done,
)
from orthrus_jax.model import Segment, View, ar_segment
from orthrus_jax.sampling import Rule

Array = jax.Array


class Ahead(struct.PyTreeNode):
    """The draft that the next forward verifies.

    Attributes:
      tokens: int32[B, K-1], proposed behind the anchor.
      trust: float32[B, K-1], how likely the drafting view held each to be; 0 where there is none.
    """

    tokens: Array
    trust: Array


def nothing(batch: int, block_size: int) -> Ahead:
    """No draft yet, as behind a prefill: the first forward only says its own token and drafts."""
    shape = (batch, block_size - 1)
    return Ahead(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


@partial(
    jax.jit,
    static_argnames=("model", "block_size", "early", "rule"),
    donate_argnames=("state",),
)
def one_forward_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    block_size: int | None = None,
    early: int = 4,
    rule: Rule = Rule.REJECTION,
    cycles: Array | None = None,
    leave: Array | None = None,
) -> DecodeState:
    """Decode with one forward a cycle until every row is done. What it emits is `orthrus_decode`'s.

    Args:
      model: static.
      params: both views' parameters.
      state: donated; its `ahead` is of this block_size.
      block_size: rows of a block, static; None is the trained K.
      early: blocks run in each forward, from 1 to block_size; static. Each is block_size rows.
      rule: static; with a sampler. A draft is always the likeliest token of its q, or coupled.
      cycles, leave: pause the loop, see `orthrus_decode`.
    """
    block_size = block_size or model.config.block_size
    if not 1 <= early <= block_size:
        raise ValueError(f"early={early} must be from 1 to block_size={block_size}")

    def cycle(state: DecodeState) -> DecodeState:
        rows = jnp.concatenate([state.anchor[:, None], state.ahead.tokens], axis=1)
        bets = likeliest_ends(state.ahead.trust, early)
        verified = ar_segment(rows, state.position)
        blocks = early_blocks(model, rows, state.position, bets)
        (hidden, guesses), cache = model.forward(params, [verified, blocks], state.cache)
        logits = model.logits(params, hidden)
        verdict = judge(state, Drafts(state.ahead.tokens), logits, rule)
        left = leftover(state.ahead, verdict.accepted)
        state = accept(state.replace(cache=cache), verdict, logits)

        # The block whose bet came true, without its first row: the AR view has said that token.
        guesses = guesses.reshape(*bets.shape, block_size, -1)
        won = bets == verdict.accepted[:, None]
        which = jnp.argmax(won, axis=1)[:, None, None, None]
        guesses = jnp.take_along_axis(guesses, which, axis=1)[:, 0, 1:]
        drafted = propose(model, params, state, guesses, rule)
        hit = won.any(axis=1)[:, None]
        ahead = jax.tree.map(lambda new, old: jnp.where(hit, new, old), drafted, left)
        return state.replace(ahead=ahead)

    return until_done(cycle, state, cycles, leave)


def likeliest_ends(trust: Array, early: int) -> Array:
    """The `early` likeliest numbers of drafts that will stand, int32[B, early], of trust [B, K-1].

    Exactly n stand with the probability that the first n are right and the next is wrong.
    """
    reached = jnp.cumprod(trust, axis=1)
    reached = jnp.pad(reached, ((0, 0), (1, 0)), constant_values=1.0)
    wrong = jnp.pad(1 - trust, ((0, 0), (0, 1)), constant_values=1.0)
    return jax.lax.top_k(reached * wrong, early)[1].astype(jnp.int32)


def early_blocks(model: DecodingModel, rows: Array, position: Array, bets: Array) -> Segment:
    """Blocks anchored at rows `bets` [B, E] of the verified rows [B, K] from `position` [B] on."""
    mask = model.config.mask_token_id
    assert mask is not None, "drafting needs config.mask_token_id"
    offset = jnp.arange(rows.shape[1])
    anchors = jnp.take_along_axis(rows, bets, axis=1)[..., None]
    tokens = jnp.where(offset == 0, anchors, mask)
    positions = (position[:, None] + bets)[..., None] + offset
    flat = lambda x: x.reshape(rows.shape[0], -1)
    return Segment(flat(tokens), flat(positions), View.DIFFUSION, block=rows.shape[1])


def propose(
    model: DecodingModel, params: Any, state: DecodeState, guesses: Array, rule: Rule
) -> Ahead:
    """The draft behind the new anchor, from its rows' hidden states [B, K-1, E]."""
    logits = model.logits(params, guesses)
    greedily = state if rule is Rule.COUPLED else state.replace(sampler=None)
    tokens = choose(greedily, logits)
    probs = jax.nn.softmax(logits, axis=-1)
    return Ahead(tokens, jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0])


def leftover(ahead: Ahead, accepted: Array) -> Ahead:
    """What the old draft says behind the token that came in place of draft accepted + 1."""
    width = ahead.tokens.shape[1]
    source = accepted[:, None] + 1 + jnp.arange(width)
    shift = lambda x: jnp.take_along_axis(x, jnp.minimum(source, width - 1), axis=1)
    return Ahead(shift(ahead.tokens), jnp.where(source < width, shift(ahead.trust), 0.0))
