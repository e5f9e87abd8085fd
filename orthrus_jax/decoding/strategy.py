"""Strategy: how to decode, said once. Which forwards a cycle has, and what their rows are spent on.

No choice here changes a greedy or coupled text; each changes how soon it is there. The loops are
speculative.py's and overlapped.py's, and planner.py chooses by measurement.
"""

import dataclasses
import math
from typing import Any

from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.sampling import AcceptRule
from orthrus_jax.errors import UserError
from orthrus_jax.values import check_number, check_switch, check_type, check_whole

FORWARDS = {"ar": 1, "orthrus": 2, "orthrus-2f": 2, "orthrus-1f": 1}  # of each method, per cycle
METHODS = tuple(FORWARDS)
CYCLES = {"paper": "orthrus", "two-forward": "orthrus-2f", "one-forward": "orthrus-1f"}
SPENT_BY = {  # fields, and the methods that spend rows on them
    "early_blocks": ("orthrus-1f",),
    "fresh_blocks": ("orthrus-1f",),
    "tree_nodes": ("orthrus-2f", "orthrus-1f"),
}
LENGTH_BLOCKS = 4  # of orthrus-1f, where a strategy names none
CANDIDATES = 8  # the AR view's token after a rejection is among so many nine times in ten


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How to decode. Hashable: a static argument of the compiled loops.

    Attributes:
      method: "ar", one token per forward, the baseline; "orthrus", draft and verify in turn, the
        paper's cycle; "orthrus-2f", the same with a draft forward that emits too; "orthrus-1f",
        which drafts while it verifies. See docs/decoding.md.
      draft_length: rows of a draft block, the anchor included; None is the trained K.
      tree_nodes: of the last two methods, the drafts of a tree to verify; 0 is a chain.
      early_blocks: of "orthrus-1f", blocks per forward that assume how many drafts are accepted;
        None is LENGTH_BLOCKS.
      fresh_blocks: of "orthrus-1f", blocks that assume the next token as well.
      accept: "rejection" or "coupled", when "orthrus" accepts a sampled draft; see AcceptRule.
      draft_temperature: the temperature at which the drafter's probabilities are believed where
        they decide between nodes and blocks; None is the model's calibrated one, or 1.
      candidates: tokens kept per guessed position, where more than the likeliest can be of use.
      pairwise: score these candidates by the model's pairwise head, each given the token before;
        None is: if the model has a head. False is the paper's drafting.

    Raises:
      UserError: for a value of a wrong type; `resolve` checks it against a model.
    """

    method: str = "orthrus"
    draft_length: int | None = None
    tree_nodes: int = 0
    early_blocks: int | None = None
    fresh_blocks: int = 0
    accept: str = AcceptRule.REJECTION
    draft_temperature: float | None = None
    candidates: int = CANDIDATES
    pairwise: bool | None = None

    def __post_init__(self) -> None:
        check_type("method", self.method, str, f"one of {', '.join(METHODS)}")
        check_type("accept", self.accept, str, "'rejection' or 'coupled'")
        for name in ("draft_length", "early_blocks"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        for name in ("tree_nodes", "fresh_blocks"):
            check_whole(name, getattr(self, name))
        check_whole("candidates", self.candidates, 1)
        if self.draft_temperature is not None:
            check_number("draft_temperature", self.draft_temperature)
        if self.pairwise is not None:
            check_switch("pairwise", self.pairwise)

    def resolve(
        self, config: ModelConfig, draft_temperature: float = 1.0, *, head: bool = False
    ) -> "Strategy":
        """Fill in what is None and cut blocks to what a draft of this size can use.

        Args:
          config: the model's.
          draft_temperature: the model's calibrated one.
          head: whether the model has a pairwise head.

        Raises:
          UserError: naming the field, for what this model cannot run.
        """
        self._check(config)
        if self.pairwise and not head:
            raise UserError(
                "pairwise=True: this model has no pairwise head; leave it out, or train one with "
                "train.head"
            )
        block = 1 if self.method == "ar" else self.draft_length or config.block_size
        whole = dataclasses.replace(
            self,
            draft_length=block,
            draft_temperature=self.draft_temperature or draft_temperature,
            candidates=min(self.candidates, config.vocab_size),
            pairwise=self.method != "ar" and (head if self.pairwise is None else self.pairwise),
        )
        if self.method != "orthrus-1f":
            return dataclasses.replace(whole, early_blocks=0, fresh_blocks=0)
        early = LENGTH_BLOCKS if self.early_blocks is None else self.early_blocks
        ends = whole.drafts + 1
        return dataclasses.replace(
            whole,
            early_blocks=min(early, ends),
            fresh_blocks=min(self.fresh_blocks, ends * whole.candidates),
        )

    def _check(self, config: ModelConfig) -> None:
        if self.method not in METHODS:
            raise UserError(f"method={self.method!r} is not one of {', '.join(METHODS)}")
        rules = [rule.value for rule in AcceptRule]
        if self.accept not in rules:
            raise UserError(f"accept={self.accept!r} is not one of {', '.join(rules)}")
        for name, methods in SPENT_BY.items():
            value = getattr(self, name) or 0
            if value < 0:
                raise UserError(f"{name}={value} must be 0 or more")
            if value and self.method not in methods:
                raise UserError(f"{name}={value} needs method={' or '.join(map(repr, methods))}")
            if value >= (positions := config.max_position_embeddings):
                raise UserError(f"{name}={value} must be below the model's {positions} positions")
        if self.method == "ar":
            return
        _ = config.mask_id  # raises where there is none
        if self.draft_length is not None and not 2 <= self.draft_length <= config.block_size:
            raise UserError(
                f"draft_length={self.draft_length} must be from 2 to {config.block_size}"
            )
        if self.method == "orthrus-1f" and self.early_blocks == 0 and not self.fresh_blocks:
            raise UserError(
                "early_blocks=0 and fresh_blocks=0: method='orthrus-1f' drafts by at least one"
            )
        if self.draft_temperature is not None and not 0 < self.draft_temperature < math.inf:
            raise UserError(
                f"draft_temperature={self.draft_temperature} must be above 0 and finite"
            )

    # What follows is of a resolved strategy.

    @property
    def block_size(self) -> int:
        """Rows of a draft block, K."""
        assert self.draft_length is not None, "resolve() first"
        return self.draft_length

    @property
    def drafts(self) -> int:
        """Rows verified after the anchor: slots that a cycle writes after it."""
        return self.tree_nodes or self.block_size - 1

    @property
    def reach(self) -> int:
        """Positions, the anchor's included, that a cycle writes at the most."""
        return self.leading_tokens + 1 + self.drafts

    @property
    def blocks(self) -> int:
        """Blocks that one forward drafts while it verifies."""
        return (self.early_blocks or 0) + self.fresh_blocks

    @property
    def positions(self) -> int:
        """Positions after the anchor for which guesses are kept.

        An outcome block that is right guesses one more than a chain verifies: the token that comes
        if all of it is accepted, which the next outcome blocks can assume.
        """
        return self.block_size - (not self.fresh_blocks)

    @property
    def top_k(self) -> int:
        """Guesses kept per position."""
        return self.candidates if self.tree_nodes or self.fresh_blocks or self.pairwise else 1

    @property
    def forward_rows(self) -> tuple[int, ...]:
        """Rows of each forward of a cycle, of one sequence."""
        verified = 1 + self.drafts + self.block_size * self.blocks
        if FORWARDS[self.method] == 1:
            return (verified,)
        return (self.block_size + (self.method == "orthrus-2f"), verified)

    @property
    def rows(self) -> int:
        """Rows of the largest forward: what a token budget limits."""
        return max(self.forward_rows)

    @property
    def forwards(self) -> int:
        """Forwards per cycle."""
        return FORWARDS[self.method]

    @property
    def leading_tokens(self) -> int:
        """Tokens that a cycle emits before its drafts; one more follows the accepted drafts."""
        return int(self.method == "orthrus-2f")

    def flags(self) -> dict[str, Any]:
        """The strategy as command lines and JSON files spell it: mode, cycle and the row counts.

        And "pairwise", where the head is used.
        """
        if self.method == "ar":
            return {"mode": "ar"}
        cycle = next(name for name, method in CYCLES.items() if method == self.method)
        names = ("draft_length", "early_blocks", "fresh_blocks", "tree_nodes")
        counts = {name: getattr(self, name) for name in names}
        head = {"pairwise": True} if self.pairwise else {}
        return {"mode": "orthrus", "cycle": cycle} | counts | head

    def given(self) -> dict[str, Any]:
        """`flags` without those that are zero or left to the model."""
        return {name: value for name, value in self.flags().items() if value}
