"""Orthrus against AR on whatever hypothesis thinks of: models, prompts, batches, options.

What needs a program of its own (sizes, batch, block, which options are on) is drawn from short
lists; weights, prompts, budgets, seeds, end tokens and stop strings are free.
"""

import dataclasses
import functools
import itertools

import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from orthrus_jax.attention import KVCacheConfig
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import Strategy
from orthrus_jax.llm import LLM
from orthrus_jax.model import params as params_lib
from orthrus_jax.model.pairwise import HEAD
from tests.support import cases as cases_lib
from tests.support.configs import FAMILIES, tiny_config
from tests.support.engine import plan_among, restless
from tests.support.weights import random_head, random_params

VOCAB = 24
PIECES = ["", *("".join(p) for n in (1, 2, 3) for p in itertools.product("abc", repeat=n))][:VOCAB]
SHAPES = {  # layers, heads, key heads, K, tied embeddings, the model's own end tokens, the family
    "small": (1, 2, 1, 4, False, (), "qwen3"),
    "two layers": (2, 4, 2, 5, False, (0, 7), "llama3"),
    "tied": (2, 2, 2, 3, True, (), "qwen2"),
    "shortest block": (1, 4, 1, 2, False, (5,), "qwen3"),
    "long block": (1, 6, 2, 6, False, (0,), "llama"),
    "three key heads": (2, 3, 3, 6, True, (1, 2), "mistral"),
}


# Sampled, the paper's cycle says AR's own text if coupled; the others do under both rules.
STRATEGIES = [dataclasses.replace(s, accept="coupled") for s in cases_lib.STRATEGIES.values()]
# Tiles of 8 tokens: a text crosses several borders. A pass is then of at most 9 slots.
QUANTISED = [KVCacheConfig(4, 4, tile=8), KVCacheConfig(4, 2, tile=8), KVCacheConfig(2, 2, tile=8)]
SHORT_PASSES = [s for s in STRATEGIES if s.tree_nodes < 8]


class Letters:
    """A tokenizer as far as answers need one: each id is a few letters, id 0 is none."""

    def decode(self, ids, **_) -> str:
        return "".join(PIECES[i] for i in ids)


@functools.cache
def config_of(shape: str) -> ModelConfig:
    layers, heads, groups, block, tied, eos, family = SHAPES[shape]
    return tiny_config(
        vocab_size=VOCAB,
        mask_token_id=VOCAB - 1,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        block_size=block,
        tie_word_embeddings=tied,
        eos_token_ids=eos,
        **FAMILIES[family],
    )


@functools.cache
def generator_of(shape: str, kv_cache: KVCacheConfig | None) -> LLM:
    return LLM(config_of(shape), weights_of(shape, 0, False), Letters(), kv_cache=kv_cache)


@functools.cache
def weights_of(shape: str, seed: int, copy: bool) -> dict:
    """Random weights that prefer a few tokens, so that drafts are right now and then."""
    config = config_of(shape)
    tree = random_params(config, seed, gain=2.0, copy=copy)
    liked = 1 + 1.5 * jnp.isin(jnp.arange(VOCAB), jnp.array([3, 4, 9, 14]))
    frozen, diffusion = params_lib.split(tree | {HEAD: random_head(config, seed % 3, gain=0.4)})
    if config.tie_word_embeddings:
        table = frozen["embed_tokens"]["embedding"] * liked[:, None]
        frozen = frozen | {"embed_tokens": {"embedding": table}}
    else:
        frozen = frozen | {"lm_head": {"weight": frozen["lm_head"]["weight"] * liked[:, None]}}
    return params_lib.merge(frozen, diffusion)


@st.composite
def cases(
    draw,
    shapes,
    batches,
    draft_lengths,
    leasts,
    strategies=STRATEGIES,
    copies=(False, True),
    kv_caches=(None,),
):
    """A model, its prompts, and the options of both modes."""
    shape = draw(st.sampled_from(shapes))
    ids = st.integers(0, VOCAB - 2)
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=40), min_size=1, max_size=5))
    budget = draw(st.integers(1, 24))
    eos = SHAPES[shape][5]
    stops = st.lists(st.text("abc", min_size=1, max_size=6), max_size=2)
    options = {
        "max_new_tokens": budget,
        # With the model's own always three or four: one shape.
        "stop_token_ids": draw(st.lists(ids, min_size=3 - len(eos), max_size=4 - len(eos))),
        "stop": draw(stops),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    if draw(st.sampled_from(leasts)):
        options["min_new_tokens"] = draw(st.integers(1, budget))
    if draw(st.booleans()):
        options |= {
            "temperature": draw(st.sampled_from([0.3, 0.7, 1.0, 1.5])),
            "top_p": draw(st.sampled_from([0.5, 0.9, 0.99])),
            "top_k": draw(st.sampled_from([0, 1, 5])),
            "min_p": draw(st.sampled_from([0.0, 0.05])),
        }
    strategy = draw(st.sampled_from(strategies))
    how = {
        "batch_size": draw(st.sampled_from(batches)),
        "refill": draw(st.booleans()),
        "strategy": dataclasses.replace(
            strategy, draft_length=draw(st.sampled_from(draft_lengths))
        ),
    }
    weights = draw(st.integers(0, 7)), draw(st.sampled_from(copies))
    return (shape, draw(st.sampled_from(kv_caches))), weights, prompts, options, how


def assert_orthrus_is_ar(case) -> None:
    (shape, kv_cache), weights, prompts, options, how = case
    generator = generator_of(shape, kv_cache)
    generator.params = weights_of(shape, *weights)
    ar = generator.complete(prompts, strategy="ar", **options)
    orthrus = generator.complete(prompts, **options, **how)
    shown = lambda found: [(c.prompt, c.tokens, c.text, c.finish_reason) for c in found]
    assert shown(orthrus) == shown(ar)

    ends = {*SHAPES[shape][5], *options["stop_token_ids"]}
    budget, least = options["max_new_tokens"], options.get("min_new_tokens", 0)
    for completion in orthrus:
        tokens = completion.tokens
        assert 1 <= len(tokens) <= budget
        assert not set(tokens[:-1]) & ends
        whole = Letters().decode(tokens)
        assert whole.startswith(completion.text)
        stopped = any(s in whole for s in options["stop"])
        assert stopped or whole == completion.text
        assert not any(s in completion.text for s in options["stop"])
        assert stopped or len(tokens) == budget or tokens[-1] in ends
        assert not set(tokens[:least]) & ends
        reason = "stop" if stopped or tokens[-1] in ends else "length"
        assert completion.finish_reason == reason
        accepted.append(sum(completion.accepted) / max(len(completion.accepted), 1))


# Strategies between which a queue switches at random pauses.
AMONG = [
    Strategy("ar"),
    *(s for name, s in cases_lib.STRATEGIES.items() if name in (
        "paper, pairwise", "two-forward, tree", "tree, both blocks, pairwise")),
]  # fmt: skip


@functools.cache
def restless_of(shape: str) -> LLM:
    model = LLM(config_of(shape), weights_of(shape, 0, False), Letters())
    coupled = [dataclasses.replace(s, accept="coupled") for s in AMONG]
    model.contenders = lambda *_: plan_among(coupled).auto
    return model


def assert_switching_is_ar(case, seed: int) -> None:
    (shape, kv_cache), weights, prompts, options, how = case
    model, plain = restless_of(shape), generator_of(shape, kv_cache)
    model.params = plain.params = weights_of(shape, *weights)
    choosers = restless(model.engine, seed=seed, longest=4)
    how = {name: how[name] for name in ("batch_size", "refill")}
    ar = plain.complete(prompts, strategy="ar", **options)
    auto = model.complete(prompts, mode="auto", **options, **how)
    shown = lambda found: [(c.prompt, c.tokens, c.text, c.finish_reason) for c in found]
    assert shown(auto) == shown(ar)
    ran.extend({strategy for strategy, *_ in choosers[0].turns})
    accepted.extend(sum(c.accepted) / max(len(c.accepted), 1) for c in auto)


ran: list[Strategy] = []
accepted: list[float] = []  # acceptance lengths seen: a drafter that is never right tests little
unhurried = functools.partial(
    hypothesis.settings, deadline=None, derandomize=True, database=None, print_blob=False
)


def test_orthrus_is_ar_on_a_few_random_cases() -> None:
    accepted.clear()

    @unhurried(max_examples=40)
    @hypothesis.given(cases(["small", "two layers"], [3], [None], [False], STRATEGIES[::3], [True]))
    def check(case) -> None:
        assert_orthrus_is_ar(case)

    check()
    assert max(accepted) > 1


def switching_cases(shapes, batches):
    drawn = cases(shapes, batches, [None], [False], copies=[True])
    return st.tuples(drawn, st.integers(0, 99))


def test_switching_at_random_is_ar_on_a_few_random_cases() -> None:
    accepted.clear()

    @unhurried(max_examples=15)
    @hypothesis.given(switching_cases(["small"], [4]))
    def check(case) -> None:
        assert_switching_is_ar(*case)

    check()
    assert {s.method for s in ran} == {"ar", "orthrus", "orthrus-2f", "orthrus-1f"}
    assert max(accepted) > 1


@pytest.mark.slow
def test_switching_at_random_is_ar_on_many_random_cases() -> None:
    @unhurried(max_examples=200)
    @hypothesis.given(switching_cases(["small", "two layers", "tied", "three key heads"], [1, 4]))
    def check(case) -> None:
        assert_switching_is_ar(*case)

    check()


@pytest.mark.slow
def test_orthrus_is_ar_on_many_random_cases() -> None:
    accepted.clear()

    @unhurried(max_examples=600)
    @hypothesis.given(cases(list(SHAPES), [1, 3], [None, 2], [False, True]))
    def check(case) -> None:
        assert_orthrus_is_ar(case)

    check()
    assert len(accepted) > 600
    assert sum(accepted) / len(accepted) > 0.2


def test_orthrus_is_ar_on_a_few_random_cases_over_a_quantised_cache() -> None:
    accepted.clear()
    options = {"copies": [True], "kv_caches": QUANTISED[1:2]}

    @unhurried(max_examples=30)
    @hypothesis.given(cases(["small"], [3], [None], [False], SHORT_PASSES[::4], **options))
    def check(case) -> None:
        assert_orthrus_is_ar(case)

    check()
    assert max(accepted) > 1


@pytest.mark.slow
def test_orthrus_is_ar_on_many_random_cases_over_a_quantised_cache() -> None:
    accepted.clear()

    @unhurried(max_examples=2000)
    @hypothesis.given(
        cases(list(SHAPES), [1, 3], [None, 2], [False, True], SHORT_PASSES, kv_caches=QUANTISED)
    )
    def check(case) -> None:
        assert_orthrus_is_ar(case)

    check()
    assert len(accepted) > 2000
    assert sum(accepted) / len(accepted) > 0.2
