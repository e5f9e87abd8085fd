"""The audit of sampled text: its statistics, and that it passes exact rules and fails others."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from eval import audit as audit_module
from eval import audit_law, reference
from eval.audit import Audit, Options
from eval.lossless import audit, table
from eval.reference import TokenStats
from orthrus_jax.attention import cache
from orthrus_jax.decoding import Acceptance, Strategy, sampling, speculative
from orthrus_jax.decoding.sampling import NoiseKey
from orthrus_jax.engine import Completion
from orthrus_jax.errors import UserError
from tests.support.audits import (
    PROMPTS,
    SAMPLED,
    K,
    accepted_drafts_not_written,
    audited,
    tiny_model,
    written_late,
)

slow = pytest.mark.slow  # each of these compiles an audit of its own


@pytest.mark.parametrize("view", ["copy", pytest.param("random", marks=slow)])
def test_honest_rule_passes_in_distribution(view: str) -> None:
    model = tiny_model(view=view, tie_word_embeddings=False)
    result = audited("rejection", model=model)
    assert not result["failures"], result["failures"]
    figures = result["parts"]["rejection"]
    assert figures["tokens"] > 1000
    assert figures["acceptance_length"] > 0.03
    assert all(abs(z) < 3 for z in figures["z"].values()), figures["z"]


def test_equal_prompts_are_samples_of_their_own() -> None:
    """With one noise for all of them, eight equal texts would count as eight draws."""
    prompts = [PROMPTS[3]] * 8
    model = tiny_model(tie_word_embeddings=False)
    options = Options(parts=("rejection",), **SAMPLED)
    requests = Audit(model, prompts, options).requests("rejection")
    assert len({(r.noise_id, r.sampling.seed) for r in requests}) == len(requests) == 48
    result = audit(model, prompts, options)
    assert not result["failures"], result["failures"]


def test_limit_holds_for_all_statistics_together() -> None:
    per_statistic = 2 * stats.norm.sf(audit_law.Z_LIMIT)
    assert len(audit_law.STATISTICS) * per_statistic == pytest.approx(audit_law.FALSE_ALARMS)
    honest = TokenStats(*np.zeros((len(TokenStats._fields), 500)))
    assert tuple(audit_law.law_statistics(honest)["z"]) == audit_law.STATISTICS


def test_too_small_a_budget_is_refused_before_decoding() -> None:
    with pytest.raises(UserError, match=r"^96 sampled tokens say nothing of .* at least 100$"):
        audited("greedy", "rejection", max_new_tokens=2, seeds=6)


@slow
def test_answers_that_end_too_early_leave_the_greedy_result() -> None:
    model = tiny_model(eos_token_ids=tuple(range(0, 60, 2)), tie_word_embeddings=False)
    result = audited("greedy", "rejection", model=model, seeds=2)
    assert not result["failures"]
    law = result["parts"]["rejection"]
    assert 0 < law["tokens"] < 100
    assert law["z"] == {}
    assert law["undecided"].startswith(f"{law['tokens']} sampled tokens say nothing")
    text = table(result)
    assert "| greedy | Orthrus | 8 | 1.0000 |" in text
    assert text.endswith("\nPASS of greedy; no verdict on rejection")


def test_rejection_part_is_refused_for_cycles_that_emit_ar_draws() -> None:
    with pytest.raises(UserError, match=r"--cycle two-forward emits AR's own .* greedy,coupled"):
        Options(strategy=Strategy("orthrus-2f"))


def replacing(fault):
    """The rejection rule, but its own token is drawn from another row of p where `fault` says so.

    `fault` maps accepted int32[B] and the number of drafts to: the number accepted in its stead,
    the row of p, and a mask of the rows where both apply.
    """

    def rule(drafts, target, sampler, positions) -> Acceptance:
        honest = sampling.accept_rejection(drafts, target, sampler, positions)
        drafted = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
        rows = drafted.shape[1]
        count, row, here = fault(honest.accepted, rows - 1)
        probs = sampling._at(target, row)
        own = sampling.gumbel_sample(probs, sampler, sampling._at(positions, count), NoiseKey.TOKEN)
        tokens = jnp.where(jnp.arange(rows) < count[:, None], drafted, own)
        return Acceptance(jnp.where(here[:, None], tokens, honest.tokens), count)

    return rule


RULE_FAULTS = {
    "always accept": replacing(lambda n, all: (0 * n + all, 0 * n + all, n >= 0)),
    "residual from p": replacing(lambda n, all: (n, n, n < all)),
    "bonus off by one": replacing(lambda n, all: (n, n - 1, n == all)),
}
LAW_FAULTS = {
    **{name: (speculative, "accept_rejection", rule) for name, rule in RULE_FAULTS.items()},
    "a slot late": (cache.LayerCache, "write", written_late),
    "drafts not written": (cache.LayerCache, "write", accepted_drafts_not_written),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name in ("residual from p", "drafts not written") else slow)
        for name in LAW_FAULTS
    ],
)
def test_fault_shows_in_the_distribution_of_tokens(fault: str, monkeypatch) -> None:
    monkeypatch.setattr(*LAW_FAULTS[fault])
    options = {}
    if fault == "bonus off by one":
        # It follows full acceptance, which two rows per block and less noise make frequent.
        options = {"strategy": Strategy(draft_length=2), "temperature": 0.7}
    result = audited("rejection", **options)
    messages = [str(failure) for failure in result["failures"]]
    if fault in RULE_FAULTS:
        assert all("z = " in message for message in messages), messages
        assert max(abs(z) for z in result["parts"]["rejection"]["z"].values()) > 8
    else:
        assert len([message for message in messages if "log p" in message]) > 500
    assert any(message in table(result) for message in messages)


def random_p_and_q(rng, tokens: int, vocab: int = 64):
    """The logits of p, p and q [tokens, 1, vocab]: different but related distributions."""
    logits = rng.normal(0, 1.5, (tokens, 1, vocab))
    guess = logits + rng.normal(0, 1.5, logits.shape)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return logits, softmax(logits), softmax(guess)


def drawn(rng, probs: np.ndarray) -> np.ndarray:
    """One token [tokens, 1] of each row."""
    below = probs.cumsum(-1) < rng.random((*probs.shape[:-1], 1)) * probs.sum(-1, keepdims=True)
    return below.sum(-1)


def stats_of(logits, p, q, x) -> TokenStats:
    arrays = (jnp.asarray(a, jnp.float32) for a in (logits, p, q))
    token_stats = reference.token_stats(*arrays, jnp.asarray(x))
    return TokenStats(*(np.asarray(a, np.float64)[:, 0] for a in token_stats))


def test_token_stats_match_plain_sums() -> None:
    """Each value of a token, and mean and variance under p, against a plain sum in float64."""
    rng = np.random.default_rng(0)
    logits, p, q = random_p_and_q(rng, 50)
    p[0, 0, :10], p[1, 0] = 0, np.eye(64)[7]
    p /= p.sum(-1, keepdims=True)
    x = drawn(rng, p)
    seen = stats_of(logits, p, q, x)
    for i, token in enumerate(x[:, 0]):
        p_i, q_i = p[i, 0], q[i, 0]
        log_p = np.log(np.where(p_i > 0, p_i, 1))
        accept = np.minimum(1, np.divide(q_i, p_i, out=np.ones(64), where=p_i > 0))
        for f, value, variance in (
            (log_p, seen.log_prob_residual[i], seen.log_prob_variance[i]),
            (accept, seen.accept_prob[i], seen.accept_prob_variance[i]),
        ):
            mean = (p_i * f).sum()
            assert value == pytest.approx(f[token] - mean, abs=1e-5)
            assert variance == pytest.approx((p_i * f**2).sum() - mean**2, abs=1e-5)
        assert seen.before[i] == pytest.approx(p_i[:token].sum(), abs=1e-5)
        assert seen.likelier[i] == pytest.approx(p_i[p_i > p_i[token]].sum(), abs=1e-5)
        log_softmax = logits[i, 0] - np.log(np.exp(logits[i, 0]).sum())
        assert seen.log_prob[i] == pytest.approx(log_softmax[token], abs=1e-5)


def test_honest_tokens_are_normal_in_every_statistic() -> None:
    """200 audits of 500 tokens: each z has mean 0 and deviation 1, and none is over the limit."""
    rng = np.random.default_rng(1)
    logits, p, q = random_p_and_q(rng, 100_000)
    pooled = stats_of(logits, p, q, drawn(rng, p))
    audits = [TokenStats(*(x[i::200] for x in pooled)) for i in range(200)]
    scores = [audit_law.law_statistics(stats)["z"] for stats in audits]
    for name in scores[0]:
        z = np.array([by_name[name] for by_name in scores])
        assert abs(z.mean()) < 0.25, name
        assert 0.85 < z.std() < 1.15, name
        assert abs(z).max() < audit_law.Z_LIMIT, name


@pytest.mark.parametrize("excess", [0.1, 1.0])
def test_rule_that_accepts_too_much_shows_in_the_emitted_tokens(excess) -> None:
    """A share of the drafts is accepted whatever p is; the tokens are enough to show that."""
    rng = np.random.default_rng(2)
    tokens = 20_000 if excess < 1 else 400
    logits, p, q = random_p_and_q(rng, tokens)
    q = np.eye(64)[q.argmax(-1)]  # what the drafter proposes: its likeliest token
    x = np.where(rng.random((tokens, 1)) < excess, drawn(rng, q), drawn(rng, p))
    z = audit_law.law_statistics(stats_of(logits, p, q, x))["z"]
    accept = np.minimum(1, q / p)
    moved = excess * (((q - p) * accept).sum(-1)).sum()
    spread = math.sqrt(((p * accept**2).sum(-1) - (p * accept).sum(-1) ** 2).sum())
    assert moved / spread > 6, "the fault should be large enough to show"
    assert z["drafter's favour"] > audit_law.Z_LIMIT


def test_uniform_z_is_the_chi_square_on_a_normal_scale() -> None:
    for chi_square in (8.0, 19.0, 43.0, 54.5, 60.0):
        counts = np.full(20, 1000)
        off = math.sqrt(chi_square * 1000 / 2)
        counts[3], counts[11] = 1000 + round(off), 1000 - round(off)
        points = np.repeat((np.arange(20) + 0.5) / 20, counts)
        exact = stats.norm.isf(stats.chi2.sf(chi_square, 19))
        assert audit_law.uniform_z(points) == pytest.approx(exact, abs=0.1)


def test_anchor_of_each_token_is_that_of_its_cycle() -> None:
    answer = lambda tokens, accepted: Completion("", [0] * tokens, "", 0, accepted, 1, 0.0, 0.0)
    assert audit_module._anchors(5, answer(1, [])) == [4]
    # The first token; then 2 drafts and one more; one more alone; a cycle cut by the budget.
    assert audit_module._anchors(5, answer(7, [2, 0, 2])) == [4, 5, 5, 5, 8, 9, 9]


def test_anchors_are_those_the_drafts_came_from() -> None:
    """The drafter, run again by the reference, proposes the drafts that were accepted."""
    model = tiny_model(view="copy")
    run = Audit(model, PROMPTS, Options(parts=("rejection",), **SAMPLED))
    requests = run.requests("rejection")[:32]
    answers = run.decode(requests, "rejection")
    all_stats = run.read_again(reference.one_row, requests, answers, answers, block=K)
    accepted = 0
    for answer, its in zip(answers, all_stats, strict=True):
        at = 1
        for n in answer.accepted:
            # min(1, q / p) of a draft that was accepted is 1, and its mean is p of the draft.
            np.testing.assert_allclose(
                its.accept_prob[at : at + n] + its.own[at : at + n], 1, atol=1e-4
            )
            accepted, at = accepted + n, at + n + 1
    assert accepted > 100
