"""The definitions of acceptance length and tokens per forward."""

import pytest

from orthrus_jax.metrics import acceptance_length, tokens_per_forward


def test_acceptance_length_is_the_mean_over_all_cycles() -> None:
    """Of two answers with 3 and 1 cycles: the longer one weighs more."""
    assert acceptance_length([[2, 0, 3], [1]]) == pytest.approx(6 / 4)
    assert acceptance_length(counts for counts in ([4], [], [0])) == pytest.approx(2)
    assert acceptance_length([]) == acceptance_length([[], []]) == 0.0


def test_tokens_per_forward_counts_the_prefill_among_the_forwards() -> None:
    """One token of the prefill and 3 cycles of 2 forwards that emit 3, 1 and 4 tokens."""
    assert tokens_per_forward(1 + 3 + 1 + 4, 1 + 2 * 3) == pytest.approx(9 / 7)
    assert tokens_per_forward(0, 0) == 0.0
