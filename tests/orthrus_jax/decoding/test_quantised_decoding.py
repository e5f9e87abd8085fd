"""Orthrus is AR, token for token, over a quantised cache: all strategies, batches, refills.

Tiles are of 8 tokens, so that a text crosses several of their borders.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orthrus_jax
from orthrus_jax import decoding
from orthrus_jax.attention import KVCache, KVCacheConfig, QuantisedCache
from orthrus_jax.decoding import Sampler, Strategy
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.model import Model
from orthrus_jax.model.pairwise import HEAD
from tests.support.configs import NO_EOS, tiny_config
from tests.support.marks import slow
from tests.support.weights import random_head, random_params

SLOTS, NEW, LOOKAHEAD = 96, 45, 8
CACHE = KVCacheConfig(4, 2, tile=8)
LENGTHS, BUDGETS = [1, 30, 23], [NEW, 20, NEW]
STRATEGIES = {
    "paper": Strategy("orthrus"),
    "paper, short block": Strategy("orthrus", 2),
    "two-forward": Strategy("orthrus-2f"),
    "two-forward, tree": Strategy("orthrus-2f", tree_nodes=7),
    "length blocks": Strategy("orthrus-1f", early_blocks=2),
    "outcome blocks": Strategy("orthrus-1f", early_blocks=0, fresh_blocks=3),
    "tree, both blocks": Strategy("orthrus-1f", tree_nodes=8, early_blocks=2, fresh_blocks=2),
}
FAST = ("paper", "two-forward, tree", "tree, both blocks")


def opinionated(config) -> dict:
    """Random weights that prefer a few tokens, so that drafts are accepted now and then."""
    tree = random_params(config, 1, gain=2.0, copy=True) | {HEAD: random_head(config, 3, gain=0.5)}
    liked = 1 + 1.5 * jnp.isin(jnp.arange(config.vocab_size), jnp.array((3, 9, 14, 30, 41)))
    return tree | {
        "embed_tokens": {"embedding": tree["embed_tokens"]["embedding"] * liked[:, None]}
    }


def prefilled(model, params, sampler=None, lengths=LENGTHS, width=32, slots=SLOTS, **resumed):
    rows = len(lengths)
    prompts = np.random.default_rng(0).integers(0, 63, (3, 64))[:rows, :width].astype(np.int32)
    numbers = lambda values: jnp.asarray(values, jnp.int32)
    return decoding.prefill(
        model, params, prompts, numbers(lengths), numbers(BUDGETS[:rows]), NO_EOS,
        slots=slots, max_new_tokens=NEW, lookahead=LOOKAHEAD, sampler=sampler, **resumed,
    )  # fmt: skip


def decode(model, params, strategy: Strategy, sampler=None, **options):
    """The final state, its arrays in numpy."""
    strategy = strategy.resolve(model.config, head=HEAD in params)
    state = prefilled(model, params, sampler, **options)
    rows = len(state.anchor)
    state = state.replace(drafter=first_carry(strategy, model, rows, SLOTS))
    loop, static = loop_of(strategy, model, sampled=sampler is not None)
    return jax.tree.map(np.asarray, loop(model, params, state, **static))


def texts(state) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(state.tokens, state.count, strict=True)]


def sampler_of(rows: int) -> Sampler:
    ids = jnp.arange(rows, dtype=jnp.uint32)
    return Sampler(jnp.full(rows, 1.2, jnp.float32), seed=ids + 7, noise_id=ids)


@functools.cache
def ar_text(coupled: bool):
    model = Model(tiny_config(), kv_cache=CACHE)
    return decode(
        model, opinionated(model.config), Strategy("ar"), sampler_of(3) if coupled else None
    )


@pytest.mark.parametrize("name", [*FAST, *slow(*(n for n in STRATEGIES if n not in FAST))])
@pytest.mark.parametrize("coupled", [True, *slow(False)])  # greedy texts repeat themselves
def test_every_strategy_decodes_the_text_of_ar(name: str, coupled: bool) -> None:
    model = Model(tiny_config(), kv_cache=CACHE)
    params, sampler = opinionated(model.config), sampler_of(3) if coupled else None
    ar = ar_text(coupled)
    strategy = dataclasses.replace(STRATEGIES[name], accept="coupled", pairwise=False)
    orthrus = decode(model, params, strategy, sampler)
    assert isinstance(ar.cache, QuantisedCache)
    assert ar.count.tolist() == BUDGETS
    assert texts(orthrus) == texts(ar)
    assert orthrus.accepted.max() > 0, "no draft was accepted: only corrections were compared"
    encoded = np.minimum(ar.cache.encoded, orthrus.cache.encoded)
    assert (encoded >= 4 * CACHE.tile).all()
    differing = []
    for b, tiles in enumerate((encoded - CACHE.sink) // CACHE.tile):
        halves = [(*state.cache.k, *state.cache.v) for state in (orthrus, ar)]
        for ours, theirs in zip(*halves, strict=True):
            differing.append(ours.codes[b, :, :tiles] != theirs.codes[b, :, :tiles])
    # A row's last bits depend on how many share its forward, and now and then they decide a code.
    assert np.mean([part.mean() for part in differing]) < 0.02


def test_the_quantised_text_is_another_one() -> None:
    model = Model(tiny_config())
    exact = decode(model, opinionated(model.config), Strategy("ar"), sampler_of(3))
    assert texts(ar_text(True)) != texts(exact)


def test_context_below_sink_and_tail_is_decoded_by_the_usual_program() -> None:
    model = Model(tiny_config(), kv_cache=KVCacheConfig())
    assert isinstance(model.init_cache(2, 384), KVCache)
    assert isinstance(model.init_cache(2, 448), QuantisedCache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["k4v4", "k2v2"])
def test_contexts_over_1000_of_a_trained_base_are_ars(kind: str, tiny_base) -> None:
    """Tiles of 128, as released: the demo's base reads 900 tokens and writes 200 more."""
    model = orthrus_jax.load(tiny_base, dtype="float32", kv_cache=kind)
    text = "Tom has 12 apples. He buys 30 more and gives 7 to Mia. How many has he? " * 60
    prompt = model.tokenizer(text)["input_ids"][:900]
    options = {"max_new_tokens": 200, "min_new_tokens": 200}
    (ar,) = model.complete([prompt], strategy="ar", **options)
    for strategy in ("orthrus", Strategy("orthrus-2f", tree_nodes=20)):
        (orthrus,) = model.complete([prompt], strategy=strategy, **options)
        assert orthrus.tokens == ar.tokens
    assert sum(orthrus.accepted) > 0
