"""Which strategy `auto` chooses, on scripted costs and acceptances; and its contenders."""

import dataclasses
import itertools

import numpy as np
import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine.auto import Chooser, Contender

AR, PAPER, AHEAD = Strategy("ar"), Strategy("orthrus", 8), Strategy("orthrus-1f", 8)
EXPECTED = [Contender(PAPER, 4.0, 3.5), Contender(AHEAD, 3.5, 2.5), Contender(AR, 1.0, 1.0)]


@dataclasses.dataclass
class Device:
    """Decodes turns by script: milliseconds and mean tokens per cycle of each contender.

    `noise` is the standard deviation of a turn's time, as a share of it.
    """

    costs: dict[str, float]
    tokens: dict[str, float]
    batch: int = 1
    noise: float = 0.0
    compiling: float = 0.0
    seed: int = 0
    turns: list[str] = dataclasses.field(default_factory=list)
    clock: float = 0.0
    emitted: float = 0.0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def decode(self, chooser: Chooser, tokens: float) -> None:
        """Decode so many tokens more, per sequence."""
        goal = self.emitted + tokens
        while self.emitted < goal:
            index, cycles = chooser.choose()
            method = chooser.contenders[index].strategy.method
            compiling = 0.0 if method in self.turns else self.compiling
            self.turns.append(method)
            mean = self.tokens[method] - 1
            counts = np.zeros((self.batch, cycles), int)
            if mean:  # accepted drafts: geometric, at most 7
                counts = self.rng.geometric(1 / (1 + mean), counts.shape) - 1
            counts = np.minimum(counts, 7) + 1
            time = self.costs[method] * cycles * max(1 + self.noise * self.rng.normal(), 0.2)
            chooser.learn(index, counts.ravel().tolist(), cycles, time + compiling, compiling)
            self.clock += time
            self.emitted += counts.sum(axis=1).mean()

    def speed(self, method: str) -> float:
        """Tokens per millisecond of a fixed strategy, as `decode` draws them."""
        mean = self.tokens[method] - 1
        counts = np.random.default_rng(1).geometric(1 / (1 + mean), 10_000) - 1 if mean else 0
        return (1 + np.minimum(counts, 7).mean()) / self.costs[method]

    @property
    def share(self) -> float:
        """The speed so far, of the best fixed strategy's."""
        return self.emitted / self.clock / max(map(self.speed, self.costs))


COSTS = {"ar": 2.0, "orthrus": 7.0, "orthrus-1f": 5.0}
WORLDS = {  # mean tokens per cycle; costs; which wins
    "drafts fail": ({"ar": 1, "orthrus": 1.1, "orthrus-1f": 1.05}, COSTS, "ar"),
    "the paper's wins": ({"ar": 1, "orthrus": 5, "orthrus-1f": 2.5}, COSTS, "orthrus"),
    "the runner-up wins": ({"ar": 1, "orthrus": 4, "orthrus-1f": 4}, COSTS, "orthrus-1f"),
    "rows are dear": (
        {"ar": 1, "orthrus": 4, "orthrus-1f": 4},
        {"ar": 2.0, "orthrus": 14.0, "orthrus-1f": 12.0},
        "ar",
    ),
}


def chooser_of(*order: int) -> Chooser:
    return Chooser([EXPECTED[i] for i in order])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("world", WORLDS)
def test_chooser_settles_on_what_earns_most(world, batch, noise, order) -> None:
    tokens, costs, best = WORLDS[world]
    chooser = chooser_of(*order)
    beginning = Device(costs, tokens, batch, noise)
    beginning.decode(chooser, 4000)
    assert chooser.contenders[chooser.incumbent].strategy.method == best
    assert beginning.share > 0.9
    assert chooser.switches <= 4
    settled = Device(costs, tokens, batch, noise, seed=1)
    settled.decode(chooser, 20_000)
    assert settled.share > 0.95
    assert chooser.switches <= 10


def test_another_kind_of_text_is_noticed_at_once() -> None:
    good, bad = WORLDS["the paper's wins"][0], WORLDS["drafts fail"][0]
    chooser, device = chooser_of(0, 1, 2), Device(COSTS, good)
    device.decode(chooser, 3000)
    assert chooser.incumbent == 0
    device.tokens, device.emitted = bad, 0.0
    device.decode(chooser, 200)
    assert chooser.contenders[chooser.incumbent].strategy == AR
    device.tokens, device.emitted = good, 0.0
    device.decode(chooser, 8000)
    assert chooser.contenders[chooser.incumbent].strategy == PAPER
    assert chooser.switches <= 6


def test_equal_contenders_do_not_take_turns() -> None:
    tokens = {"ar": 1.0, "orthrus": 3.5, "orthrus-1f": 2.5}
    chooser, device = chooser_of(0, 1, 2), Device(COSTS, tokens, noise=0.1)
    device.decode(chooser, 30_000)
    assert chooser.switches <= 12
    changes = sum(a != b for a, b in itertools.pairwise(device.turns))
    assert changes < 0.15 * len(device.turns)


def test_trials_of_what_must_be_compiled_wait_until_that_pays() -> None:
    tokens = WORLDS["the paper's wins"][0]
    chooser, device = chooser_of(0, 2), Device(COSTS, tokens, compiling=3000.0)
    device.decode(chooser, 1500)
    assert device.clock < 3000
    assert set(device.turns) == {"orthrus"}
    device.decode(chooser, 4000)
    assert set(device.turns) == {"orthrus", "ar"}


def test_expected_gain_does_not_wait_for_compilation() -> None:
    chooser, device = chooser_of(0, 1, 2), Device(COSTS, WORLDS["drafts fail"][0], compiling=1e6)
    device.decode(chooser, 60)
    assert "ar" in device.turns


def test_turns_that_compiled_tell_no_time() -> None:
    chooser = chooser_of(0, 2)
    chooser.choose()
    chooser.learn(0, [4] * 8, 8, 1e6, compiling=9e5)
    chooser.choose()
    chooser.learn(0, [4] * 16, 16, 16 * 7.0)
    for _ in range(40):
        contender, cycles = chooser.choose()
        tokens, cost = ((4, 7.0), (1, 2.0))[contender]
        chooser.learn(contender, [tokens] * cycles, cycles, cost * cycles)
    assert chooser.incumbent == 0
    assert chooser.switches == 0


def test_choice_follows_from_what_was_learned_alone() -> None:
    """The same figures, the same turns: nothing is drawn, no clock is read."""
    turns = []
    for _ in range(2):
        device = Device(COSTS, WORLDS["the runner-up wins"][0], noise=0.1)
        device.decode(chooser_of(0, 1, 2), 3000)
        turns.append(device.turns)
    assert turns[0] == turns[1]
