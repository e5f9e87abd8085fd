"""The compiled loop of each strategy: which loop runs, who drafts for it, what it begins with."""

import dataclasses
from typing import Any

from orthrus_jax.decoding.overlapped import no_draft, one_forward_decode, two_forward_decode
from orthrus_jax.decoding.sampling import AcceptRule
from orthrus_jax.decoding.speculative import ar_decode, speculative_decode
from orthrus_jax.decoding.state import DecodingModel, Drafter
from orthrus_jax.decoding.strategy import Strategy
from orthrus_jax.drafters.diffusion import DiffusionDrafter


def drafter_of(strategy: Strategy, model: DecodingModel) -> Drafter:
    """The drafter of a resolved strategy whose method is "orthrus"."""
    candidates = strategy.candidates if strategy.pairwise else 0
    return DiffusionDrafter(model, strategy.block_size, AcceptRule(strategy.accept), candidates)


def loop_of(
    strategy: Strategy, model: DecodingModel, *, sampled: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The compiled loop of a resolved strategy, and its static arguments.

    Without a sampler the accept rule is no part of them, nor with a loop that emits the AR view's
    own draws under either rule: programs that differ in nothing are one.
    """
    if not sampled or strategy.method != "orthrus":
        strategy = dataclasses.replace(strategy, accept=AcceptRule.REJECTION)
    if strategy.method == "ar":
        return ar_decode, {}
    if strategy.method == "orthrus":
        rule = AcceptRule(strategy.accept)
        return speculative_decode, {"drafter": drafter_of(strategy, model), "rule": rule}
    loop = one_forward_decode if strategy.method == "orthrus-1f" else two_forward_decode
    return loop, {"strategy": strategy}


def first_carry(strategy: Strategy, model: DecodingModel, batch: int, slots: int) -> Any:
    """DecodeState.drafter after a prefill, for a resolved strategy."""
    if strategy.method == "orthrus-1f":
        return no_draft(strategy, batch)
    if strategy.method == "orthrus":
        return drafter_of(strategy, model).init(batch, slots)
    return None
