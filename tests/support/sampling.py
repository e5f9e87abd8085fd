"""Sampling under test: samplers by row, the rule of rejection in plain code, and chi-squares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from orthrus_jax.decoding import sampling
from orthrus_jax.decoding.sampling import (
    Acceptance,
    Drafts,
    Filters,
    NoiseKey,
    Sampler,
    gumbel_sample,
)
from tests.support.fake_models.tabular import Setting


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
