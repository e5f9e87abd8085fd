"""Which strategy earns most here: from counts and milliseconds to a choice.

Pure Python; knows no device, no queue and no text. The incumbent decodes, turn by turn. Another
contender decodes a turn now and then, as a trial, and takes over once it surely earns more. A trial
emits the same text, only later than the incumbent would have: by at most LOSS of all time.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from orthrus_jax.decoding.sampling import AcceptRule
from orthrus_jax.decoding.strategy import Strategy
from orthrus_jax.values import check_switch, check_type

LOSS = 0.02  # share of the time that trials of slower contenders may cost
MARGIN = 0.03  # by which another must earn more before it is believed to
TRIAL_CYCLES = 8  # per turn of a trial, and of what has not run yet
DRAFT_CYCLES = 16  # per turn of an incumbent that drafts
AR_CYCLES = 32  # per turn of an AR incumbent: a pause takes the same time, a step takes less
EVIDENCE = 256  # cycles of single sequences over which the mean of emitted tokens reaches
OLD_EVIDENCE = 16  # what earlier ones count for when a trial begins
TIMES = 5  # turns over which the median of milliseconds per cycle is taken
LEAST_DEVIATION = 0.5  # of the tokens of a cycle: a few equal cycles prove little
UNKNOWN_SPREAD = 0.1  # of times per cycle, as a share, before three are known
CERTAINTY = 1.5  # standard errors between two contenders, beyond which one is surely better
TRIAL_TURNS = 6  # of a trial in all of which the contender earned more: then it takes over, too
SURPRISE = 4.0  # standard errors from the mean at which a text counts as another kind of text
FIRST_GAP, LONGEST_GAP = 4, 256  # turns between two trials of a contender that has lost the last


@dataclasses.dataclass(frozen=True)
class Auto:
    """The wish that the engine choose the strategy while it decodes.

    Attributes:
      accept: of sampled drafts, see Strategy. "coupled" keeps a seed's text whichever strategy
        runs; under "rejection" the text of a seed depends on it, its distribution does not.
      pairwise: see Strategy.
    """

    accept: str = AcceptRule.COUPLED
    pairwise: bool | None = None

    def __post_init__(self) -> None:
        check_type("accept", self.accept, str, "'rejection' or 'coupled'")
        if self.pairwise is not None:
            check_switch("pairwise", self.pairwise)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A strategy, and what is expected of it before it has run.

    Attributes:
      tokens: per cycle and sequence; 1 for AR.
      cost: of a cycle, in AR steps of the same batch.
    """

    strategy: Strategy
    tokens: float
    cost: float


class Turn(NamedTuple):
    """Which contender decodes next, by its place, and for how many cycles at most."""

    contender: int
    cycles: int


class Record:
    """What a contender has earned of late.

    Attributes:
      count: cycles of single sequences that the mean is of, at most EVIDENCE.
      mean, variance: of the tokens per cycle.
      times: milliseconds per cycle, a number per turn.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.variance = 0.0
        self.times: collections.deque[float] = collections.deque(maxlen=TIMES)

    @property
    def error(self) -> float:
        """The standard error of the mean; infinite without a count."""
        if not self.count:
            return math.inf
        return max(math.sqrt(self.variance), LEAST_DEVIATION) / math.sqrt(self.count)

    @property
    def spread(self) -> float:
        """The standard deviation of the times, as a share of their mean."""
        if len(self.times) < 3:
            return UNKNOWN_SPREAD
        return statistics.stdev(self.times) / statistics.fmean(self.times)

    def add(self, tokens: Sequence[int]) -> None:
        """Count the tokens of each cycle of a turn.

        A turn that is far from the mean begins the count anew: it is of another kind of text.
        """
        count, mean = len(tokens), statistics.fmean(tokens)
        deviation = max(math.sqrt(self.variance), LEAST_DEVIATION)
        if self.count and abs(mean - self.mean) > SURPRISE * deviation / math.sqrt(count):
            self.count = 0
        self.count = min(self.count, max(EVIDENCE - count, 0))
        total, change = self.count + count, mean - self.mean
        share = count / total
        spread = statistics.pvariance(tokens)
        self.variance += share * (spread - self.variance) + share * (1 - share) * change**2
        self.mean += share * change
        self.count = total

    def age(self) -> None:
        """Let what was measured long ago count for little beside what comes."""
        self.count = min(self.count, OLD_EVIDENCE)
        while len(self.times) > 1:
            self.times.popleft()


class Chooser:
    """Chooses among contenders, the first of which begins. `choose`, decode the turn, `learn`.

    A choice depends on turns that are over, never on what is drawn later. `incumbent` is the place
    of the contender that decodes when none is on trial; `switches` counts how often it changed.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self.contenders = tuple(contenders)
        self.incumbent = 0
        self.switches = 0
        size = len(self.contenders)
        self._records = [Record() for _ in range(size)]
        # By contender: the turn at which its last trial ended, and how long it then rests.
        self._ended, self._gaps = [-FIRST_GAP] * size, [FIRST_GAP] * size
        self._trial: int | None = None
        self._turns = self._trial_turns = 0
        # Milliseconds: of all timed turns, lost in trials, of the longest compilation.
        self._spent = self._lost = self._compiling = 0.0

    def choose(self) -> Turn:
        """The next turn."""
        if self._trial is not None:
            self._judge(self._trial)
        if self._trial is None:
            self._trial = self._worth_trying()
            if self._trial is not None:
                self._trial_turns = 0
                self._records[self._trial].age()
        contender = self.incumbent if self._trial is None else self._trial
        if self._trial is not None or not self._records[contender].count:
            return Turn(contender, TRIAL_CYCLES)
        return Turn(contender, AR_CYCLES if self._is_ar(contender) else DRAFT_CYCLES)

    def learn(
        self,
        contender: int,
        tokens: Sequence[int],
        cycles: int,
        milliseconds: float,
        compiling: float = 0.0,
    ) -> None:
        """Take a turn's figures.

        Args:
          contender: that decoded it.
          tokens: emitted in each cycle of each sequence.
          cycles: of the batch, at least those of any sequence.
          milliseconds: the turn's wall time.
          compiling: the part of it that a program was compiled in: such a turn is not warm, and its
            time tells nothing.
        """
        if not cycles:
            return
        self._turns += 1
        record = self._records[contender]
        if tokens:
            record.add(tokens)
        if compiling:
            self._compiling = max(self._compiling, compiling)
            return
        record.times.append(milliseconds / cycles)
        self._spent += milliseconds
        if contender != self.incumbent:
            emitted = cycles * self._tokens(contender)
            self._lost += max(milliseconds - emitted / self._rate(self.incumbent), 0.0)

    # Beliefs

    def _tokens(self, i: int) -> float:
        """Tokens per cycle: measured, or expected in the light of another that drafts."""
        contender, record = self.contenders[i], self._records[i]
        if record.count:
            return record.mean
        known = [
            (record.count, (record.mean - 1) / (other.tokens - 1))
            for other, record in zip(self.contenders, self._records, strict=True)
            if record.count and other.tokens > 1
        ]
        return 1 + (contender.tokens - 1) * (max(known)[1] if known else 1.0)

    def _cost(self, i: int) -> float:
        """Milliseconds per cycle: measured, or expected in the light of one that was measured."""
        if times := self._records[i].times:
            return statistics.median(times)
        order = (self.incumbent, *range(len(self.contenders)))
        timed = next((j for j in order if self._records[j].times), None)
        scale = 1.0 if timed is None else self._cost(timed) / self.contenders[timed].cost
        return self.contenders[i].cost * scale

    def _rate(self, i: int) -> float:
        """Tokens per millisecond and sequence."""
        return self._tokens(i) / self._cost(i)

    def _doubt(self, i: int) -> float:
        """The standard error of contender i's rate, as a share of it."""
        record = self._records[i]
        tokens = 0.0 if self._is_ar(i) else record.error / max(record.mean, 1.0)
        spread = self._records[self.incumbent].spread
        return math.hypot(tokens, spread / math.sqrt(max(len(record.times), 1)))

    def _is_ar(self, i: int) -> bool:
        return self.contenders[i].strategy.method == "ar"

    def _surely_better(self, i: int) -> bool:
        """Whether contender i earns more than the incumbent, beyond what chance would show."""
        doubt = math.hypot(self._doubt(i), self._doubt(self.incumbent))
        return self._rate(i) > self._rate(self.incumbent) * (1 + MARGIN + CERTAINTY * doubt)

    # Trials

    def _judge(self, i: int) -> None:
        """End the trial of contender i, with or without a switch, unless it is to go on."""
        if not self._records[i].times:
            return  # its first turn compiled
        self._trial_turns += 1
        better = self._rate(i) > self._rate(self.incumbent) * (1 + MARGIN)
        if self._surely_better(i) or (better and self._trial_turns >= TRIAL_TURNS):
            self._rest(self.incumbent)
            self.incumbent, self._trial = i, None
            self.switches += 1
        elif not better:
            self._rest(i)
            self._trial = None

    def _rest(self, i: int) -> None:
        """Put the next trial of contender i off, each time for twice as long."""
        self._ended[i] = self._turns
        self._gaps[i] = min(2 * self._gaps[i], LONGEST_GAP)

    def _worth_trying(self) -> int | None:
        """The contender to try now, the most promising of those whose trial is worth its cost."""
        if not self._records[self.incumbent].times:
            return None
        others = [i for i in range(len(self.contenders)) if i != self.incumbent]
        worth = [i for i in others if self._is_worth_trying(i)]
        return max(worth, key=self._rate, default=None)

    def _is_worth_trying(self, i: int) -> bool:
        now, rested = self._rate(self.incumbent), self._turns - self._ended[i]
        if self._rate(i) > now * (1 + MARGIN):
            return rested > 1
        if rested < self._gaps[i]:
            return False
        if not self._records[i].count and self._spent < self._compiling:
            return False  # it would have to be compiled first
        loss = TRIAL_CYCLES * self._cost(i) * (1 - self._rate(i) / now)
        return self._lost + max(loss, 0.0) <= LOSS * self._spent
