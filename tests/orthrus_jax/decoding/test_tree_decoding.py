"""A tree of drafts on the real model: each row, and each block, sees its own path and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.decoding import Strategy, overlapped
from orthrus_jax.decoding import tree as trees
from orthrus_jax.decoding.tree import TopK
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, ar_segment, block_segment
from tests.support.compare import relative_error
from tests.support.configs import NO_EOS, tiny_config
from tests.support.weights import random_params

CONFIG = tiny_config()
MODEL, PARAMS, K = Model(CONFIG), random_params(CONFIG, 7), CONFIG.block_size
BOUND = 2e-5  # between programs of different shapes
STRATEGY = Strategy("orthrus-1f", K, 11, early_blocks=6, fresh_blocks=5, candidates=4)
PROMPTS = np.random.default_rng(1).integers(0, 63, (3, 10)).astype(np.int32)
LENGTHS = [4, 10, 7]
forward = jax.jit(functools.partial(MODEL.forward, PARAMS))


def state_of(rows: int, slots: int) -> decoding.DecodeState:
    """A prefilled batch of `rows`."""
    full = lambda n: jnp.full(rows, n, jnp.int32)
    lengths = jnp.asarray(LENGTHS[:rows], jnp.int32)
    return decoding.prefill(
        MODEL, PARAMS, jnp.asarray(PROMPTS[:rows]), lengths, full(9), NO_EOS,
        slots=slots, max_new_tokens=9, lookahead=STRATEGY.drafts,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[(1, 64), (3, 64), (3, 1536)], ids=str)
def verified(request):
    """A state, a random tree and blocks on it, and what one forward of all of them gives.

    With 1536 slots attention walks the cache in steps.
    """
    rows, slots = request.param
    state = state_of(rows, slots)
    rng = np.random.default_rng(5)
    probs = -np.sort(-rng.dirichlet(np.full(6, 0.7), (rows, K - 1)), axis=-1)[..., :4]
    tokens = rng.random((rows, K - 1, 60)).argsort(-1)[..., :4]
    guesses = TopK(jnp.asarray(tokens, jnp.int32), jnp.asarray(probs, jnp.float32))
    tree = overlapped.tree_of(state.anchor, guesses, STRATEGY)
    blocks = overlapped.choose_blocks(tree, guesses, STRATEGY)
    segments = [
        overlapped.tree_segment(tree, state, STRATEGY),
        overlapped.blocks_segment(blocks, MODEL, state, STRATEGY),
    ]
    (hidden, drafted), cache = forward(segments, jax.tree.map(jnp.copy, state.cache))
    drafted = drafted.reshape(rows, STRATEGY.blocks, K, -1)
    return state, tree, blocks, hidden, drafted, cache


def alone(state, row: int) -> tuple:
    """One row's own prompt in a plain cache of a batch of one, and its live slots."""
    length = LENGTHS[row]
    cache = MODEL.init_cache(1, 64)
    _, cache = forward(
        [ar_segment(jnp.asarray(PROMPTS[row : row + 1]), jnp.zeros(1, jnp.int32))], cache
    )
    return cache, jnp.array([length], jnp.int32)


def test_tree_row_depends_only_on_its_ancestors(verified) -> None:
    state, tree, _, hidden, _, _ = verified
    for row in range(len(state.position)):
        for node in range(STRATEGY.tree_nodes + 1):
            path = np.flatnonzero(np.asarray(tree.path[row, node]))
            cache, first = alone(state, row)
            tokens = jnp.asarray(np.asarray(tree.tokens[row])[path])[None]
            (plain,), _ = forward([ar_segment(tokens, first)], cache)
            assert relative_error(hidden[row, node], plain[0, -1]) < BOUND


def test_block_sees_only_the_path_below_its_anchor(verified) -> None:
    """An early block behind the ancestors of its row, a fresh one behind the row as well."""
    state, tree, blocks, _, drafted, _ = verified
    kinds = set()
    for row in range(len(state.position)):
        for bet in range(STRATEGY.blocks):
            end = int(blocks.row[row, bet])
            path = np.flatnonzero(np.asarray(tree.path[row, end]))
            anchor = int(blocks.anchor[row, bet])
            before = np.asarray(tree.tokens[row])[path]
            if bet < STRATEGY.early_blocks:
                assert anchor == before[-1]
                before = before[:-1]
            cache, first = alone(state, row)
            if len(before):
                _, cache = forward([ar_segment(jnp.asarray(before)[None], first)], cache)
            at = first + len(before)
            block = block_segment(jnp.array([anchor]), at, K, CONFIG.mask_token_id)
            (plain,), _ = forward([block], cache)
            assert relative_error(drafted[row, bet], plain[0]) < BOUND
            kinds.add((bet < STRATEGY.early_blocks, len(before)))
    assert len(kinds) >= 4, "hardly a bet differs from another"


def test_outcome_blocks_assume_tokens_outside_the_tree(verified) -> None:
    state, tree, blocks, *_ = verified
    for row in range(len(state.position)):
        pairs = set()
        for bet in range(STRATEGY.early_blocks, STRATEGY.blocks):
            end, token = int(blocks.row[row, bet]), int(blocks.anchor[row, bet])
            children = np.flatnonzero((np.asarray(tree.parent[row]) == end) & (np.arange(12) > 0))
            assert token not in np.asarray(tree.tokens[row])[children]
            pairs.add((end, token))
        assert len(pairs) == STRATEGY.fresh_blocks


def test_compact_moves_the_accepted_path_into_sequence(verified) -> None:
    """Walk to the deepest node: the cache is then that of its path read in order."""
    state, tree, _, _, _, cache = verified
    last = np.asarray(tree.depth).argmax(axis=1)
    behind = np.full(tree.tokens.shape, -1)
    for row, node in enumerate(last):
        path = np.flatnonzero(np.asarray(tree.path[row, node]))
        behind[row, path[:-1]] = np.asarray(tree.tokens[row])[path[1:]]
    accepted, way = trees.accepted_path(tree, jnp.asarray(behind))
    assert accepted.tolist() == np.asarray(tree.depth).max(axis=1).tolist()
    assert (np.diff(np.asarray(way)[:, :3]) > 1).any(), "rows that need no moving"
    moved = cache.compact(state.position, way)
    for row in range(len(state.position)):
        plain, first = alone(state, row)
        path = np.asarray(way[row, : int(accepted[row]) + 1])
        _, plain = forward([ar_segment(tree.tokens[row][path][None], first)], plain)
        live = LENGTHS[row] + len(path)
        for layer in range(CONFIG.num_hidden_layers):
            ours_k = moved.k[layer].reshape(-1, *moved.k[layer].shape[-3:])[row, ..., :live]
            ours_v = moved.v[layer].reshape(-1, *moved.v[layer].shape[-3:])[row, :, :live]
            assert relative_error(ours_k, plain.k[layer][..., :live]) < BOUND
            assert relative_error(ours_v, plain.v[layer][:, :live]) < BOUND


def test_compact_leaves_other_slots_unchanged(verified) -> None:
    """Below the anchor and behind the tree no slot moves, in any bit."""
    state, tree, _, _, _, cache = verified
    way = jnp.asarray(np.random.default_rng(2).integers(0, 12, tree.tokens.shape), jnp.int32)
    moved = cache.compact(state.position, way)
    for before, after in zip(cache.k, moved.k, strict=True):
        before, after = (np.asarray(x).reshape(-1, *x.shape[-3:]) for x in (before, after))
        for row, at in enumerate(np.asarray(state.position)):
            rest = np.r_[0:at, at + STRATEGY.tree_nodes + 1 : before.shape[-1]]
            assert before[row][..., rest].tobytes() == after[row][..., rest].tobytes()


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy("orthrus-2f", tree_nodes=8),
        Strategy("orthrus-1f", tree_nodes=8, early_blocks=3, fresh_blocks=1),
    ],
    ids=lambda strategy: strategy.method,
)
def test_log_probabilities_and_least_lengths_are_ar_s(strategy: Strategy) -> None:
    """Along a tree's way, and where the end token may not come yet."""
    model = LLM(tiny_config(eos_token_ids=(3, 9, 30)), random_params(CONFIG, 3, gain=2.0))
    prompts = PROMPTS.tolist()
    options = {"max_new_tokens": 20, "min_new_tokens": 7, "logprobs": True, "batch_size": 2}
    ar = model.complete(prompts, strategy="ar", **options)
    tree = model.complete(prompts, strategy=strategy, **options)
    assert [c.tokens for c in tree] == [c.tokens for c in ar]
    assert min(len(c.tokens) for c in ar) >= 7
    for ours, theirs in zip(tree, ar, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
