"""The pairwise head in decoding: odds given the token before, against plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from orthrus_jax import decoding
from orthrus_jax.decoding import AcceptRule, Sampler, Strategy
from orthrus_jax.decoding import tree as trees
from orthrus_jax.decoding.guesses import given_previous
from orthrus_jax.decoding.tree import TopK
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model
from orthrus_jax.model.pairwise import HEAD, KINDS, MAP, TABLE, vectors
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import MODEL, WIDTH, K, start
from tests.support.fake_models.scripted import ScriptedModel, drafts_agreeing, plain_text
from tests.support.weights import random_head, random_params

ANCHOR = 99
SIZES = [(4, 3, 9), (7, 2, 5), (5, 3, 2), (3, 2, 30), (9, 8, 40)]  # D, M, nodes
CONFIG = tiny_config()


def random_odds(seed: int, rows: int, positions: int, count: int) -> TopK:
    """Distinct tokens per position, and other probabilities after each token before."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(count + 2, 0.6), (rows, positions, count))[..., :count]
    probs[:, 0] = probs[:, 0, :1]
    tokens = rng.random((rows, positions, 50)).argsort(-1)[..., :count]
    return TopK(jnp.asarray(tokens, jnp.int32), jnp.asarray(probs, jnp.float32))


def best_prefixes(probs: np.ndarray, nodes: int) -> dict[tuple, float]:
    """The likeliest prefixes (of ranks), one after another, of probs [D, M, M]."""
    best, candidates = {}, {(c,): p for c, p in enumerate(probs[0, 0])}
    while candidates and len(best) < nodes:
        prefix = max(candidates, key=candidates.get)
        best[prefix] = candidates.pop(prefix)
        if len(prefix) < len(probs):
            after = probs[len(prefix), prefix[-1]]
            candidates |= {(*prefix, c): best[prefix] * p for c, p in enumerate(after)}
    return best


def prefixes_of(tree, row: int) -> dict[tuple, int]:
    """Each node's ranks from the root, and its row."""
    rank, path = np.asarray(tree.rank[row]), np.asarray(tree.path[row])
    nodes = np.flatnonzero(np.asarray(tree.depth[row]))
    return {tuple(rank[path[r]][1:].tolist()): int(r) for r in nodes}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tree_holds_the_prefixes_that_are_likeliest_given_their_parents(size) -> None:
    """With the probability of each, of each end, and of each token that may follow."""
    positions, count, nodes = size
    guesses = random_odds(nodes, 3, positions, count)
    grow = jax.jit(trees.build_tree, static_argnums=2)
    tree = grow(jnp.full(3, ANCHOR), guesses, nodes)
    ends, odds = np.asarray(trees.stop_probs(tree)), np.asarray(trees.bonus_probs(tree, guesses))
    np.testing.assert_allclose(ends.sum(axis=1), 1, atol=1e-5)
    for row in range(3):
        probs = np.asarray(guesses.probs[row], np.float64)
        best, rows = best_prefixes(probs, nodes), prefixes_of(tree, row)
        assert rows.keys() == best.keys()
        for prefix, at in {(): 0, **rows}.items():
            reach = best.get(prefix, 1.0)
            assert float(tree.path_prob[row, at]) == pytest.approx(reach, rel=1e-4)
            if prefix:
                token = guesses.tokens[row, len(prefix) - 1, prefix[-1]]
                assert tree.tokens[row, at] == token
                assert tree.parent[row, at] == (rows[prefix[:-1]] if prefix[1:] else 0)
            if len(prefix) == positions:
                assert (odds[row, at] == 0).all()
                continue
            after = probs[len(prefix), prefix[-1] if prefix else 0]
            missed = [0 if (*prefix, c) in rows else reach * p for c, p in enumerate(after)]
            np.testing.assert_allclose(odds[row, at], missed, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 2, 7, 31])
def test_chain_takes_the_likeliest_given_the_one_before(positions: int) -> None:
    guesses = random_odds(positions, 4, positions, 5)
    tree = trees.chain(jnp.full(4, ANCHOR), guesses)
    for row in range(4):
        before, reach = 0, 1.0
        for at in range(positions):
            after = np.asarray(guesses.probs)[row, at, before]
            before, reach = int(after.argmax()), reach * after.max()
            assert tree.tokens[row, at + 1] == guesses.tokens[row, at, before]
            assert tree.rank[row, at + 1] == before
            assert float(tree.path_prob[row, at + 1]) == pytest.approx(reach, rel=1e-4)


def test_odds_without_a_relation_give_the_tree_of_independent_guesses() -> None:
    plain = random_odds(1, 3, 6, 4)
    plain = plain.replace(probs=plain.probs[:, :, 0])
    same = jnp.broadcast_to(plain.probs[:, :, None], (3, 6, 4, 4))
    anchor = jnp.full(3, ANCHOR)
    for nodes in (3, 17):
        given, alone = (
            trees.build_tree(anchor, TopK(plain.tokens, probs), nodes)
            for probs in (same, plain.probs)
        )
        jax.tree.map(np.testing.assert_array_equal, given, alone)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_odds_are_those_of_the_formula(kind: str, sampled: bool) -> None:
    """t log q + <previous, current>, and the rest to none of them; nothing where nothing is known.

    With a sampler, at its temperature; a row of temperature 0 counts as 1.
    """
    model, head = Model(CONFIG), random_head(CONFIG, 2, kind=kind)
    params = random_params(CONFIG, 1) | {HEAD: head}
    guesses = random_odds(5, 2, 4, 3)
    probs = np.asarray(guesses.probs[:, :, 0]).copy()
    probs[1, 3:] = 0
    guesses = TopK(guesses.tokens, jnp.asarray(probs))
    text = plain_text(2, WIDTH)
    state, _ = start(MODEL, text, text, [5, 7], [9, 9])
    heats = [1.0, 1.0]
    if sampled:
        heats, ids = [0.5, 1.0], jnp.arange(2, dtype=jnp.uint32)
        state = state.replace(sampler=Sampler(jnp.array([0.5, 0.0]), seed=ids, noise_id=ids))
    given = given_previous(model, params, state, guesses)
    table = params["embed_tokens"]["embedding"]
    for row in range(2):
        for at in range(4):
            tokens = guesses.tokens[row, at]
            before = guesses.tokens[row, at - 1] if at else jnp.tile(state.anchor[row], 3)
            own = vectors(head, table, tokens)[1]
            pair = vectors(head, table, before)[0] @ own.T / heats[row]
            q = np.maximum(probs[row, at], np.finfo(np.float32).tiny)
            scores = head["scale"] * np.log(q) + np.asarray(pair)
            none = head["scale"] * np.log(max(1 - q.sum(), 1e-6)) + head["none"]
            whole = logsumexp(jnp.pad(scores, ((0, 0), (0, 1)), constant_values=none), axis=1)
            expected = np.exp(scores - whole[:, None]) * (probs[row, at] > 0)
            np.testing.assert_allclose(given.probs[row, at], expected, rtol=2e-4, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class TellingModel(ScriptedModel):
    """Scripted, with a head that knows which token of the text comes after which."""

    def pair_vectors(self, params, tokens, positions):
        text = params["text"][0]
        after = jnp.zeros(CONFIG.vocab_size, jnp.int32).at[text[:-1]].set(text[1:])
        one_hot = lambda ids: 20 * jax.nn.one_hot(ids, CONFIG.vocab_size)
        return one_hot(after[tokens]), one_hot(tokens)


TELLING = TellingModel(tiny_config(block_size=K))
RELATED = {  # strategy: accepted per cycle of 16 tokens, with the head and without
    Strategy("orthrus"): ([3, 3, 3, 3], [0] * 15),
    Strategy("orthrus-2f"): ([3, 3, 3], [0] * 8),
    Strategy("orthrus-1f", early_blocks=K): ([0, 3, 3, 3, 2], [0] * 15),
}


@pytest.mark.parametrize("strategy", RELATED, ids=lambda s: s.method)
def test_head_finds_the_second_guesses_that_follow_from_the_first(strategy: Strategy) -> None:
    """Every likeliest guess is wrong and every second right; each token occurs once in the text.

    The early block's first guess is of the token that is known by then: it too is wrong, and what
    follows is scored given the correction.
    """
    text = np.random.default_rng(0).permutation(np.arange(10, 61))[None, :WIDTH]
    drafts = drafts_agreeing(text, np.zeros_like(text, bool))
    for pairwise, accepted in zip((True, False), RELATED[strategy], strict=True):
        how = dataclasses.replace(strategy, pairwise=pairwise).resolve(TELLING.config, head=True)
        state, params = start(TELLING, text, drafts, [4], [16])
        zero = jnp.zeros(())
        params[HEAD] = {"scale": zero + 1, "none": zero}
        state = state.replace(drafter=first_carry(how, TELLING, 1, 40))
        loop, static = loop_of(how, TELLING)
        state = loop(TELLING, params, state, **static)
        cycles = int(state.cycles[0])
        assert np.asarray(state.tokens)[0, :16].tolist() == text[0, 4:20].tolist()
        assert np.asarray(state.accepted)[0, :cycles].tolist() == accepted


METHODS = [
    Strategy("orthrus"),
    Strategy("orthrus-2f", tree_nodes=5),
    Strategy("orthrus-1f", early_blocks=2, fresh_blocks=1),
]


def program(params, strategy: Strategy, *, head: bool) -> str:
    """The loop's program as the compiler gets it."""
    model = Model(CONFIG)
    strategy = strategy.resolve(CONFIG, head=head)
    prompt, one = jnp.ones((1, 4), jnp.int32), jnp.full(1, 4, jnp.int32)
    read = lambda params: decoding.prefill(
        model, params, prompt, one, one, NO_EOS, slots=32, max_new_tokens=8, lookahead=8
    )
    state = jax.eval_shape(read, params)
    state = state.replace(drafter=first_carry(strategy, model, 1, 32))
    loop, static = loop_of(strategy, model)
    return loop.lower(model, params, state, **static).as_text()


@pytest.mark.parametrize("strategy", METHODS, ids=lambda s: s.method)
def test_nothing_of_the_head_is_compiled_where_it_is_off(strategy: Strategy) -> None:
    params = random_params(CONFIG, 0)
    with_head = params | {HEAD: random_head(CONFIG, 0)}
    without = program(params, strategy, head=False)
    off = program(with_head, dataclasses.replace(strategy, pairwise=False), head=True)
    assert off == without
    assert program(with_head, strategy, head=True) != without


@pytest.mark.parametrize("kind", KINDS)
def test_engine_uses_the_head_unless_told_not_to(kind: str) -> None:
    """One text under all; a head that disturbs changes how many drafts are accepted."""
    params = random_params(CONFIG, 1, gain=2.0, copy=True)
    plain, model = (
        LLM(CONFIG, params),
        LLM(CONFIG, params | {HEAD: random_head(CONFIG, 3, kind=kind, gain=4.0)}),
    )
    options = {"max_new_tokens": 24}
    one = plain.complete([[1, 2, 3]], **options)[0]
    with_head = model.complete([[1, 2, 3]], **options)[0]
    off = model.complete([[1, 2, 3]], strategy=Strategy(pairwise=False), **options)[0]
    coupled = Strategy(accept=AcceptRule.COUPLED)
    drawn = model.complete([[1, 2, 3]], strategy=coupled, temperature=0.8, **options)[0]
    ar = plain.complete([[1, 2, 3]], strategy="ar", temperature=0.8, **options)[0]
    assert one.tokens == with_head.tokens == off.tokens
    assert one.accepted == off.accepted != with_head.accepted
    assert drawn.tokens == ar.tokens


def test_head_that_a_model_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"pairwise=True: this model has no pairwise head"):
        LLM(CONFIG, {}).complete([[1]], strategy=Strategy(pairwise=True))


def test_maps_of_many_tokens_and_of_few_are_the_same() -> None:
    head, rng = random_head(CONFIG, 1, kind=MAP), np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(CONFIG.vocab_size, CONFIG.hidden_size)), jnp.float32)
    many = jnp.asarray(rng.integers(0, CONFIG.vocab_size, CONFIG.vocab_size + 1))
    few = vectors(head, table, many[:5])
    for all_of_them, some in zip(vectors(head, table, many), few, strict=True):
        np.testing.assert_allclose(all_of_them[:5], some, rtol=1e-5, atol=1e-6)
    assert TABLE not in head["previous"]
