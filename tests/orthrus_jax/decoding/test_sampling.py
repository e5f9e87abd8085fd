"""Sampling: filters, noise and the accept rules, row by row; and AR's own texts on the real model.

The distributions of whole texts are test_sampling_laws.py. All seeds are fixed: no test here fails
by chance.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.decoding import AcceptRule
from orthrus_jax.decoding.sampling import (
    Drafts,
    NoiseKey,
    accept_rejection,
    gumbel_sample,
    probabilities,
)
from orthrus_jax.drafters import DiffusionDrafter
from orthrus_jax.model import Model, ar_segment
from tests.support.configs import tiny_config
from tests.support.decoding import DrawingDrafter, orthrus_decode, texts
from tests.support.fake_models.tabular import Setting, processed
from tests.support.marks import slow
from tests.support.sampling import fit, plain_rule, sampler_of
from tests.support.weights import random_params

K = tiny_config().block_size

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


def test_noise_does_not_depend_on_the_process_s_default_keys() -> None:
    probs, positions = jnp.ones((2, 8, 256)) / 256, jnp.tile(jnp.arange(8), (2, 1))
    sampler = sampler_of([Setting()] * 2, np.array([5, 6]), [1, 2])
    draw = lambda: np.asarray(gumbel_sample(probs, sampler, positions, NoiseKey.TOKEN))
    expected = draw()
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(draw(), expected)


# --- The rule of rejection ------------------------------------------------------------------------


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


# --- The real model ------------------------------------------------------------------------------

RULES = {
    "ar": {"loop": "ar"},
    "a draw from q": {"loop": "orthrus", "drafter": DrawingDrafter},
    "coupled": {"loop": "orthrus", "rule": AcceptRule.COUPLED},
}
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
