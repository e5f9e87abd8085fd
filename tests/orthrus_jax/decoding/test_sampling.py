"""Exact above temperature 0: each rule's whole texts are distributed as AR's, or are AR's.

The distributions are those of a model that can be enumerated (fake_models/tabular.py), each
compared with the law of whole texts by one chi-square. All seeds are fixed: no test here fails by
chance. What the comparison can see is shown, not claimed: it must refuse rules with planted faults,
a verdict that accepts 0.5 % more than it may among them.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from orthrus_jax import decoding
from orthrus_jax.decoding import AcceptRule, Strategy, sampling, speculative
from orthrus_jax.decoding.sampling import (
    Acceptance,
    Drafts,
    Filters,
    NoiseKey,
    Sampler,
    accept_rejection,
    gumbel_sample,
    probabilities,
)
from orthrus_jax.drafters import DiffusionDrafter
from orthrus_jax.engine import SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, ar_segment
from tests.support.configs import tiny_config
from tests.support.decoding import DrawingDrafter, orthrus_decode
from tests.support.fake_models import tabular
from tests.support.fake_models.tabular import EOS, MASK, VOCAB, Setting, TabularModel, processed
from tests.support.marks import slow
from tests.support.weights import random_params

K = tabular.SMALL.block_size


def sampler_of(settings: list[Setting], seeds=0, streams=None, *, filtered: bool = True) -> Sampler:
    """One row for each setting; its stream is its place in the list unless given."""
    column = lambda name, dtype: jnp.asarray([getattr(s, name) for s in settings], dtype)
    rows = len(settings)
    filters = Filters(
        column("top_k", jnp.int32), column("top_p", jnp.float32), column("min_p", jnp.float32)
    )
    return Sampler(
        temperature=column("temperature", jnp.float32),
        seed=jnp.broadcast_to(jnp.asarray(seeds, jnp.uint32), rows),
        noise_id=jnp.asarray(np.arange(rows) if streams is None else streams, jnp.uint32),
        filters=filters if filtered else None,
    )


# --- The distribution of one token ---------------------------------------------------------------

FILTERS = {
    "off": {},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k of more than there are": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "a tiny top_p": {"top_p": 1e-6},
    "top_p of almost all": {"top_p": 0.999999},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
    "top_k and top_p": {"top_k": 4, "top_p": 0.6},
}
MIXED = [
    Setting(temperature=temperature, **filters)
    for temperature in (0.0, 0.3, 1.0, 2.5)
    for filters in FILTERS.values()
]


def logits_of(seed: int, rows: int = len(MIXED), vocab: int = 64) -> np.ndarray:
    """float32[rows, 3, vocab], in the last a few forbidden tokens."""
    logits = np.random.default_rng(seed).normal(0, 3, (rows, 3, vocab)).astype(np.float32)
    logits[:, 2, ::7] = -np.inf
    return logits


@pytest.mark.parametrize("seed", range(4))
def test_distribution_equals_the_reference_row_by_row(seed: int) -> None:
    """Every temperature and filter in one batch: each row obeys its own."""
    logits = logits_of(seed)
    ours = np.asarray(probabilities(jnp.asarray(logits), sampler_of(MIXED)))
    for row, setting in enumerate(MIXED):
        reference = np.stack([processed(x, setting) for x in logits[row]])
        np.testing.assert_array_equal(ours[row] > 0, reference > 1e-40, err_msg=str(setting))
        np.testing.assert_allclose(ours[row], reference, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("levels", [3, 12])
def test_tokens_equal_to_the_last_one_kept_are_kept(levels: int) -> None:
    logits = np.random.default_rng(levels).integers(0, levels, (len(MIXED), 3, 64)) / 2
    ours = np.asarray(probabilities(jnp.asarray(logits, jnp.float32), sampler_of(MIXED)))
    for row, setting in enumerate(MIXED):
        for t in range(3):
            kept = ours[row, t] > 0
            if setting.temperature == 0:  # the one tie that is broken: the first is the likeliest
                assert np.flatnonzero(kept).tolist() == [logits[row, t].argmax()]
            elif setting.top_p == 1:  # elsewhere rounding decides whether a tie is needed at all
                np.testing.assert_array_equal(kept, processed(logits[row, t], setting) > 0)
            assert not kept[logits[row, t] < logits[row, t][kept].min()].any()
            if setting.temperature > 0:
                assert kept[logits[row, t] >= logits[row, t][kept].min()].all()


def test_distribution_equals_hugging_face() -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = logits_of(9)
    ours = np.asarray(probabilities(jnp.asarray(logits), sampler_of(MIXED)))
    for row, setting in enumerate(MIXED):
        if setting.temperature == 0:
            continue
        scores = hf.TemperatureLogitsWarper(setting.temperature)(None, torch.tensor(logits[row]))
        if setting.top_k:
            scores = hf.TopKLogitsWarper(setting.top_k)(None, scores)
        if setting.top_p < 1:
            scores = hf.TopPLogitsWarper(setting.top_p)(None, scores)
        if setting.min_p:
            scores = hf.MinPLogitsWarper(setting.min_p)(None, scores)
        theirs = scores.softmax(-1).numpy()
        np.testing.assert_array_equal(ours[row] > 0, theirs > 0, err_msg=str(setting))
        np.testing.assert_allclose(ours[row], theirs, rtol=2e-5, atol=1e-30)


def test_filters_that_are_off_change_nothing() -> None:
    settings = [Setting(temperature=t) for t in (0.0, 0.5, 1.0, 3.0)]
    logits = jnp.asarray(logits_of(11, len(settings)))
    on, off = (probabilities(logits, sampler_of(settings, filtered=f)) for f in (True, False))
    np.testing.assert_allclose(on, off, rtol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    settings = [Setting(t, **f) for t in (0.0, 0.7, 1.5) for f in ({}, {"top_k": 4, "top_p": 0.9})]
    logits, times = logits_of(12, len(settings), 16)[:, :1], 1 << 15
    sampler = sampler_of(settings)
    probs = probabilities(jnp.asarray(logits), sampler).repeat(times, axis=1)
    positions = jnp.broadcast_to(jnp.arange(times), (len(settings), times))
    for purpose in (NoiseKey.TOKEN, NoiseKey.DRAFT):
        tokens = np.asarray(gumbel_sample(probs, sampler, positions, purpose))
        assert tokens.dtype == np.int32
        for row, setting in enumerate(settings):
            counts = np.bincount(tokens[row], minlength=16)
            result = fit(counts, processed(logits[row, 0], setting))
            assert result.p > 1e-3, (purpose, setting, result)


@pytest.mark.xfail(strict=True, reason="jax.random.gumbel's default noise ends at 16")
def test_rare_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """A large vocabulary's tail: many tokens of 3e-8 each, of which 4 must come, and not 0.3."""
    vocab, each, rows, chunks = 1 << 14, 3e-8, 1 << 10, 8
    probs = jnp.full((1, rows, vocab), each, jnp.float32).at[..., 0].set(1 - each * (vocab - 1))
    sampler = sampler_of([Setting()])
    some = jax.jit(lambda at: (gumbel_sample(probs, sampler, at, NoiseKey.TOKEN) > 0).sum())
    found = sum(int(some(jnp.arange(rows)[None] + i * rows)) for i in range(chunks))
    assert 2 <= found <= 9, found


def test_noise_depends_on_seed_noise_id_position_and_purpose_alone() -> None:
    probs = jnp.ones((2, 64, 256)) / 256

    def text(seeds, streams, first=0, purpose=NoiseKey.TOKEN):
        sampler = sampler_of([Setting()] * 2, np.array(seeds), streams)
        positions = first + jnp.tile(jnp.arange(64), (2, 1))
        return np.asarray(gumbel_sample(probs, sampler, positions, purpose))

    base = text([5, 5], [1, 1])
    np.testing.assert_array_equal(base[0], base[1])
    np.testing.assert_array_equal(base, text([5, 5], [1, 1]))
    np.testing.assert_array_equal(text([5, 9], [1, 4])[0], base[0])  # whatever the row beside it
    np.testing.assert_array_equal(text([5, 5], [1, 1], first=16)[:, :48], base[:, 16:])
    others = {
        "seed": text([6, 2**32 - 1], [1, 1]),
        "stream": text([5, 5], [2, 2**32 - 1]),
        "position": text([5, 5], [1, 1], first=100),
        "seed and stream exchanged": text([1, 1], [5, 5]),
        "purpose": text([5, 5], [1, 1], purpose=NoiseKey.DRAFT),
        "the other purpose": text([5, 5], [1, 1], purpose=NoiseKey.ACCEPT),
    }
    for name, other in others.items():
        assert (other == base).mean() < 0.05, name
    assert len({x.tobytes() for x in others.values()}) == len(others)


REFUSED = {
    "temperature": [(-0.1, "0 or more"), (float("nan"), "0 or more"), (float("inf"), "0 or more")],
    "top_k": [(-1, "0 (off) or more")],
    "top_p": [(0.0, "above 0 and at most 1 (off)"), (1.01, "above 0 and at most 1 (off)")],
    "min_p": [(-0.1, "from 0 (off) to below 1"), (1.0, "from 0 (off) to below 1")],
    "seed": [(-1, "from 0 to 4294967295"), (2**32, "from 0 to 4294967295")],
    "max_new_tokens": [(0, "at least 1")],
    "min_new_tokens": [(-1, "from 0 to max_new_tokens=256"), (257, "from 0 to max_new_tokens=256")],
    "stop": [("end", "a sequence of strings, none empty"), (("",), "a sequence of strings")],
    "stop_token_ids": [((3, -1), "ids of 0 or more")],
    "n": [(0, "at least 1")],
}


@pytest.mark.parametrize(
    ("name", "value", "limit"), [(n, v, m) for n, values in REFUSED.items() for v, m in values]
)
def test_bad_value_is_refused_by_name_and_limit(name, value, limit) -> None:
    with pytest.raises(UserError) as refusal:
        SamplingParams(**{name: value})
    assert str(refusal.value).startswith(f"{name}={value!r} must be {limit}")


def test_several_equal_samples_are_refused_and_several_unequal_ones_are_not() -> None:
    with pytest.raises(UserError, match="n=3 with temperature=0 would give 3 equal answers"):
        SamplingParams(n=3)
    assert SamplingParams(n=3, temperature=0.5).n == 3


def test_limits_themselves_are_allowed() -> None:
    params = SamplingParams(
        temperature=0.0, top_p=1.0, min_p=0.0, seed=2**32 - 1, max_new_tokens=1, min_new_tokens=1
    )
    assert not params.filtered
    assert all(SamplingParams(**f).filtered for f in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}))


# --- The rule of rejection, and faults planted in it ---------------------------------------------

HALF_PERCENT = "accepts 0.5 % more"
FAULTS = (
    HALF_PERCENT,
    "replaces from p",
    "bonus from q",
    "one noise for draft and verdict",
    "one noise for draft and replacement",
    "one noise for all replacements",
)


def plain_rule(
    drafts: Drafts, target, sampler: Sampler, positions, *, fault: str = ""
) -> Acceptance:
    """`accept_rejection` told plainly, and with one fault if named."""
    tokens, q = drafts
    index = jnp.arange(target.shape[1])
    if q is None:
        q = jax.nn.one_hot(tokens, target.shape[-1])
    pick = lambda probs: jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]
    p_token, q_token = pick(target[:, :-1]), pick(q)
    if fault == HALF_PERCENT:  # of the tokens that p can say at all
        p_token = jnp.where(p_token > 0, p_token + 0.005 * q_token, 0)
    purpose = NoiseKey.DRAFT if fault == "one noise for draft and verdict" else NoiseKey.ACCEPT
    keys = sampling._keys(sampler, positions[:, :-1], purpose)
    refused = jax.vmap(jax.vmap(jax.random.uniform))(keys) * q_token >= p_token
    accepted = jnp.where(refused.any(1), refused.argmax(1), tokens.shape[1])

    left = jnp.maximum(target - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
    if fault == "bonus from q":
        left = left.at[:, -1].set(q[:, -1])
    if fault == "replaces from p":
        left = target
    left = jnp.where(left.sum(-1, keepdims=True) > 0, left, target)
    purpose = NoiseKey.DRAFT if fault == "one noise for draft and replacement" else NoiseKey.TOKEN
    if fault == "one noise for all replacements":
        positions = jnp.zeros_like(positions)
    own = gumbel_sample(left, sampler, positions, purpose)
    own = jnp.where(index == accepted[:, None], own, -1)
    padded = jnp.pad(tokens, ((0, 0), (0, 1)))
    return Acceptance(jnp.where(index < accepted[:, None], padded, own), accepted)


@pytest.mark.parametrize("drafter", [DiffusionDrafter, *slow(DrawingDrafter)])
def test_rejection_rule_equals_the_plain_one(drafter: type) -> None:
    """The same tokens from the same noise, for p near q, far from it and equal to it."""
    rows, rng = 3000, np.random.default_rng(0)
    settings = [Setting(t, **f) for t in (0.0, 0.6, 1.4) for f in ({}, {"top_k": 3})]
    settings = list(itertools.islice(itertools.cycle(settings), rows))
    sampler = sampler_of(settings, seeds=1)
    p_logits = rng.normal(0, 2, (rows, K, 12))
    apart = rng.choice([0.0, 0.3, 3.0], (rows, K, 1)) * rng.normal(0, 1, p_logits.shape)
    p, q = (
        probabilities(jnp.asarray(x, jnp.float32), sampler)
        for x in (p_logits, (p_logits + apart)[:, :-1])
    )
    positions = jnp.asarray(rng.integers(0, 50, (rows, 1)) + np.arange(K))
    if drafter is DrawingDrafter:
        drafts = Drafts(gumbel_sample(q, sampler, positions[:, :-1], NoiseKey.DRAFT), q)
    else:
        drafts = Drafts(q.argmax(-1).astype(jnp.int32))
    ours, plain = (
        jax.jit(rule)(drafts, p, sampler, positions) for rule in (accept_rejection, plain_rule)
    )
    np.testing.assert_array_equal(ours.accepted, plain.accepted)
    emitted = np.arange(K) <= np.asarray(ours.accepted)[:, None]
    np.testing.assert_array_equal(
        np.asarray(ours.tokens)[emitted], np.asarray(plain.tokens)[emitted]
    )
    assert np.bincount(ours.accepted, minlength=K).min() > 100, "a case that is hardly met"


# --- The distribution of whole texts -------------------------------------------------------------

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
TABLES = tabular.tables(0)
CONTRARY = tabular.contrary(TABLES)


class Fit(NamedTuple):
    """How far counts are from a law; `impossible` counts texts of probability 0."""

    statistic: float
    freedom: int
    impossible: int = 0

    @property
    def p(self) -> float:
        """The probability of so large a statistic if the law holds."""
        if self.impossible:
            return 0.0
        return float(stats.chi2.sf(self.statistic, self.freedom)) if self.freedom else 1.0


def fit(counts: np.ndarray, law: np.ndarray) -> Fit:
    """Pearson's chi-square; all cells expected fewer than 5 times are one."""
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-9)
    expected, rare = law * counts.sum(), law * counts.sum() < 5
    observed, rest = counts[~rare].astype(float), expected[rare].sum()
    expected = expected[~rare]
    if rest >= 5:
        observed, expected = np.append(observed, counts[rare].sum()), np.append(expected, rest)
    else:
        smallest = expected.argmin()
        observed[smallest] += counts[rare].sum()
        expected[smallest] += rest
    statistic = ((observed - expected) ** 2 / expected).sum()
    return Fit(statistic, len(expected) - 1, int(counts[law == 0].sum()))


def together(fits: list[Fit]) -> Fit:
    """One fit for several independent ones."""
    return Fit(*map(sum, zip(*fits, strict=True)))


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

    `loop` is "ar", "orthrus", "two" or "ahead", `how` what its function is told beside, or fields
    of a Strategy. Returns the final state's small arrays in numpy, its tokens padded with MASK.
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
    }
    if loop in ("two", "ahead"):
        method = "orthrus-2f" if loop == "two" else "orthrus-1f"
        strategy = Strategy(method, how.pop("block_size", K), candidates=3, **how)
        how = {"strategy": strategy.resolve(model.config)}
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


DRAWN = ["ahead", "ahead, a tree, fresh", "ahead, a tree", "two forwards", "two forwards, a tree"]


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
def test_coupled_texts_are_the_ar_texts(block_size: int) -> None:
    state = mixture("coupled", block_size)
    np.testing.assert_array_equal(state.tokens, mixture("ar").tokens)
    assert (state.accepted[state.accepted >= 0] == block_size - 1).mean() > 0.1


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


# --- The real model ------------------------------------------------------------------------------

REAL = Model(tiny_config(num_hidden_layers=3, rms_norm_eps=2e-6))
WEIGHTS = random_params(REAL.config, 0, copy=True)
PROMPT, NEW, REAL_EOS = 12, 24, 5
LENGTHS = np.random.default_rng(0).integers(1, PROMPT + 1, 200).repeat(3)
IDS = np.random.default_rng(1).integers(0, 63, (200, PROMPT)).repeat(3, axis=0)
CUT = ({"top_k": 8}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.95, "min_p": 0.02})
ASKED = [Setting(t, **CUT[i % 3]) for i in range(200) for t in (0.5, 1.0, 1.5)]  # 200 prompts x 3


@functools.cache
def spoken(
    rule: str,
    rows: tuple[int, ...] = tuple(range(len(ASKED))),
    *,
    filtered: bool = True,
    block_size: int | None = None,
    max_cycles: int | None = None,
):
    """The final state of these rows in one batch, in numpy; `max_cycles` at a time if given."""
    at = np.array(rows)
    how = {"max_cycles": None if max_cycles is None else jnp.int32(max_cycles)} | RULES[rule]
    if block_size:
        how["block_size"] = block_size
    run = {"ar": decoding.ar_decode, "orthrus": orthrus_decode}[how.pop("loop")]
    state = decoding.prefill(
        REAL,
        WEIGHTS,
        jnp.asarray(IDS[at], jnp.int32),
        jnp.asarray(LENGTHS[at], jnp.int32),
        jnp.full(len(at), NEW, jnp.int32),
        jnp.array([REAL_EOS, -1, -1], jnp.int32),
        slots=PROMPT + NEW + K,
        max_new_tokens=NEW,
        sampler=sampler_of([ASKED[r] for r in rows], 7, at, filtered=filtered),
        logprobs=True,
    )
    calls = 0
    while not state.done.all():
        state, calls = run(REAL, WEIGHTS, state, **how), calls + 1
    assert calls == (1 if max_cycles is None else -(-int(state.cycles.max()) // max_cycles))
    return jax.tree.map(np.asarray, state.replace(cache=None, sampler=None))


def texts(state) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(state.tokens, state.count, strict=True)]


@pytest.mark.parametrize(
    ("filtered", "block_size"),
    [
        (True, None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, None), (True, 2)]),
    ],
)
def test_coupled_text_equals_ar_token_for_token(filtered: bool, block_size: int | None) -> None:
    """200 prompts at three temperatures, each row with filters of its own or none with any."""
    ar = spoken("ar", filtered=filtered)
    coupled = spoken("coupled", filtered=filtered, block_size=block_size)
    assert texts(coupled) == texts(ar)
    np.testing.assert_array_equal(coupled.position, ar.position)
    most = (block_size or K) - 1
    assert (coupled.accepted == most).sum() > 50, "hardly a full acceptance"
    assert len({tuple(text) for text in texts(ar)}) > 500, "texts that say nothing"
    assert sum(len(text) < NEW for text in texts(ar)) > 20, "hardly an end"


@pytest.mark.parametrize("rule", [*slow("a draw from q"), "coupled"])
def test_text_does_not_depend_on_the_batch(rule: str) -> None:
    batch = texts(spoken(rule))
    for row in (0, 1, 2, 100, 301, 599):
        assert texts(spoken(rule, (row,))) == [batch[row]]


@pytest.mark.parametrize("rule", ["a draw from q", *slow("coupled")])
def test_paused_loop_gives_the_same_text(rule: str) -> None:
    whole, paused = spoken(rule), spoken(rule, max_cycles=1)
    assert texts(paused) == texts(whole)
    np.testing.assert_array_equal(paused.accepted, whole.accepted)


@functools.cache
def reread(rule: str) -> list[np.ndarray]:
    """Each row's log-probabilities of its tokens, from one forward over prompt and text."""
    state = spoken(rule)
    rows = np.zeros((len(ASKED), PROMPT + NEW), np.int32)
    for row, length, ids, text in zip(rows, LENGTHS, IDS, texts(state), strict=True):
        row[: length + len(text)] = [*ids[:length], *text]
    (hidden,), _ = REAL.forward(
        WEIGHTS, [ar_segment(jnp.asarray(rows), jnp.zeros(len(rows), jnp.int32))], None
    )
    known = np.asarray(jax.nn.log_softmax(REAL.logits(WEIGHTS, hidden)))
    return [
        known[r, np.arange(n) + LENGTHS[r] - 1, rows[r, LENGTHS[r] :][:n]]
        for r, n in enumerate(state.count)
    ]


@pytest.mark.parametrize("rule", [*slow("ar"), "a draw from q", "coupled"])
def test_log_probabilities_are_those_of_the_text_read_again(rule: str) -> None:
    state = spoken(rule)
    for row, reference in enumerate(reread(rule)):
        said = state.logprobs[row, : len(reference)]
        np.testing.assert_allclose(said, reference, rtol=1e-5, atol=2e-5)


def test_log_probabilities_are_those_of_ar() -> None:
    ar, coupled = spoken("ar"), spoken("coupled")
    said = np.arange(NEW) < ar.count[:, None]
    np.testing.assert_allclose(coupled.logprobs[said], ar.logprobs[said], atol=2e-5)
    assert ar.logprobs[said].min() < -3
    assert ar.logprobs[said].max() <= 0
