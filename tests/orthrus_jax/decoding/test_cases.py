"""Greedy Orthrus is greedy AR, token for token, over the table of cases; so is coupled sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.decoding import AcceptRule, Sampler, Strategy
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.model import Model
from orthrus_jax.model.pairwise import HEAD
from tests.support.cases import CACHES, CASES, EVERY, FAST, SHAPES, STRATEGIES, Case
from tests.support.configs import FAMILIES, NO_EOS, tiny_config
from tests.support.marks import slow
from tests.support.weights import random_head, random_params

BATCH, PROMPT, NEW = 3, 9, 20
LENGTHS, BUDGETS = [1, 5, 9], [NEW, 7, NEW]


def decode(model: Model, params, strategy: Strategy, slots: int, sampler: Sampler | None):
    """The final state, its arrays in numpy."""
    strategy = strategy.resolve(model.config, head=HEAD in params)
    prompts = np.random.default_rng(0).integers(0, 63, (BATCH, PROMPT)).astype(np.int32)
    numbers = lambda values: jnp.asarray(values, jnp.int32)
    state = decoding.prefill(
        model, params, prompts, numbers(LENGTHS), numbers(BUDGETS), NO_EOS,
        slots=slots, max_new_tokens=NEW, lookahead=max(strategy.drafts, 9), sampler=sampler,
    )  # fmt: skip
    state = state.replace(drafter=first_carry(strategy, model, BATCH, slots))
    loop, static = loop_of(strategy, model, sampled=sampler is not None)
    return jax.tree.map(np.asarray, loop(model, params, state, **static))


def opinionated(config, liked: tuple[int, ...] = (3, 9, 14, 30, 41)) -> dict:
    """Random weights that prefer a few tokens, so that drafts are accepted now and then.

    With them a pairwise head, which only strategies that name it use.
    """
    tree = random_params(config, 1, gain=2.0, copy=True) | {HEAD: random_head(config, 3, gain=0.5)}
    liked = 1 + 3 * jnp.isin(jnp.arange(config.vocab_size), jnp.array(liked))
    if config.tie_word_embeddings:
        table = tree["embed_tokens"]["embedding"] * liked[:, None]
        return tree | {"embed_tokens": {"embedding": table}}
    return tree | {"lm_head": {"weight": tree["lm_head"]["weight"] * liked[:, None]}}


@pytest.mark.parametrize("case", CASES, ids=" | ".join)
def test_every_case_decodes_the_text_of_ar(case: Case) -> None:
    slots, changes = CACHES[case.cache]
    model = Model(tiny_config(**SHAPES[case.shape]), **changes)
    params = opinionated(model.config)
    heat = jnp.full(BATCH, 0.9, jnp.float32)
    ids = jnp.arange(BATCH, dtype=jnp.uint32)
    strategy = dataclasses.replace(STRATEGIES[case.strategy], accept=AcceptRule.COUPLED)
    for sampler in None, Sampler(heat, seed=ids + 7, noise_id=ids):
        ar = decode(model, params, Strategy("ar"), slots, sampler)
        orthrus = decode(model, params, strategy, slots, sampler)
        assert ar.count.tolist() == BUDGETS
        np.testing.assert_array_equal(orthrus.count, ar.count)
        for ours, theirs, count in zip(orthrus.tokens, ar.tokens, ar.count, strict=True):
            assert ours[:count].tolist() == theirs[:count].tolist()
        np.testing.assert_array_equal(orthrus.position, ar.position)
        accepted = orthrus.accepted[orthrus.accepted >= 0]
        if case in FAST:  # these weights suit their shapes; not every pair of the product
            assert accepted.max() > 0, "no draft was accepted: only corrections were compared"


@pytest.mark.parametrize(
    "name", ["paper", *slow(*(name for name in STRATEGIES if name != "paper"))]
)
def test_base_that_emits_its_mask_token_is_decoded_exactly(name: str) -> None:
    config = tiny_config(**FAMILIES["llama"])
    model, params = Model(config), opinionated(config, liked=(3, 9, config.mask_id))
    ar = decode(model, params, Strategy("ar"), 64, None)
    orthrus = decode(model, params, STRATEGIES[name], 64, None)
    assert (ar.tokens == config.mask_id).sum() > 3
    assert orthrus.accepted.max() > 0
    for ours, theirs, count in zip(orthrus.tokens, ar.tokens, ar.count, strict=True):
        assert ours[:count].tolist() == theirs[:count].tolist()


def test_fast_cases_hold_every_row_of_every_table() -> None:
    for index, table in enumerate((SHAPES, CACHES, STRATEGIES)):
        assert {case[index] for case in FAST} == set(table)
    assert len(EVERY) == len(SHAPES) * len(CACHES) * len(STRATEGIES)
