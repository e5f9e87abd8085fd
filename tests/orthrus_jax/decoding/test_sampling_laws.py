"""Whole texts above temperature 0: each accept rule's are distributed as AR's, or are AR's.

The distributions are those of a model that can be enumerated (fake_models/tabular.py), each
compared with the law of whole texts by one chi-square. All seeds are fixed: no test here fails by
chance. The power of the comparison is tested as well: it must refuse rules with planted faults,
among them a verdict that accepts 0.5 % too often.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.decoding import AcceptRule, Strategy, speculative
from orthrus_jax.drafters import DiffusionDrafter
from orthrus_jax.model.pairwise import HEAD
from tests.support.decoding import (
    DrawingDrafter,
    by_the_future,
    by_the_past,
    orthrus_decode,
    switching_decode,
)
from tests.support.fake_models import tabular
from tests.support.fake_models.tabular import EOS, MASK, VOCAB, Setting, TabularModel
from tests.support.marks import slow
from tests.support.sampling import (
    FAULTS,
    HALF_PERCENT,
    Fit,
    fit,
    plain_rule,
    sampler_of,
    together,
)
from tests.support.weights import random_head

K = tabular.SMALL.block_size
N, SLOTS = 6, 16  # tokens a text, so two to five block ends
REACH = 5  # drafts verified at once, at most
ROWS, CHUNK = 1 << 13, 1 << 17  # texts of each setting of a mixture; texts of a setting alone
CUTS = ({}, {"top_k": 2}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.9, "min_p": 0.2})
PROMPTS = ((1, 2), (2,), (0, 2, 1))
SETTINGS = [
    Setting(temperature, **cut, prompt=PROMPTS[(i + 2 * j) % 3])
    for i, temperature in enumerate((0.7, 1.3))
    for j, cut in enumerate(CUTS)
]
GREEDY = Setting(0.0, prompt=(1, 2))
HEADED = functools.partial(DiffusionDrafter, candidates=3)  # of 5 tokens
TABLES = tabular.tables(0) | {HEAD: random_head(tabular.SMALL, 4)}
CONTRARY = tabular.contrary(TABLES)


def sampled(
    loop: str,
    settings: list[Setting],
    rows: int = ROWS,
    *,
    model: TabularModel | None = None,
    tables: dict = TABLES,
    first_seed: int = 0,
    filtered: bool = True,
    **how,
):
    """Decode one batch of `rows` texts of each setting; row r is of setting r % len(settings).

    `loop` is "ar", "orthrus", "two", "ahead" or "switching", `how` what its function is told
    beside, or fields of a Strategy. Returns the final state's small arrays in numpy, its tokens
    padded with MASK.
    """
    settings, model = settings * rows, model or TabularModel()
    batch, seeds = len(settings), first_seed + np.arange(rows).repeat(len(settings) // rows)
    streams = np.tile(np.arange(len(settings) // rows), rows)
    width = max(len(s.prompt) for s in settings)
    prompts = [[*s.prompt, *[MASK] * (width - len(s.prompt))] for s in settings]
    early = jnp.array([s.min_tokens for s in settings], jnp.int32)
    state = decoding.prefill(
        model,
        tables,
        jnp.asarray(np.array(prompts), jnp.int32),
        jnp.asarray([len(s.prompt) for s in settings], jnp.int32),
        jnp.full(batch, N, jnp.int32),
        jnp.array([EOS, -1], jnp.int32),
        slots=SLOTS,
        max_new_tokens=N,
        sampler=sampler_of(settings, seeds, streams, filtered=filtered),
        min_tokens=early if early.any() else None,
        lookahead=REACH,
    )
    loops = {
        "ar": decoding.ar_decode,
        "orthrus": orthrus_decode,
        "two": decoding.two_forward_decode,
        "ahead": decoding.one_forward_decode,
        "switching": switching_decode,
    }
    if loop in ("two", "ahead"):
        method = "orthrus-2f" if loop == "two" else "orthrus-1f"
        how = {"pairwise": False} | how
        strategy = Strategy(method, how.pop("block_size", K), candidates=3, **how)
        how = {"strategy": strategy.resolve(model.config, head=True)}
        if loop == "ahead":
            state = state.replace(drafter=decoding.no_draft(how["strategy"], batch))
    state = loops[loop](model, tables, state, **how)
    state = state.replace(cache=None, sampler=None, drafter=None)
    state = jax.tree.map(np.asarray, state)
    written = np.arange(N) < state.count[:, None]
    return state.replace(tokens=np.where(written, state.tokens, MASK))


@functools.cache
def law_of(setting: Setting) -> np.ndarray:
    return tabular.law(TABLES, setting, N)


def fits(state, settings: list[Setting]) -> list[Fit]:
    """How well each setting's whole texts fit their exact law."""
    codes = tabular.code(state.tokens).reshape(-1, len(settings))
    counts = [np.bincount(column, minlength=VOCAB**N) for column in codes.T]
    return [fit(c, law_of(s)) for c, s in zip(counts, settings, strict=True)]


def assert_exact(state, settings: list[Setting]) -> None:
    results = fits(state, settings)
    assert sum(r.impossible for r in results) == 0, results
    assert together(results).p > 1e-3, together(results)
    for setting, result in zip(settings, results, strict=True):
        assert result.p > 1e-4, (setting, result)


MIXTURE = [*SETTINGS, GREEDY]  # rows of every temperature, filter and prompt length in one batch
RULES = {
    "ar": {"loop": "ar"},
    "a draw from q": {"loop": "orthrus", "drafter": DrawingDrafter},
    "the likeliest of q": {"loop": "orthrus", "drafter": DiffusionDrafter},
    "coupled": {"loop": "orthrus", "rule": AcceptRule.COUPLED},
    "the likeliest given the one before": {"loop": "orthrus", "drafter": HEADED},
    "coupled, pairwise": {"loop": "orthrus", "rule": AcceptRule.COUPLED, "drafter": HEADED},
    "ahead, a tree, fresh, pairwise": {
        "loop": "ahead",
        "early_blocks": 2,
        "fresh_blocks": 2,
        "tree_nodes": 5,
        "pairwise": True,
    },
    "two forwards, pairwise": {"loop": "two", "pairwise": True},
    "ahead": {"loop": "ahead", "early_blocks": 2},
    "ahead, all ends": {"loop": "ahead", "early_blocks": 3},
    "ahead, fresh": {"loop": "ahead", "early_blocks": 1, "fresh_blocks": 3},
    "ahead, fresh alone": {"loop": "ahead", "early_blocks": 0, "fresh_blocks": 3},
    "ahead, a tree": {"loop": "ahead", "early_blocks": 2, "tree_nodes": 5},
    "ahead, a tree, fresh": {
        "loop": "ahead",
        "early_blocks": 2,
        "fresh_blocks": 2,
        "tree_nodes": 5,
    },
    "two forwards": {"loop": "two"},
    "two forwards, a tree": {"loop": "two", "tree_nodes": 5},
}
SIZES = [K, K - 1]


@functools.cache
def mixture(rule: str, block_size: int | None = None):
    how = {} if block_size is None else {"block_size": block_size}
    return sampled(settings=MIXTURE, **RULES[rule], **how)


def greedy_rows(state) -> np.ndarray:
    return state.tokens[MIXTURE.index(GREEDY) :: len(MIXTURE)]


def test_ar_texts_are_distributed_as_the_law_has_it() -> None:
    state = mixture("ar")
    assert_exact(state, MIXTURE)
    assert len(np.unique(greedy_rows(state), axis=0)) == 1


@pytest.mark.parametrize("block_size", [SIZES[0], *slow(*SIZES[1:])])
@pytest.mark.parametrize(
    "rule",
    [
        *("a draw from q", "the likeliest of q", "ahead", "ahead, a tree, fresh"),
        *slow("ahead, all ends", "ahead, fresh", "ahead, fresh alone", "ahead, a tree"),
        *slow("two forwards", "two forwards, a tree"),
        *("the likeliest given the one before", "ahead, a tree, fresh, pairwise"),
        *slow("two forwards, pairwise"),
    ],
)
def test_rejection_keeps_the_law_of_whole_texts(rule: str, block_size: int) -> None:
    state = mixture(rule, block_size)
    assert_exact(state, MIXTURE)
    np.testing.assert_array_equal(greedy_rows(state), greedy_rows(mixture("ar")))
    # What the law was kept through: every number of drafts accepted, and several block ends.
    often = np.bincount(state.accepted[state.accepted >= 0], minlength=block_size)
    assert len(often) == block_size
    assert often.min() > 0.01 * often.sum()
    assert (state.cycles >= (2 if rule.startswith("two") else 3)).mean() > 0.2


DRAWN = ["ahead", "ahead, a tree, fresh, pairwise", "ahead, a tree, fresh", "ahead, a tree"]
DRAWN += ["two forwards", "two forwards, a tree", "two forwards, pairwise"]


@pytest.mark.parametrize("block_size", [SIZES[0], *slow(*SIZES[1:])])
@pytest.mark.parametrize(
    "rule",
    [
        *DRAWN[:2],
        *slow(*DRAWN[2:]),
    ],
)
def test_overlapped_sampled_texts_are_the_ar_texts(rule: str, block_size: int) -> None:
    """Under both rules: what is drawn is the AR view's own, and drafts are compared with it."""
    state = mixture(rule, block_size)
    np.testing.assert_array_equal(state.tokens, mixture("ar").tokens)
    assert (state.accepted[state.accepted >= 0] == block_size - 1).mean() > 0.01


@pytest.mark.parametrize("block_size", [SIZES[0], *slow(*SIZES[1:])])
@pytest.mark.parametrize("rule", ["coupled", "coupled, pairwise"])
def test_coupled_texts_are_the_ar_texts(rule: str, block_size: int) -> None:
    state = mixture(rule, block_size)
    np.testing.assert_array_equal(state.tokens, mixture("ar").tokens)
    assert (state.accepted[state.accepted >= 0] == block_size - 1).mean() > 0.1


@pytest.mark.slow
def test_switches_that_follow_from_the_past_keep_the_law_of_whole_texts() -> None:
    """A choice of the next cycle by accepted drafts and emitted tokens, sequence by sequence."""
    state = sampled("switching", MIXTURE, choose=by_the_past)
    assert_exact(state, MIXTURE)
    np.testing.assert_array_equal(greedy_rows(state), greedy_rows(mixture("ar")))


@pytest.mark.slow
def test_switch_that_looks_at_the_next_draw_shows_in_the_law() -> None:
    state = sampled("switching", MIXTURE, choose=by_the_future)
    result = together(fits(state, MIXTURE))
    assert result.p < 1e-12, result


@pytest.mark.parametrize("filtered", [True, *slow(False)])
def test_drafts_distributed_as_p_are_all_accepted(filtered: bool) -> None:
    settings = MIXTURE if filtered else [Setting(0.7), Setting(1.3), Setting(0.0)]
    agreeing = tabular.agreeing(TABLES)
    how = {"drafter": DrawingDrafter, "filtered": filtered}
    state = sampled("orthrus", settings, 1 << 10, tables=agreeing, **how)
    np.testing.assert_array_equal(state.cycles, -(-(state.count - 1) // K))
    whole = np.arange(N) < state.cycles[:, None] - 1
    assert (state.accepted[whole] == K - 1).all()


@pytest.mark.parametrize(
    "fault",
    [FAULTS[1], *slow(*FAULTS[2:])],
)
def test_planted_fault_shows_in_the_law_of_whole_texts(fault: str, monkeypatch) -> None:
    """At the settings and the number of texts of the tests above."""
    monkeypatch.setattr(speculative, "accept_rejection", functools.partial(plain_rule, fault=fault))
    model = TabularModel(name=fault)
    state = sampled("orthrus", MIXTURE, model=model, drafter=DrawingDrafter)
    result = together(fits(state, MIXTURE))
    assert result.p < 1e-12, result


def rejection_fit(
    setting: Setting,
    texts: int,
    drafter: type,
    monkeypatch,
    *,
    fault: str = "",
    tables: dict = TABLES,
    block_size: int = K,
) -> Fit:
    """The fit of `texts` texts of one setting, with a fault planted if one is named."""
    filtered, counts = setting._replace(temperature=1.0, prompt=()) != Setting(prompt=()), 0
    how = {"drafter": drafter, "block_size": block_size, "filtered": filtered}
    with monkeypatch.context() as patch:
        if fault:
            rule = functools.partial(plain_rule, fault=fault)
            patch.setattr(speculative, "accept_rejection", rule)
        for first in range(0, texts, CHUNK):
            model = TabularModel(name=fault)
            some = sampled(
                "orthrus", [setting], CHUNK, model=model, tables=tables, first_seed=first, **how
            )
            counts = counts + np.bincount(tabular.code(some.tokens), minlength=VOCAB**N)
    return fit(counts, law_of(setting))


@pytest.mark.parametrize("drafter", [DiffusionDrafter, *slow(DrawingDrafter)])
def test_half_a_percent_accepted_in_excess_shows(drafter: type, monkeypatch) -> None:
    """The power of the chi-square: 2^17 texts, and a verdict that errs by 0.005."""
    args = (Setting(0.7), CHUNK, drafter, monkeypatch)
    assert rejection_fit(*args, tables=CONTRARY).p > 1e-3
    assert rejection_fit(*args, tables=CONTRARY, fault=HALF_PERCENT).p < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [DiffusionDrafter, DrawingDrafter])
@pytest.mark.parametrize("setting", SETTINGS)
def test_million_texts_of_each_setting_fit_their_law(
    setting: Setting, drafter: type, monkeypatch
) -> None:
    args = (setting, 1 << 20, drafter, monkeypatch)
    assert rejection_fit(*args, block_size=K - 1).p > 1e-3
    assert rejection_fit(*args, tables=CONTRARY).p > 1e-3
    assert rejection_fit(*args, tables=CONTRARY, fault=HALF_PERCENT).p < 1e-6


# --- The least number of tokens ------------------------------------------------------------------

LEAST = [
    Setting(t, prompt=p, min_tokens=n)
    for n, t, p in zip((0, 1, 3, 4, 6), (1.0, 0.8, 1.2, 1.0, 0.7), itertools.cycle(PROMPTS))
]


@pytest.mark.parametrize("rule", [*slow("ar", "a draw from q"), "the likeliest of q", "coupled"])
def test_no_text_ends_before_its_least_number_of_tokens(rule: str) -> None:
    """And the texts that may end are distributed as the law of such texts has it."""
    settings = [*LEAST, GREEDY._replace(min_tokens=3)]
    state = sampled(settings=settings, filtered=False, **RULES[rule])
    least = np.tile([s.min_tokens for s in settings], len(state.count) // len(settings))
    index = np.arange(N)
    assert not ((state.tokens == EOS) & (index < least[:, None])).any()
    assert (state.count >= np.maximum(least, 1)).all()
    for n in (1, 3, 4):
        assert (state.tokens[least == n, n] == EOS).any(), "no text ends as soon as it may"
    assert_exact(state, settings)
