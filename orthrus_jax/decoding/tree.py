"""Trees of drafts: several guesses per position, verified together in one forward.

The drafter gives the likeliest tokens of each position after the anchor. A tree holds the
prefixes that are likeliest as a whole, one node for the last token of each. It is laid out in rows:
the anchor first, a parent before its children. Every row sees the cache and its own path.

    guesses        to buy | milk eggs | and at          a tree of 6 nodes, P falling

    row            0       1     2     3      4      5      6
    token          anchor  to    buy   milk   milk   eggs   and
    parent         .       0     0     1      2      1      3
    depth          0       1     1     2      2      2      3

The AR view predicts one token after each row. The accepted path goes from the root to the child
that equals the prediction, as far as there is one. The nodes decide how long it is, never which
tokens are emitted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class TopK(struct.PyTreeNode):
    """The drafter's likeliest tokens at each of the D positions after the anchor.

    Attributes:
      tokens: int32[B, D, M], the M likeliest, likeliest first.
      probs: float32[B, D, M], their probabilities; 0 where no guess is known. Or [B, D, M, M], of
        each guess (last axis) given each guess of the position before; at the first position given
        the anchor, M times the same.
    """

    tokens: Array
    probs: Array


class Tree(struct.PyTreeNode):
    """R rows to verify: row 0 is the anchor, the others are drafts, parents before children.

    Attributes:
      tokens: int32[B, R].
      parent: int32[B, R], the row before it on its path; the anchor's is itself.
      depth: int32[B, R], its distance from the anchor; also 0 for a row that fills up the shape.
      rank: int32[B, R], which guess of its position it is; the anchor's is 0.
      path: bool[B, R, R], path[b, r, s]: s is r or one of its ancestors.
      path_prob: float32[B, R], the probability that all of its path is right.
    """

    tokens: Array
    parent: Array
    depth: Array
    rank: Array
    path: Array
    path_prob: Array


def empty(batch: int, positions: int, candidates: int) -> TopK:
    """No guesses: a tree built of them ends at its anchor."""
    shape = (batch, positions, candidates)
    return TopK(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def take(guesses: TopK, count: int) -> TopK:
    """The first `count` positions."""
    return jax.tree.map(lambda x: x[:, :count], guesses)


def shift(guesses: TopK, by: Array) -> TopK:
    """Drop the first `by` [B] positions; nothing is known of those that follow the last."""
    width = guesses.tokens.shape[1]
    source = by[:, None] + jnp.arange(width)
    index = jnp.minimum(source, width - 1)[..., None]
    moved = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), guesses)
    return mask_from(moved, width - by)


def mask_from(guesses: TopK, count: Array) -> TopK:
    """Keep the first `count` [B] positions; nothing is known of the others."""
    inside = (jnp.arange(guesses.tokens.shape[1]) < count[:, None])[..., None]
    return jax.tree.map(lambda x: jnp.where(inside, x, 0), guesses)


def follow(scores: Array) -> Array:
    """Which guess is best at each position given the one chosen before it: int32[B, D].

    To choose is a map from a guess to the next one, and maps compose in any grouping: all positions
    take log2(D) steps instead of D.

    Args:
      scores: [B, D, M, M], laid out as TopK.probs.
    """
    best = jnp.argmax(scores, axis=-1)  # [B, D, M]
    compose = lambda first, then: jnp.take_along_axis(then, first, axis=-1)
    return jax.lax.associative_scan(compose, best, axis=1)[..., 0]


def chosen(values: Array, ranks: Array) -> Array:
    """Of values [B, D, M], those of the guesses `ranks` [B, D]."""
    return jnp.take_along_axis(values, ranks[..., None], axis=-1)[..., 0]


def unknown(guesses: TopK) -> Array:
    """bool[B, D]: the positions without a guess."""
    probs = guesses.probs if guesses.probs.ndim == 3 else guesses.probs.max(axis=2)
    return probs[..., 0] == 0


def build_tree(anchor: Array, guesses: TopK, nodes: int) -> Tree:
    """The `nodes` likeliest prefixes after `anchor` [B].

    Probabilities multiply along a prefix: a guess's own, or its own given its parent. Built level
    by level: a node among the best of all levels is among the best `nodes` of its own, and so is
    its parent, which is no less likely. Ties go to the shallower node, so a parent is always chosen
    with its child.
    """
    batch, _, candidates = guesses.tokens.shape
    levels = min(nodes, guesses.tokens.shape[1])
    by_parent = guesses.probs.ndim == 4
    # Unknown positions get the smallest probability, not zero, so that the tree keeps its shape.
    least = jnp.finfo(jnp.float32).tiny
    log_p = jnp.log(jnp.maximum(guesses.probs[:, :levels], least)).swapaxes(0, 1)

    def level(above: tuple[Array, Array | None], at: Array) -> tuple[Any, tuple[Array, Array]]:
        above_p, rank = above  # of the nodes one level up
        own = at[:, None] if rank is None else jnp.take_along_axis(at, rank[..., None], axis=1)
        scores = (above_p[:, :, None] + own).reshape(batch, nodes * candidates)
        best, index = jax.lax.top_k(scores, nodes)
        return (best, index % candidates if by_parent else None), (best, index)

    root = jnp.broadcast_to(jnp.where(jnp.arange(nodes) == 0, 0.0, -jnp.inf), (batch, nodes))
    root_rank = jnp.zeros((batch, nodes), jnp.int32) if by_parent else None
    _, (scores, index) = jax.lax.scan(level, (root, root_rank), log_p)
    by_level = lambda x: x.swapaxes(0, 1).reshape(batch, levels * nodes)
    scores, index = by_level(scores), by_level(index)
    chosen = jnp.sort(jax.lax.top_k(scores, nodes)[1], axis=1)  # numbered level by level

    pick = lambda x: jnp.take_along_axis(x, chosen, axis=1)
    scores, index, depth = pick(scores), pick(index), chosen // nodes + 1
    exists = scores > -jnp.inf
    above = (depth - 2) * nodes + index // candidates  # the parent's number, where it has one
    parent = 1 + jnp.argmax(chosen[:, None] == above[..., None], axis=2)
    parent = jnp.where(exists & (depth > 1), parent, 0)
    rank = index % candidates
    flat = guesses.tokens[:, :levels].reshape(batch, -1)
    tokens = jnp.take_along_axis(flat, (depth - 1) * candidates + rank, axis=1)
    with_root = lambda x, root: jnp.concatenate([root[:, None].astype(x.dtype), x], axis=1)
    zero, parent = jnp.zeros_like(anchor), parent.astype(jnp.int32)
    parent = with_root(parent, zero)
    return Tree(
        tokens=with_root(tokens, anchor),
        parent=parent,
        depth=with_root(jnp.where(exists, depth, 0), zero),
        rank=with_root(rank, zero),
        path=_paths(parent, levels),
        path_prob=with_root(jnp.exp(scores), jnp.ones_like(anchor)),
    )


def chain(anchor: Array, guesses: TopK) -> Tree:
    """The likeliest guess of each position, one after the other.

    Without probabilities given the guess before, `build_tree` of one candidate.
    """
    rows = guesses.tokens.shape[1] + 1
    depth = jnp.broadcast_to(jnp.arange(rows), (anchor.shape[0], rows))
    if guesses.probs.ndim == 4:
        ranks = follow(guesses.probs)
        tokens = chosen(guesses.tokens, ranks)
        before = jnp.pad(ranks[:, :-1], ((0, 0), (1, 0)))[..., None, None]
        probs = chosen(jnp.take_along_axis(guesses.probs, before, axis=2)[:, :, 0], ranks)
        rank = jnp.pad(ranks, ((0, 0), (1, 0)))
    else:
        tokens, probs, rank = guesses.tokens[..., 0], guesses.probs[..., 0], jnp.zeros_like(depth)
    path_prob = jnp.cumprod(probs, axis=1)
    return Tree(
        tokens=jnp.concatenate([anchor[:, None], tokens], axis=1),
        parent=jnp.maximum(depth - 1, 0),
        depth=depth,
        rank=rank,
        path=jnp.broadcast_to(jnp.tri(rows, dtype=bool), (anchor.shape[0], rows, rows)),
        path_prob=jnp.pad(path_prob, ((0, 0), (1, 0)), constant_values=1.0),
    )


def accepted_path(tree: Tree, predicted: Array) -> tuple[Array, Array]:
    """Follow the AR view's prediction after each row, `predicted` [B, R], from the root on.

    Returns:
      How many drafts are accepted, int32[B]; and the rows from the anchor to the last accepted,
      int32[B, R], the last repeated from there on.
    """
    expected = jnp.take_along_axis(predicted, tree.parent, axis=1)
    is_root = jnp.arange(tree.tokens.shape[1]) == 0
    right = is_root | ((tree.tokens == expected) & (tree.depth > 0))
    accepted_row = ~(tree.path & ~right[:, None]).any(axis=2)
    last = jnp.argmax(jnp.where(accepted_row, tree.depth, -1), axis=1)
    way = jnp.take_along_axis(tree.path, last[:, None, None], axis=1)[:, 0]
    accepted = jnp.take_along_axis(tree.depth, last[:, None], axis=1)[:, 0]
    steps = jnp.arange(tree.tokens.shape[1])
    at_step = way[:, None] & (tree.depth[:, None] == steps[:, None])
    rows = jnp.where(steps <= accepted[:, None], jnp.argmax(at_step, axis=2), last[:, None])
    return accepted, rows.astype(jnp.int32)


def stop_probs(tree: Tree) -> Array:
    """The probability that the accepted path ends at each row, float32[B, R]."""
    onward = jnp.where(_children(tree), tree.path_prob[:, None], 0.0).sum(axis=2)
    return jnp.maximum(tree.path_prob - onward, 0.0)


def bonus_probs(tree: Tree, guesses: TopK) -> Array:
    """The probability that the path ends at a row and a guess outside the tree comes next.

    Returns:
      float32[B, R, M]: for each row, the guesses of the next position; 0 for its children.
    """
    count = guesses.tokens.shape[2]
    none = ((0, 0), (0, 1), *((0, 0),) * (guesses.probs.ndim - 2))
    probs = jnp.pad(guesses.probs, none)  # after the last: nothing known
    index = jnp.minimum(tree.depth, probs.shape[1] - 1)
    if probs.ndim == 4:  # given each row's own token
        probs, index = probs.reshape(probs.shape[0], -1, count), index * count + tree.rank
    after = jnp.take_along_axis(probs, index[..., None], 1)
    ranks = jax.nn.one_hot(tree.rank, count)
    taken = _children(tree).astype(jnp.float32) @ ranks  # by no or one child
    return jnp.where(taken > 0, 0.0, tree.path_prob[..., None] * after)


def _children(tree: Tree) -> Array:
    """bool[B, R, R]: [b, r, s], s is a child of r."""
    rows = jnp.arange(tree.tokens.shape[1])
    return (tree.parent[:, None] == rows[:, None]) & (tree.depth[:, None] > 0)


def _paths(parent: Array, levels: int) -> Array:
    """bool[B, R, R]: each row and its ancestors, by doubling the steps taken."""
    rows = parent.shape[1]
    path = jnp.broadcast_to(jnp.eye(rows, dtype=bool), (parent.shape[0], rows, rows))
    steps, hop = 1, parent  # path holds so many steps of each way up; `hop` takes as many at once
    while steps <= levels:
        path |= jnp.take_along_axis(path, hop[..., None], axis=1)
        hop = jnp.take_along_axis(hop, hop, axis=1)
        steps *= 2
    return path
