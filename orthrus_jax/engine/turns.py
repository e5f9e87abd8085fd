"""The turns of a queue, from one pause of the loop to the next: which strategy decodes each.

Decides when a turn's time can be known. Who decodes next is auto.py's choice; a plan without
contenders keeps to its strategy.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import jax

from orthrus_jax.decoding import DecodeState, Strategy
from orthrus_jax.engine.auto import Chooser, Turn
from orthrus_jax.engine.request import Plan

NO_LIMIT = (1 << 31) - 1


@dataclasses.dataclass
class Stretches:
    """The strategies that decoded an answer, in turn, and the cycles of each."""

    parts: list[tuple[Strategy, int]] = dataclasses.field(default_factory=list)

    def add(self, strategy: Strategy, cycles: int) -> None:
        """Note that a strategy has decoded so many cycles more."""
        if self.parts and self.parts[-1][0] == strategy:
            cycles += self.parts.pop()[1]
        if cycles:
            self.parts.append((strategy, cycles))

    def first(self, cycles: int) -> "Stretches":
        """Those of the first `cycles` cycles."""
        kept, ends = Stretches(), itertools.accumulate(n for _, n in self.parts)
        for (strategy, n), end in zip(self.parts, ends, strict=True):
            kept.add(strategy, min(n, max(cycles - (end - n), 0)))
        return kept

    @property
    def forwards(self) -> int:
        """Passes through the model, the prefill's included."""
        return 1 + sum(strategy.forwards * n for strategy, n in self.parts)

    def needed(self, accepted: Sequence[int], tokens: int) -> list[int]:
        """The accepted drafts per cycle of an answer cut to `tokens` tokens after the prefill's.

        A cycle emits its strategy's leading tokens, its accepted drafts and one more.
        """
        leading = [strategy.leading_tokens for strategy, n in self.parts for _ in range(n)]
        needed: list[int] = []
        for drafts, before in zip(accepted, leading, strict=True):
            if tokens <= 0:
                break
            needed.append(min(drafts, max(tokens - before, 0)))
            tokens -= before + drafts + 1
        return needed


class Turns:
    """Which strategy decodes the present turn, and what the turns have earned.

    Attributes:
      plan: the queue's, with the present turn's strategy.
    """

    def __init__(self, plan: Plan, chooser: Chooser | None) -> None:
        self.plan = plan
        self._chooser = chooser
        self._turn: Turn | None = None
        self._began: tuple[float, float] | None = None  # and the compile seconds then
        self._fresh = False  # whether the drafts of the turn before are lost

    @property
    def limit(self) -> int:
        """The most cycles of the present turn."""
        return NO_LIMIT if self._turn is None else self._turn.cycles

    def choose(self) -> bool:
        """Begin a turn; return whether its strategy is another than the last one's."""
        self._began = None
        if self._chooser is None:
            return False
        self._turn = self._chooser.choose()
        return self.use(self._chooser.contenders[self._turn.contender].strategy)

    def use(self, strategy: Strategy) -> bool:
        """Let this strategy decode; return whether it is another than before."""
        self._fresh = strategy != self.plan.strategy
        self.plan = dataclasses.replace(self.plan, strategy=strategy)
        return self._fresh

    def start(self, state: DecodeState, compiled: float) -> None:
        """The loop is about to run, at so many compile seconds; wait for prefills before it."""
        if self._chooser is not None:
            jax.block_until_ready(state.tokens)
            self._began = time.perf_counter(), compiled

    def end(self, accepted: Sequence[Sequence[int]], compiled: float) -> None:
        """The loop's tokens are on the host.

        Args:
          accepted: drafts accepted in each cycle of the turn, per sequence.
          compiled: compile seconds until now.
        """
        if self._chooser is None or self._turn is None or self._began is None:
            return
        began, compiled_before = self._began
        milliseconds = (time.perf_counter() - began) * 1e3
        strategy = self.plan.strategy
        # After a switch the one-forward cycle has no draft yet, which is no fault of its drafts.
        skipped = int(self._fresh and strategy.method == "orthrus-1f")
        emitted = [n + 1 + strategy.leading_tokens for row in accepted for n in row[skipped:]]
        self._chooser.learn(
            self._turn.contender,
            emitted,
            max(map(len, accepted), default=0),
            milliseconds,
            (compiled - compiled_before) * 1e3,
        )
        self._began = None
