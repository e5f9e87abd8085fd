"""Orthrus's drafter: the diffusion view of the model itself, which reads the shared cache.

It needs no cache and no carry of its own: whatever the AR view wrote is what it reads.
"""

import dataclasses
from typing import Any

import jax

from orthrus_jax.decoding.guesses import coupled_chain, pairwise_chain
from orthrus_jax.decoding.sampling import AcceptRule, Drafts, greedy
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    choose,
    mask_eos_until_min_tokens,
)
from orthrus_jax.errors import UserError
from orthrus_jax.model.segment import block_segment

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DiffusionDrafter:
    """One block [anchor, MASK x (K - 1)] per cycle through the diffusion view.

    With a sampler it proposes its likeliest tokens, which are accepted more often than a draw from
    its distribution (docs/log.md), or, for AcceptRule.COUPLED, its own draw from the positions'
    noise.

    Attributes:
      model: whose diffusion view drafts.
      block_size: rows of a block, K; None is the trained K. Every value from 2 on is exact.
      rule: the rule that its drafts will be accepted by.
      candidates: tokens per position that the pairwise head chooses among, each given the one
        before; 0 is without a head, positions by themselves.
    """

    model: DecodingModel
    block_size: int | None = None
    rule: AcceptRule = AcceptRule.REJECTION
    candidates: int = 0

    def __post_init__(self) -> None:
        trained = self.model.config.block_size
        if not 2 <= self.rows <= trained:
            raise UserError(f"block_size={self.block_size} must be from 2 to {trained}")

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.block_size or self.model.config.block_size

    @property
    def lookahead(self) -> int:
        """Drafts per cycle."""
        return self.rows - 1

    @property
    def taps(self) -> tuple[int, ...]:
        """None: it reads the base's keys and values."""
        return ()

    def init(self, batch: int, slots: int) -> None:
        """It carries nothing."""
        del batch, slots

    def propose(self, params: Any, state: DecodeState) -> tuple[Drafts, None]:
        """Guess the K - 1 tokens after the anchor in one diffusion pass."""
        mask = self.model.config.mask_id
        block = block_segment(state.anchor, state.position, self.rows, mask)
        (hidden,), _ = self.model.forward(params, [block], state.cache)
        # Row j guesses the token after its own position, so the last row's guess is one too many.
        logits = self.model.logits(params, hidden[:, :-1])
        if self.candidates:
            coupled = state.sampler is not None and self.rule == AcceptRule.COUPLED
            chain = coupled_chain if coupled else pairwise_chain
            return Drafts(chain(self.model, params, state, logits, self.candidates)), None
        if state.sampler is None or self.rule == AcceptRule.COUPLED:
            return Drafts(choose(state, logits)), None
        return Drafts(greedy(mask_eos_until_min_tokens(state, logits))), None

    def observe(self, params: Any, state: DecodeState, taps: Any, accepted: Array) -> None:
        """Nothing to carry: the shared cache holds all that it reads."""
        del params, state, taps, accepted
