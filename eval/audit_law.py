"""Audit of sampled texts: are the tokens distributed as the AR view's p?

With p the distribution that the reference finds, f(x) - E[f] of the emitted tokens x has mean 0 and
a variance known exactly, for any f that is fixed before x is: summed over all tokens and divided by
its standard deviation it is N(0, 1). Two f are tried. log p(x) shows tokens that come from another
p. The chance min(1, q(x) / p(x)) that a draft x is accepted, q drafted again from the anchor of the
token's cycle, is the direction in which every rule errs that accepts too much or replaces wrongly:
a rule that accepts every draft moves its mean to E_q, and one that draws a rejected draft's
replacement from p rather than max(p - q, 0) moves it by its variance v. 40 / v tokens then show it
98 times in 100, a few hundred. The report prints how large a shift of each mean its tokens would
show. The other two statistics test whether the mass of p before x (before in the vocabulary; before
in likelihood) is uniform, by a chi-square over 20 bins on a normal's scale. The limit of each is
set so that all four together fail 6 honest audits in 100,000. A p that is itself off, as a
corrupted cache makes it, moves all of these little: so the log p that Orthrus reports for every
token must be the reference's, within two near-ties.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.audit import Audit, Failure, bad_ends
from eval.reference import TokenStats, one_row
from orthrus_jax.engine import Completion, Request
from orthrus_jax.errors import UserError
from orthrus_jax.metrics import acceptance_length

STATISTICS = (
    "log p(x)",
    "drafter's favour",
    "mass before x, by id",
    "mass before x, by likelihood",
)
FALSE_ALARMS = 6e-5  # the share of honest audits in which any of the statistics is over its limit
# By Bonferroni's bound, which no dependence between them breaks: 4.3.
Z_LIMIT = -statistics.NormalDist().inv_cdf(FALSE_ALARMS / 2 / len(STATISTICS))
BINS = 20
LEAST_TOKENS = 5 * BINS  # a chi-square needs about 5 per bin


def audit_law(
    run: Audit, part: str, requests: Sequence[Request]
) -> tuple[dict[str, Any], list[Failure]]:
    """Audit sampled texts by where their tokens fall in the AR view's distributions.

    Answers that end early may leave fewer than LEAST_TOKENS tokens. Then "z" is empty, and
    "undecided" has the reason.
    """
    answers = run.decode(requests, "rejection")
    block = run.model.engine.resolve(run.plan.strategy).block_size
    stats = run.read_again(one_row, requests, answers, answers, block=block)
    pooled = TokenStats(*(np.concatenate(x).astype(np.float64) for x in zip(*stats, strict=True)))
    figures: dict[str, Any] = {"tokens": len(pooled.own), "z": {}}
    if len(pooled.own) < LEAST_TOKENS:
        figures["undecided"] = too_few(len(pooled.own))
    else:
        figures = law_statistics(pooled)
    failures = []
    for i, (request, answer, its_stats) in enumerate(zip(requests, answers, stats, strict=True)):
        seed = request.sampling.seed
        failure = functools.partial(Failure, part, prompt=i // run.options.seeds, seed=seed)
        failures += bad_ends(run, failure, "orthrus", answer)
        failures += _bad_log_probs(run, failure, answer, its_stats)
    for key, z in figures["z"].items():
        if not abs(z) <= Z_LIMIT:
            why = f"{key}: z = {z:.1f}, beyond +-{Z_LIMIT:.3g}"
            failures.append(Failure(part, "orthrus", why))
    length = acceptance_length(a.accepted for a in answers)
    return {"texts": len(requests), "acceptance_length": length, **figures}, failures


def check_enough(requests: Sequence[Request]) -> None:
    """Refuse requests whose answers, however long, give no verdict.

    Raises:
      UserError: for a budget of fewer than LEAST_TOKENS tokens.
    """
    most = sum(request.sampling.max_new_tokens for request in requests)
    if most < LEAST_TOKENS:
        raise UserError(too_few(most))


def too_few(tokens: int) -> str:
    """Why this many tokens give no verdict, and what gives more."""
    return (
        f"{tokens} sampled tokens say nothing of a distribution: raise --seeds, --limit or "
        f"--max-new-tokens to have at least {LEAST_TOKENS}"
    )


def _bad_log_probs(
    run: Audit, failure: Callable[..., Failure], answer: Completion, stats: TokenStats
) -> list[Failure]:
    """Tokens of probability 0, and those on whose log p Orthrus and the reference disagree."""
    reported, limit = np.array(answer.logprobs), 2 * run.near_tie * stats.spread
    right = (stats.own > 0) & (np.abs(reported - stats.log_prob) <= limit)
    return [
        failure(
            text="orthrus",
            why=f"position {t}: emitted {answer.tokens[t]} at log p {reported[t]:.4f}, the "
            f"reference's is {stats.log_prob[t]:.4f}, limit {limit[t]:.2g}; drawn with probability "
            f"{stats.own[t]:.2g}",
        )
        for t in np.flatnonzero(~right).tolist()
    ]


def law_statistics(stats: TokenStats) -> dict[str, Any]:
    """The statistics of the tokens of all texts, each N(0, 1) if they are drawn from p.

    Returns:
      "tokens"; "z" by name; of the two means also "shift", and "would_see", the shift that exceeds
      the limit 98 times in 100: nats for log p(x), a probability for the drafter's favour, which is
      min(1, q(x) / p(x)).
    """
    n = len(stats.own)
    result: dict[str, Any] = {"tokens": n, "z": {}, "shift": {}, "would_see": {}}
    of_log_p, of_favour, by_id, by_likelihood = STATISTICS
    for name, values, variances in (
        (of_log_p, stats.log_prob_residual, stats.log_prob_variance),
        (of_favour, stats.accept_prob, stats.accept_prob_variance),
    ):
        spread = math.sqrt(variances.sum())
        result["z"][name] = float(values.sum() / spread) if spread else 0.0
        result["shift"][name] = float(values.mean())
        result["would_see"][name] = (Z_LIMIT + 2) * spread / n
    # A token takes up an interval of length p(x); a uniform point in it makes the mass uniform.
    point = np.random.default_rng(0).random((2, n)) * stats.own
    result["z"][by_id] = uniform_z(stats.before + point[0])
    result["z"][by_likelihood] = uniform_z(stats.likelier + point[1])
    return result


def uniform_z(points: np.ndarray) -> float:
    """The chi-square of `points` in [0, 1] over BINS equal bins, as a normal's z.

    By the cube root of Wilson and Hilferty (1931): at z = 4 the exact one is 4.03.
    """
    counts, _ = np.histogram(np.clip(points, 0, 1), BINS, (0, 1))
    expected, free = len(points) / BINS, BINS - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    scale = 2 / (9 * free)
    return float(((chi_square / free) ** (1 / 3) - (1 - scale)) / math.sqrt(scale))
