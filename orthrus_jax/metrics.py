"""The figures by which decoding is judged, each defined once.

Knows counts only: no tokens, no models, no clocks.
"""

from collections.abc import Iterable, Sequence


def acceptance_length(accepted_per_cycle: Iterable[Sequence[int]]) -> float:
    """Mean number of drafts accepted per draft-verify cycle; 0 where there was no cycle.

    The token that each verification adds by itself, the AR view's own, is not counted, as in the
    Orthrus paper (arXiv 2605.12825): 11.7 there goes with (11.7 + 1) / 2 = 6.35 tokens per forward.
    Where others count that token, their figures are one higher. The mean is over all cycles of all
    answers: a long answer weighs more than a short one.

    Args:
      accepted_per_cycle: for each answer, the drafts accepted in each of its cycles.
    """
    cycles = drafts = 0
    for counts in accepted_per_cycle:
        cycles += len(counts)
        drafts += sum(counts)
    return drafts / cycles if cycles else 0.0


def tokens_per_forward(tokens: int, forwards: int) -> float:
    """Emitted tokens per pass through the model, the prefill counted; 0 where there was no pass.

    Not a speedup: passes of more rows cost more.
    """
    return tokens / forwards if forwards else 0.0
