"""Every forward emits: the next draft is made in a forward that also verifies, and may be a tree.

The paper's cycle is two forwards, draft and verify. But segments move through the layers together,
and a diffusion block reads keys that AR rows wrote in the same layer. Two methods come of that.

`two_forward_decode`: the drafting forward carries the anchor as an AR row too, which gives the next
token; the rest of the block is the draft after it, and the second forward verifies that.

`one_forward_decode`: the forward that verifies [anchor, d_1 ... d_K-1] also runs blocks for the
draft after it. The length block B(n) assumes that exactly n drafts are accepted. It is anchored at
row n, sees the rows below it, and is the very input the view was trained on. The outcome block
B(n, c) assumes in addition that the AR view's own next token is c. It is anchored at c and sees row
n too. Which assumption is right is known only afterwards, so the blocks of the likeliest are run.

    rows of one forward, K = 4, with B(3), B(1) and B(0, c) (. is a mask):

    AR        a d d d         verified; the AR view adds its own token after the last accepted one
    B(3)            d . . .   if all three are accepted
    B(1)        d . . .       if one is accepted
    B(0, c)     c . . .       if none is accepted and the AR view's token is c

When n are accepted, B(n) has guesses for the token that the AR view has just given (its first row,
of no use any more) and for those after it: they are the next draft. B(n, c) has guesses for all
after c. If no block anticipated this outcome, the next draft is the rest of the deepest block on
the accepted path, or else of the old draft. Either way the next forward verifies something. What is
emitted never depends on which blocks were run or which drafts were proposed: the emitted tokens are
the AR view's own.

Why that is exact, and related work: docs/decoding.md.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from orthrus_jax.attention.visibility import TreeMask
from orthrus_jax.decoding import tree as trees
from orthrus_jax.decoding.guesses import given_previous, guess
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    choose,
    emit,
    record_cycle,
    until_done,
)
from orthrus_jax.decoding.strategy import Strategy
from orthrus_jax.decoding.tree import TopK, Tree
from orthrus_jax.model.segment import Segment, View, ar_segment, block_segment

Array = jax.Array


class DraftBlocks(struct.PyTreeNode):
    """N blocks that draft while a forward verifies.

    Attributes:
      row: int32[B, N], the row at which the accepted path must end for the block to be of use.
      by_length: bool[B, N], a length block, anchored at this row, not at a token after it.
      anchor: int32[B, N], the block's first token.
      depth: int32[B, N], its distance from the verified anchor.
      mask: bool[B, N, R], which of the verified rows the block sees.
    """

    row: Array
    by_length: Array
    anchor: Array
    depth: Array
    mask: Array


class Verified(struct.PyTreeNode):
    """A verification's outcome, int32[B] each.

    Attributes:
      accepted: drafts accepted.
      last: the row at which the accepted path ends.
      correction: the AR view's own token there.
    """

    accepted: Array
    last: Array
    correction: Array


def no_draft(strategy: Strategy, batch: int) -> TopK:
    """DecodeState.drafter of `one_forward_decode` after a prefill: nothing is drafted yet."""
    return trees.empty(batch, strategy.positions, strategy.top_k)


@partial(jax.jit, static_argnames=("model", "strategy"), donate_argnames=("state",))
def one_forward_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    strategy: Strategy,
    max_cycles: Array | None = None,
    min_active: Array | None = None,
) -> DecodeState:
    """Decode with one forward per cycle until every sequence is done. The text is `ar_decode`'s.

    Greedily token for token; with a sampler AR's own text for the seed, whatever is proposed.

    Args:
      model: static.
      params: both views' parameters.
      state: donated; its `drafter` comes from `no_draft` or a pause of this loop, its prefill's
        `lookahead` is at least `strategy.drafts`.
      strategy: static, resolved.
      max_cycles, min_active: pause the loop, see `speculative_decode`.
    """

    def cycle(state: DecodeState) -> DecodeState:
        old: TopK = state.drafter
        guesses = with_odds(model, params, state, old, strategy)
        tree = tree_of(state.anchor, guesses, strategy)
        blocks = choose_blocks(tree, guesses, strategy)
        segments = [
            tree_segment(tree, state, strategy),
            blocks_segment(blocks, model, state, strategy),
        ]
        (hidden, drafted), cache = model.forward(params, segments, state.cache)
        active = ~state.done
        state, verified, kept = verify_tree(
            model, params, state.replace(cache=cache), tree, hidden, strategy
        )
        state = record_cycle(state, active, kept)

        usable, rows, known = next_draft_states(blocks, tree, verified, drafted, strategy)
        new = trees.mask_from(guesses_of(state, model.logits(params, rows), strategy), known)
        old = trees.shift(old, verified.accepted + 1)
        pick = lambda new, old: jnp.where(usable[:, None, None], new, old)
        return state.replace(drafter=jax.tree.map(pick, new, old))

    return until_done(cycle, state, max_cycles, min_active, reach=strategy.reach)


@partial(jax.jit, static_argnames=("model", "strategy"), donate_argnames=("state",))
def two_forward_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    strategy: Strategy,
    max_cycles: Array | None = None,
    min_active: Array | None = None,
) -> DecodeState:
    """Decode with two forwards per cycle, both of which emit. See `one_forward_decode`."""
    mask = model.config.mask_id

    def cycle(state: DecodeState) -> DecodeState:
        active = ~state.done
        anchor = ar_segment(state.anchor[:, None], state.position)
        block = block_segment(state.anchor, state.position, strategy.block_size, mask)
        (own, drafted), cache = model.forward(params, [anchor, block], state.cache)
        logits = model.logits(params, jnp.concatenate([own, drafted[:, 1:]], axis=1))
        own, logits = logits[:, :1], logits[:, 1:]
        state = state.replace(cache=cache)
        state = emit(state, choose(state, own), jnp.zeros_like(state.count), own)
        guesses = guesses_of(state, logits, strategy)
        guesses = with_odds(model, params, state, guesses, strategy)
        tree = tree_of(state.anchor, guesses, strategy)
        rows = tree_segment(tree, state, strategy)
        (hidden,), cache = model.forward(params, [rows], state.cache)
        state, _, kept = verify_tree(
            model, params, state.replace(cache=cache), tree, hidden, strategy
        )
        return record_cycle(state, active, kept)

    return until_done(cycle, state, max_cycles, min_active, reach=strategy.reach)


def guesses_of(state: DecodeState, logits: Array, strategy: Strategy) -> TopK:
    """The likeliest tokens after the anchor, from the diffusion view's logits [B, D, V]."""
    return guess(state, logits, strategy.top_k, strategy.draft_temperature or 1.0)


def with_odds(
    model: DecodingModel, params: Any, state: DecodeState, guesses: TopK, strategy: Strategy
) -> TopK:
    """The guesses as they are, or by the pairwise head: given the anchor, then one another.

    The anchor is the AR view's own token, so what follows a wrong guess is scored given its
    correction.
    """
    if not strategy.pairwise:
        return guesses
    return given_previous(model, params, state, guesses, strategy.draft_temperature or 1.0)


def tree_of(anchor: Array, guesses: TopK, strategy: Strategy) -> Tree:
    """The drafts to verify after `anchor` [B]: a tree, or the chain of the likeliest guesses."""
    if not strategy.tree_nodes:
        return trees.chain(anchor, trees.take(guesses, strategy.drafts))
    return trees.build_tree(anchor, guesses, strategy.tree_nodes)


def choose_blocks(tree: Tree, guesses: TopK, strategy: Strategy) -> DraftBlocks:
    """Blocks for the likeliest ends of the accepted path, and for the likeliest (end, token)."""
    if not strategy.early_blocks:
        blocks = blocks_by_outcome(tree, guesses, strategy.fresh_blocks)
        # A draft begins with B(0): where there is no draft, it takes the place of the first.
        begin = blocks_by_length(tree, jnp.zeros_like(blocks.row))
        first = jnp.arange(strategy.fresh_blocks) == 0
        begins = trees.unknown(trees.take(guesses, 1)) & first
        wide = lambda like: jnp.expand_dims(begins, range(2, like.ndim))
        return jax.tree.map(lambda new, old: jnp.where(wide(new), new, old), begin, blocks)
    ends = jax.lax.top_k(trees.stop_probs(tree), strategy.early_blocks)[1]
    blocks = blocks_by_length(tree, ends)
    if not strategy.fresh_blocks:
        return blocks
    more = blocks_by_outcome(tree, guesses, strategy.fresh_blocks)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), blocks, more)


def blocks_by_length(tree: Tree, row: Array) -> DraftBlocks:
    """Blocks anchored at the rows [B, N], which see the rows before it on its path."""
    at = lambda x: jnp.take_along_axis(x, row, axis=1)
    path = jnp.take_along_axis(tree.path, row[..., None], axis=1)
    itself = row[..., None] == jnp.arange(tree.tokens.shape[1])
    by_length = jnp.ones_like(row, bool)
    return DraftBlocks(row, by_length, at(tree.tokens), at(tree.depth), path & ~itself)


def blocks_by_outcome(tree: Tree, guesses: TopK, count: int) -> DraftBlocks:
    """Blocks anchored at the likeliest tokens that may follow a row in place of its children."""
    batch, positions, candidates = guesses.tokens.shape
    odds = trees.bonus_probs(tree, guesses).reshape(batch, -1)
    which = jax.lax.top_k(odds, count)[1]
    row = which // candidates
    depth = jnp.take_along_axis(tree.depth, row, axis=1) + 1
    index = jnp.minimum(depth - 1, positions - 1) * candidates + which % candidates
    anchor = jnp.take_along_axis(guesses.tokens.reshape(batch, -1), index, axis=1)
    path = jnp.take_along_axis(tree.path, row[..., None], axis=1)
    return DraftBlocks(row, jnp.zeros_like(row, bool), anchor, depth, path)


def tree_segment(tree: Tree, state: DecodeState, strategy: Strategy) -> Segment:
    """The tree as AR rows after the live slots, each seeing its own path."""
    if not strategy.tree_nodes:
        return ar_segment(tree.tokens, state.position)
    positions = state.position[:, None] + tree.depth
    tree_mask = TreeMask(state.position, tree.path)
    return Segment(tree.tokens, positions, View.AR, tree_mask=tree_mask)


def blocks_segment(
    blocks: DraftBlocks, model: DecodingModel, state: DecodeState, strategy: Strategy
) -> Segment:
    """All blocks [anchor, MASK x (K - 1)] as one segment."""
    offset = jnp.arange(strategy.block_size)
    tokens = jnp.where(offset == 0, blocks.anchor[..., None], model.config.mask_id)
    positions = (state.position[:, None] + blocks.depth)[..., None] + offset
    flat = lambda x: x.reshape(x.shape[0], -1)
    tree_mask = TreeMask(state.position, blocks.mask) if strategy.tree_nodes else None
    return Segment(
        flat(tokens),
        flat(positions),
        View.DIFFUSION,
        block=strategy.block_size,
        tree_mask=tree_mask,
    )


def verify_tree(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    tree: Tree,
    hidden: Array,
    strategy: Strategy,
) -> tuple[DecodeState, Verified, Array]:
    """Accept the path that the AR view's own tokens take, emit it, and keep its rows' slots.

    Returns:
      The state, the outcome, and how many drafts were emitted, int32[B].
    """
    logits = model.logits(params, hidden)
    predicted = choose(state, logits, tree.depth)
    accepted, path = trees.accepted_path(tree, predicted)
    along = jnp.take_along_axis(predicted, path, axis=1)
    if strategy.tree_nodes:
        state = state.replace(cache=state.cache.compact(state.position, path))
        logits = jnp.take_along_axis(logits, path[..., None], axis=1)
    count = state.count
    state = emit(state, along, accepted, logits)
    correction = jnp.take_along_axis(along, accepted[:, None], axis=1)[:, 0]
    verified = Verified(accepted, path[:, -1], correction)
    return state, verified, jnp.minimum(accepted, state.count - count)


def next_draft_states(
    blocks: DraftBlocks, tree: Tree, verified: Verified, hidden: Array, strategy: Strategy
) -> tuple[Array, Array, Array]:
    """Hidden states from which the next draft is read.

    Among the blocks anchored on the accepted text, the deepest has seen the most context. One that
    is anchored `skip` tokens before the new anchor has spent so many rows on tokens known by now:
    none if it is an outcome block and right, one if it is a length block and right, more if its
    end was passed.

    Returns:
      Which sequences have such a block, bool[B]; its hidden states for the D guessed tokens after
      the new anchor, [B, D, E]; and how many of them it has, int32[B].
    """
    on_path = jnp.take_along_axis(tree.path, verified.last[:, None, None], axis=1)[:, 0]
    same_end = blocks.row == verified.last[:, None]
    same_token = blocks.anchor == verified.correction[:, None]
    passed = jnp.take_along_axis(on_path, blocks.row, axis=1)
    right = jnp.where(blocks.by_length, passed, same_end & same_token)
    depth = jnp.where(right, blocks.depth, -1)
    which = jnp.argmax(depth, axis=1)
    skip = jnp.maximum(verified.accepted + 1 - depth.max(axis=1), 0)
    rows = skip[:, None] + jnp.arange(strategy.positions)
    rows = which[:, None] * strategy.block_size + jnp.minimum(rows, strategy.block_size - 1)
    states = jnp.take_along_axis(hidden, rows[..., None], axis=1)
    return right.any(axis=1), states, strategy.block_size - skip
