"""Trees of drafts against plain Python: the prefixes chosen, the walk, the odds of its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.decoding import tree as trees
from orthrus_jax.decoding.tree import TopK

ANCHOR = 99
SIZES = [(4, 3, 9), (7, 1, 5), (6, 4, 16), (5, 3, 2), (3, 2, 30), (31, 8, 64)]  # D, M, nodes


def random_guesses(seed: int, rows: int, positions: int, choices: int) -> TopK:
    """Distinct tokens a position, and probabilities of which no two products are equal."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(choices + 3, 0.6), (rows, positions))
    probs = -np.sort(-probs, axis=-1)[..., :choices]
    tokens = rng.random((rows, positions, 50)).argsort(-1)[..., :choices]
    return TopK(jnp.asarray(tokens, jnp.int32), jnp.asarray(probs, jnp.float32))


def best_prefixes(tokens, probs, nodes: int) -> dict[tuple, float]:
    """The likeliest prefixes, one after another: the best of those whose parent is taken."""
    found, open_ = {}, {(t,): p for t, p in zip(tokens[0], probs[0], strict=True)}
    while open_ and len(found) < nodes:
        prefix = max(open_, key=open_.get)
        found[prefix] = open_.pop(prefix)
        if len(prefix) < len(tokens):
            next_ = zip(tokens[len(prefix)], probs[len(prefix)], strict=True)
            open_ |= {(*prefix, t): found[prefix] * p for t, p in next_}
    return found


def prefixes_of(tree, row: int) -> dict[tuple, int]:
    """Each node's tokens from the root, and its row."""
    tokens, path = np.asarray(tree.tokens[row]), np.asarray(tree.path[row])
    nodes = np.flatnonzero(np.asarray(tree.depth[row]))
    return {tuple(tokens[path[r]][1:].tolist()): int(r) for r in nodes}


@pytest.fixture(scope="module", params=SIZES, ids=str)
def grown(request):
    positions, choices, nodes = request.param
    guesses = random_guesses(nodes, 3, positions, choices)
    return (
        guesses,
        jax.jit(trees.build_tree, static_argnums=2)(jnp.full(3, ANCHOR), guesses, nodes),
        nodes,
    )


def test_tree_holds_the_likeliest_prefixes(grown) -> None:
    guesses, tree, nodes = grown
    for row in range(3):
        tokens, probs = (np.asarray(x[row], np.float64).tolist() for x in jax.tree.leaves(guesses))
        best = best_prefixes(tokens, probs, nodes)
        found = prefixes_of(tree, row)
        assert found.keys() == best.keys()
        for prefix, at in found.items():
            assert float(tree.path_prob[row, at]) == pytest.approx(best[prefix], rel=1e-4)


def test_rows_are_laid_out_as_a_tree(grown) -> None:
    _, tree, nodes = grown
    for row in range(3):
        tokens, parent, depth = (np.asarray(x[row]) for x in (tree.tokens, tree.parent, tree.depth))
        found = prefixes_of(tree, row)
        assert tokens[0] == ANCHOR
        assert (depth[0], parent[0], float(tree.path_prob[row, 0])) == (0, 0, 1)
        for prefix, at in found.items():
            assert parent[at] < at
            assert parent[at] == (found[prefix[:-1]] if len(prefix) > 1 else 0)
            assert depth[at] == len(prefix)
        fillers = nodes + 1 - len(found) - 1
        assert (depth[1:] == 0).sum() == fillers
        assert np.asarray(tree.path[row]).diagonal().all()


def test_accepted_path_follows_the_predictions(grown) -> None:
    """Random sayings, most of them a child's token: the longest path that they agree with."""
    guesses, tree, _ = grown
    rng = np.random.default_rng(7)
    rows = tree.tokens.shape[1]
    for _ in range(20):
        at = np.minimum(np.asarray(tree.depth), guesses.tokens.shape[1] - 1)
        rank = rng.choice(guesses.tokens.shape[2], (3, rows))
        behind = np.asarray(guesses.tokens)[np.arange(3)[:, None], at, rank]
        said = np.where(rng.random((3, rows)) < 0.85, behind, 55)
        accepted, way = jax.jit(trees.accepted_path)(tree, jnp.asarray(said))
        for row in range(3):
            found, prefix, path = prefixes_of(tree, row), (), [0]
            while (*prefix, int(said[row, path[-1]])) in found:
                prefix = (*prefix, int(said[row, path[-1]]))
                path.append(found[prefix])
            assert int(accepted[row]) == len(prefix)
            assert np.asarray(way[row]).tolist() == path + path[-1:] * (rows - len(path))


def test_stop_probs_are_those_of_the_accepted_path(grown) -> None:
    """What reaches a row and none of its children; over all rows, something certainly happens."""
    guesses, tree, _ = grown
    ends, odds = np.asarray(trees.stop_probs(tree)), np.asarray(trees.bonus_probs(tree, guesses))
    np.testing.assert_allclose(ends.sum(axis=1), 1, atol=1e-5)
    tokens, probs = (np.asarray(x, np.float64) for x in jax.tree.leaves(guesses))
    for row in range(3):
        found = {(): 0} | prefixes_of(tree, row)
        for prefix, at in found.items():
            reach = np.prod([probs[row, i][tokens[row, i] == t] for i, t in enumerate(prefix)])
            if len(prefix) == guesses.tokens.shape[1]:
                assert float(ends[row, at]) == pytest.approx(reach, rel=1e-3)
                assert (odds[row, at] == 0).all()
                continue
            next_ = zip(tokens[row, len(prefix)], probs[row, len(prefix)], strict=True)
            missed = [0.0 if (*prefix, t) in found else reach * p for t, p in next_]
            inside = sum(probs[row, len(prefix)]) * reach - sum(missed)
            assert float(ends[row, at]) == pytest.approx(reach - inside, rel=1e-3, abs=1e-6)
            np.testing.assert_allclose(odds[row, at], missed, rtol=1e-3, atol=1e-12)


def test_chain_is_the_tree_of_one_candidate() -> None:
    guesses = random_guesses(3, 4, 6, 1)
    anchor = jnp.arange(4)
    chain, tree = trees.chain(anchor, guesses), trees.build_tree(anchor, guesses, 6)
    for name in ("tokens", "parent", "depth", "rank", "path"):
        np.testing.assert_array_equal(getattr(chain, name), getattr(tree, name), err_msg=name)
    np.testing.assert_allclose(chain.path_prob, tree.path_prob, rtol=1e-5)


def test_chain_ends_at_the_first_wrong_draft() -> None:
    guesses = random_guesses(4, 5, 5, 1)
    ends = np.asarray(trees.stop_probs(trees.chain(jnp.arange(5), guesses)))
    for row, p in zip(ends, np.asarray(guesses.probs)[..., 0], strict=True):
        expected = [np.prod(p[:n]) * (1 - p[n] if n < 5 else 1) for n in range(6)]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("nodes", [0, 6])
def test_without_guesses_the_walk_ends_at_the_anchor(nodes: int) -> None:
    none = trees.empty(2, 3, 4)
    anchor = jnp.array([5, 6])
    tree = trees.build_tree(anchor, none, nodes) if nodes else trees.chain(anchor, none)
    assert np.asarray(trees.stop_probs(tree).argmax(1)).tolist() == [0, 0]


def test_shift_drops_the_first_guesses() -> None:
    old = TopK(jnp.array([[[1], [2], [3], [4]]] * 4), jnp.array([[[0.9], [0.8], [0.7], [0.6]]] * 4))
    left = trees.shift(old, jnp.array([1, 2, 4, 5]))
    assert np.asarray(left.tokens)[..., 0].tolist() == [
        [2, 3, 4, 0], [3, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    assert (np.asarray(left.probs)[..., 0] > 0).sum(1).tolist() == [3, 2, 0, 0]
