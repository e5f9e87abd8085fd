"""Every forward emits: the next draft is made in a forward that also verifies, and may be a tree.

The paper's cycle is two forwards, draft and verify. But segments move through the layers together,
and a diffusion block reads keys that AR rows wrote in the same layer. Two cycles come of that.

`two_forward_decode`: the drafting forward carries the anchor as an AR row too, which says the next
token; what is left of the block is the draft behind it, and the second forward verifies that.

`one_forward_decode`: the forward that verifies [anchor, d_1 ... d_K-1] also runs blocks for the
draft after it. Block E(n), "exactly n drafts will stand", is anchored at row n, sees the rows below
it, and is the very input the view was trained on. Block F(n, c), "and c comes in place of the
next", is anchored at c and sees row n too. Which comes true is known only afterwards, so blocks are
run for the likeliest.

    rows of one forward, K = 4, with E(3), E(1) and F(0, c) (. is a mask):

    AR        a d d d         verified; the AR view adds its own token behind the last that stands
    E(3)            d . . .   if all three stand
    E(1)        d . . .       if one stands
    F(0, c)     c . . .       if none stands and the AR view says c

When n stand, E(n) has guesses for the token that the AR view has just said (its first row, of no
use any more) and for those behind it: they are the next draft. F(n, c) has guesses for all behind
c. When no block was run for what happened, what is left of the deepest that was passed is, or of
the old draft. Either way the next forward verifies something. What is emitted never depends on
which blocks were run or which drafts were on the table: they only propose, and the AR view's own
tokens are what is emitted.

Why that is exact, and related work: docs/decoding.md.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from orthrus_jax.attention import TreeMask
from orthrus_jax.decoding import tree as trees
from orthrus_jax.decoding.sampling import Purpose, Rule, greedy, perturbed, probabilities
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
from orthrus_jax.decoding.tree import Guesses, Tree
from orthrus_jax.model import Segment, View, ar_segment, block_segment

Array = jax.Array
CHOICES = 8  # the AR token at a rejection is among so many nine times in ten


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What the rows of a forward are spent on. Static.

    Attributes:
      block_size: rows of a diffusion block, K.
      nodes: drafts of the tree that is verified; 0 is a chain, the likeliest K - 1.
      early: blocks E(n), in a forward that verifies.
      fresh: blocks F(n, c), likewise; alone, one of them is E(0) where there is no draft.
      choices: guesses kept of each position, where more than the likeliest can be of use.
      trust: the temperature at which the drafting view's probabilities are believed. Below 1 they
        are sharpened: a guess can be surer to be AR's choice than AR is of its choice.
    """

    block_size: int
    nodes: int = 0
    early: int = 0
    fresh: int = 0
    choices: int = CHOICES
    trust: float = 1.0

    @property
    def drafts(self) -> int:
        """Rows verified behind the anchor: slots that a cycle writes behind it."""
        return self.nodes or self.block_size - 1

    @property
    def blocks(self) -> int:
        """Blocks that draft ahead."""
        return self.early + self.fresh

    @property
    def rows(self) -> int:
        """Rows of the verifying forward."""
        return 1 + self.drafts + self.block_size * self.blocks

    @property
    def positions(self) -> int:
        """Positions behind the anchor that are guessed.

        A fresh block that is right has a guess for one more than a chain verifies: the token that
        comes if all of it stands, which the next fresh blocks can bet on.
        """
        return self.block_size - (not self.fresh)

    def nothing(self, batch: int) -> Guesses:
        """No draft yet, as behind a prefill."""
        return trees.nothing(batch, self.positions, self.kept)

    @property
    def kept(self) -> int:
        """Guesses kept of each position."""
        return self.choices if self.nodes or self.fresh else 1

    def grow(self, anchor: Array, guesses: Guesses) -> Tree:
        """The drafts to verify behind `anchor` [B]."""
        if not self.nodes:
            return trees.chain(anchor, trees.first(guesses, self.drafts))
        return trees.grow(anchor, guesses, self.nodes)

    def check(self) -> None:
        """Refuse what cannot be run ahead."""
        ends = self.drafts + 1
        if not self.blocks:
            raise ValueError("early=0 and fresh=0: no block drafts the next tokens")
        if not 0 <= self.early <= ends:
            raise ValueError(f"early={self.early} must be from 0 to {ends}, the ends")
        if not 0 <= self.fresh <= ends * self.kept:
            raise ValueError(f"fresh={self.fresh} must be from 0 to {ends * self.kept}, the pairs")


class Bets(struct.PyTreeNode):
    """N blocks that draft ahead.

    Attributes:
      row: int32[B, N], where the walk must end for the block to be of use.
      early: bool[B, N], the block is anchored at this row, not at a token behind it.
      anchor: int32[B, N], the block's first token.
      depth: int32[B, N], how far behind the verified anchor it lies.
      seen: bool[B, N, R], which of the verified rows the block sees.
    """

    row: Array
    early: Array
    anchor: Array
    depth: Array
    seen: Array


class Walked(struct.PyTreeNode):
    """A verification's outcome: drafts that stand, the row it ended at, the token said there."""

    accepted: Array
    last: Array
    correction: Array


@partial(jax.jit, static_argnames=("model", "scheme", "rule"), donate_argnames=("state",))
def one_forward_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    scheme: Scheme,
    rule: Rule = Rule.REJECTION,
    cycles: Array | None = None,
    leave: Array | None = None,
) -> DecodeState:
    """Decode with one forward a cycle until every row is done. What it emits is `ar_decode`'s.

    Args:
      model: static.
      params: both views' parameters.
      state: donated; its `ahead` is of this scheme, its prefill's `reach` at least scheme.drafts.
      scheme: static.
      rule: static; with a sampler, what is guessed: the likeliest tokens of q, or (COUPLED) those
        that the noise of their position makes the likeliest. Sampled texts are AR's for the seed
        under both.
      cycles, leave: pause the loop, see `orthrus_decode`.
    """
    scheme.check()

    def cycle(state: DecodeState) -> DecodeState:
        tree = scheme.grow(state.anchor, state.ahead)
        bets = place(tree, state.ahead, scheme)
        segments = [rows_of(tree, state, scheme), blocks_of(bets, model, state, scheme)]
        (hidden, ahead), cache = model.forward(params, segments, state.cache)
        left, active = state.ahead, ~state.done
        state, walked, kept = verify(
            model, params, state.replace(cache=cache), tree, hidden, scheme
        )
        state = count_cycle(state, active, kept)

        usable, rows, behind = payoff(bets, tree, walked, ahead, scheme)
        drafted = guess(state, model.logits(params, rows), scheme, rule)
        drafted = trees.known(drafted, behind)
        left = trees.shifted(left, walked.accepted + 1)
        pick = lambda new, old: jnp.where(usable[:, None, None], new, old)
        return state.replace(ahead=jax.tree.map(pick, drafted, left))

    return until_done(cycle, state, cycles, leave)


@partial(jax.jit, static_argnames=("model", "scheme", "rule"), donate_argnames=("state",))
def two_forward_decode(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    *,
    scheme: Scheme,
    rule: Rule = Rule.REJECTION,
    cycles: Array | None = None,
    leave: Array | None = None,
) -> DecodeState:
    """Decode with two forwards a cycle, both of which emit. Arguments: see `one_forward_decode`."""
    mask = mask_id(model)

    def cycle(state: DecodeState) -> DecodeState:
        active = ~state.done
        own = ar_segment(state.anchor[:, None], state.position)
        block = block_segment(state.anchor, state.position, scheme.block_size, mask)
        (said, rows), cache = model.forward(params, [own, block], state.cache)
        logits = model.logits(params, jnp.concatenate([said, rows[:, 1:]], axis=1))
        said, logits = logits[:, :1], logits[:, 1:]
        state = emit(
            state.replace(cache=cache), choose(state, said), jnp.zeros_like(state.count), said
        )
        tree = scheme.grow(state.anchor, guess(state, logits, scheme, rule))
        (hidden,), cache = model.forward(params, [rows_of(tree, state, scheme)], state.cache)
        state, _, kept = verify(model, params, state.replace(cache=cache), tree, hidden, scheme)
        return count_cycle(state, active, kept)

    return until_done(cycle, state, cycles, leave)


def place(tree: Tree, guesses: Guesses, scheme: Scheme) -> Bets:
    """Bet on the likeliest ends of the walk, and on the likeliest (end, next token)."""
    if not scheme.early:
        fresh = fresh_bets(tree, guesses, scheme.fresh)
        # A draft begins with E(0): where none is on the table, in place of the first.
        begin = early_bets(tree, jnp.zeros_like(fresh.row))
        begins = (guesses.probs[:, :1, 0] == 0) & (jnp.arange(scheme.fresh) == 0)
        wide = lambda like: jnp.expand_dims(begins, range(2, like.ndim))
        return jax.tree.map(lambda new, old: jnp.where(wide(new), new, old), begin, fresh)
    early = early_bets(tree, jax.lax.top_k(trees.ends(tree), scheme.early)[1])
    if not scheme.fresh:
        return early
    fresh = fresh_bets(tree, guesses, scheme.fresh)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), early, fresh)


def early_bets(tree: Tree, row: Array) -> Bets:
    """Blocks anchored at the rows [B, N], which see the rows before it on its path."""
    at = lambda x: jnp.take_along_axis(x, row, axis=1)
    path = jnp.take_along_axis(tree.path, row[..., None], axis=1)
    itself = row[..., None] == jnp.arange(tree.tokens.shape[1])
    return Bets(row, jnp.ones_like(row, bool), at(tree.tokens), at(tree.depth), path & ~itself)


def fresh_bets(tree: Tree, guesses: Guesses, count: int) -> Bets:
    """Blocks anchored at tokens that may come in place of a row's children, the likeliest."""
    batch, positions, choices = guesses.tokens.shape
    odds = trees.corrections(tree, guesses).reshape(batch, -1)
    which = jax.lax.top_k(odds, count)[1]
    row = which // choices
    depth = jnp.take_along_axis(tree.depth, row, axis=1) + 1
    index = jnp.minimum(depth - 1, positions - 1) * choices + which % choices
    anchor = jnp.take_along_axis(guesses.tokens.reshape(batch, -1), index, axis=1)
    path = jnp.take_along_axis(tree.path, row[..., None], axis=1)
    return Bets(row, jnp.zeros_like(row, bool), anchor, depth, path)


def rows_of(tree: Tree, state: DecodeState, scheme: Scheme) -> Segment:
    """The tree as AR rows behind the live slots, each seeing its own path."""
    if not scheme.nodes:
        return ar_segment(tree.tokens, state.position)
    positions = state.position[:, None] + tree.depth
    tree_mask = TreeMask(state.position, tree.path)
    return Segment(tree.tokens, positions, View.AR, tree_mask=tree_mask)


def blocks_of(bets: Bets, model: DecodingModel, state: DecodeState, scheme: Scheme) -> Segment:
    """The blocks [anchor, MASK x (K - 1)] of all bets, as one segment."""
    offset = jnp.arange(scheme.block_size)
    tokens = jnp.where(offset == 0, bets.anchor[..., None], mask_id(model))
    positions = (state.position[:, None] + bets.depth)[..., None] + offset
    flat = lambda x: x.reshape(x.shape[0], -1)
    tree_mask = TreeMask(state.position, bets.seen) if scheme.nodes else None
    return Segment(
        flat(tokens), flat(positions), View.DIFFUSION, block=scheme.block_size, tree_mask=tree_mask
    )


def verify(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    tree: Tree,
    hidden: Array,
    scheme: Scheme,
) -> tuple[DecodeState, Walked, Array]:
    """Walk the tree by the AR view's own tokens and emit them; keep the accepted rows' slots.

    Returns:
      The state, what the walk found, and how many drafts were emitted, int32[B].
    """
    logits = model.logits(params, hidden)
    predicted = choose(state, logits, tree.depth)
    accepted, way = trees.walk(tree, predicted)
    along = jnp.take_along_axis(predicted, way, axis=1)
    if scheme.nodes:
        state = state.replace(cache=state.cache.compact(state.position, way))
        logits = jnp.take_along_axis(logits, way[..., None], axis=1)
    count = state.count
    state = emit(state, along, accepted, logits)
    correction = jnp.take_along_axis(along, accepted[:, None], axis=1)[:, 0]
    walked = Walked(accepted, way[:, -1], correction)
    return state, walked, jnp.minimum(accepted, state.count - count)


def payoff(
    bets: Bets, tree: Tree, walked: Walked, hidden: Array, scheme: Scheme
) -> tuple[Array, Array, Array]:
    """What the blocks say of the tokens behind the new anchor.

    Of all blocks whose anchor is on the text that came about, the deepest knows most. One anchored
    `skip` tokens before the new anchor has spent so many rows on what is known by now: none if it
    was fresh and right, one if it was early and right, more if its end was passed.

    Returns:
      Which rows have such a block, bool[B]; its hidden states for the D tokens behind the new
      anchor that are guessed, [B, D, E]; and how many of them it has, int32[B].
    """
    on_way = jnp.take_along_axis(tree.path, walked.last[:, None, None], axis=1)[:, 0]
    came = (bets.row == walked.last[:, None]) & (bets.anchor == walked.correction[:, None])
    right = jnp.where(bets.early, jnp.take_along_axis(on_way, bets.row, axis=1), came)
    depth = jnp.where(right, bets.depth, -1)
    which = jnp.argmax(depth, axis=1)
    skip = jnp.maximum(walked.accepted + 1 - depth.max(axis=1), 0)
    rows = skip[:, None] + jnp.arange(scheme.positions)
    rows = which[:, None] * scheme.block_size + jnp.minimum(rows, scheme.block_size - 1)
    rows = jnp.take_along_axis(hidden, rows[..., None], axis=1)
    return right.any(axis=1), rows, scheme.block_size - skip


def guess(state: DecodeState, logits: Array, scheme: Scheme, rule: Rule) -> Guesses:
    """The likeliest tokens behind the anchor, from the drafting view's logits [B, D, V]."""
    scores = logits
    if state.sampler is not None:
        logits = forbid_early_end(state, logits)
        hot = state.sampler.temperature[:, None, None]
        scores = logits / jnp.where(hot > 0, hot, 1.0)
        if rule is Rule.COUPLED:
            q, at = probabilities(logits, state.sampler), next_positions(state, logits)
            noisy = perturbed(q, state.sampler, at, Purpose.TOKEN)
            scores = jnp.where(hot > 0, noisy, scores)
    tokens = likeliest(scores, scheme.kept)
    believed = scores / scheme.trust
    mass = jax.nn.logsumexp(believed, axis=-1, keepdims=True)
    return Guesses(tokens, jnp.exp(jnp.take_along_axis(believed, tokens, axis=-1) - mass))


def likeliest(scores: Array, count: int) -> Array:
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


def mask_id(model: DecodingModel) -> int:
    """The id of the MASK token."""
    mask = model.config.mask_token_id
    assert mask is not None, "drafting needs config.mask_token_id"
    return mask
