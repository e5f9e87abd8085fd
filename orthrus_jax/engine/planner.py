"""Choose the strategy with the highest expected tokens per second on this device.

Up to some number of rows, a property of the device, a forward costs little more than one of few;
beyond it, or in a batch, every row adds cost. `eval.calibrate` measures any of three parts and
keeps them in the model's calibration.json: tokens per forward of each way to spend rows (a property
of the model), milliseconds per forward by rows and batch (a property of the device), and tokens/s
of the paper's cycle by draft length (of both). This module is the file's one reader and writer.
Without measured acceptance a rule chooses. Knows nothing of how the measuring is done.
"""

import bisect
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from orthrus_jax.decoding.strategy import CYCLES, Strategy
from orthrus_jax.engine.auto import Contender
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line, write_atomic
from orthrus_jax.values import check_whole

FILE = "calibration.json"
COUNTS = ("draft_length", "tree_nodes", "early_blocks", "fresh_blocks")  # of a strategy, in FILE
# A forward's cost by rows, in forwards of one row, as the TPU's compiler estimates it (never run):
# Qwen3-1.7B in bfloat16, 1,024 positions, the larger of the estimate and of reading weights and
# cache. python -m orthrus_jax.aot --preset qwen3-1.7b --topology v5e:1x1 --program forward
# --context 1024 (and v6e:1x1), libtpu 0.0.52, 2026-11-25. A GPU's compiler estimates no time.
ESTIMATED = {
    "TPU v5 lite": [(1, 1.0), (8, 1.0), (32, 1.0), (64, 1.0), (128, 1.26), (256, 2.19)],
    "TPU v6 lite": [(1, 1.0), (8, 1.0), (32, 1.10), (64, 1.04), (128, 1.16), (256, 1.76)],
}
# The same on two CPU cores, measured: the demo's model after 256 tokens, by rows in all
# (docs/log.md, what a forward costs on this CPU).
MEASURED = {"cpu": [(1, 1.0), (4, 2.1), (8, 2.8), (16, 3.5), (32, 4.7), (128, 13.0), (256, 22.0)]}
FREE = 1.25  # a forward is free that costs at most so many forwards of one row
# Elsewhere: rows at which a bfloat16 forward's arithmetic begins to take longer than reading the
# weights. On GPUs that was measured, by others.
RIDGE = {"NVIDIA H100": 165, "NVIDIA H200": 165, "cpu": 4}
DEFAULT_RIDGE = 160
ACCEPTED = 0.8  # of drafts whose predecessors were accepted, where acceptance was not measured
HOPELESS = 0.5  # of AR's expected speed: slower strategies are no contenders


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A strategy and its measured tokens per forward.

    Attributes:
      tokens_per_forward: mean over prompts, prefill counted.
      interval: its 95 % interval.
      pooled: all tokens over all forwards.
      accepted: drafts emitted per verification.
      hit_rate: share of drafts computed for exactly the outcome that occurred.
    """

    strategy: Strategy
    tokens_per_forward: float
    interval: tuple[float, float]
    pooled: float
    accepted: float
    hit_rate: float


@dataclasses.dataclass(frozen=True)
class LengthRates:
    """Tokens per second of the paper's cycle by draft length, on one kind of device.

    Attributes:
      draft_length: the fastest.
      tokens_per_second: by draft length.
    """

    draft_length: int
    tokens_per_second: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A model's calibration.json; each part may be empty.

    Attributes:
      measurements: acceptance, one entry per measured strategy.
      cost: device kind -> batch -> [(rows, milliseconds), ...], rows ascending.
      about: how acceptance was measured: prompts, tokens, their digest.
      draft_temperature: see Strategy; the one with the most tokens per forward.
      draft_length: device kind -> rates by draft length.
    """

    measurements: tuple[Measurement, ...] = ()
    cost: dict[str, dict[int, list[tuple[int, float]]]] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    draft_temperature: float = 1.0
    draft_length: dict[str, LengthRates] = dataclasses.field(default_factory=dict)

    def save(self, directory: str | pathlib.Path) -> pathlib.Path:
        """Write the parts that are not empty into the model's directory; return the file's path."""
        path = pathlib.Path(directory) / FILE
        content: dict[str, Any] = {}
        if self.measurements:
            earned = [_to_json(measured) for measured in self.measurements]
            content = {"about": self.about, "trust": self.draft_temperature, "earned": earned}
        if self.cost:
            content["cost"] = self.cost
        if self.draft_length:
            content["draft_length"] = {
                kind: dataclasses.asdict(rates) for kind, rates in self.draft_length.items()
            }
        write_atomic(path, json.dumps(content, indent=1) + "\n")
        return path


def check_writable(directory: str | pathlib.Path) -> None:
    """Check that calibration.json can be written, before the minutes that measuring takes.

    Raises:
      UserError: naming the file.
    """
    path = pathlib.Path(directory) / FILE
    part = path.with_name(f"{FILE}.part")
    try:
        part.write_text("")
        part.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({first_line(error)}): the measurements are kept there"
        ) from None


def load(directory: str | pathlib.Path) -> Calibration | None:
    """Read a model's calibration; None if it has none.

    Raises:
      UserError: for a damaged file.
    """
    path = pathlib.Path(directory) / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        about: dict[str, Any] = {}
        temperature, measurements = 1.0, tuple[Measurement, ...]()
        if "earned" in content:
            about, temperature = dict(content["about"]), _positive(content["trust"])
            measurements = tuple(map(_from_json, content["earned"]))
        cost = {
            kind: {_count(b): _points(points) for b, points in curves.items()}
            for kind, curves in content.get("cost", {}).items()
        }
        lengths = {
            kind: LengthRates(
                _count(entry["draft_length"]),
                {_count(k): _positive(rate) for k, rate in entry["tokens_per_second"].items()},
            )
            for kind, entry in content.get("draft_length", {}).items()
        }
        return Calibration(measurements, cost, about, temperature, lengths)
    except (OSError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError) as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
    except RecursionError:
        cause = "nested too deeply"
    raise UserError(f"{path} is damaged ({cause}): delete it or run eval.calibrate")


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r:.40} is no positive finite number")
    return number


def _count(value: Any, least: int = 1) -> int:
    number = int(value)
    if not least <= number < 1 << 31:
        raise ValueError(f"{value!r:.40} is no whole number from {least}")
    return number


def _points(points: Any) -> list[tuple[int, float]]:
    """A curve of milliseconds by rows: at least one point, rows ascending."""
    curve = [(_count(rows), _positive(ms)) for rows, ms in points]
    if not curve or any(a >= b for (a, _), (b, _) in itertools.pairwise(curve)):
        raise ValueError("the rows of a cost curve do not ascend")
    return curve


def _to_json(measured: Measurement) -> dict[str, Any]:
    """A measurement as the file has it, the strategy in the words of the command line."""
    strategy = measured.strategy
    return {
        "cycle": strategy.flags()["cycle"],
        **{name: getattr(strategy, name) for name in COUNTS},
        "rows": strategy.rows,
        "tokens_per_forward": measured.tokens_per_forward,
        "interval": measured.interval,
        "pooled": measured.pooled,
        "accepted": measured.accepted,
        "hits": measured.hit_rate,
    }


def _from_json(entry: dict[str, Any]) -> Measurement:
    counts: dict[str, Any] = {name: _count(entry[name], 0) for name in COUNTS}
    low, high = map(float, entry["interval"])
    return Measurement(
        strategy=Strategy(CYCLES[entry["cycle"]], **counts),
        tokens_per_forward=_positive(entry["tokens_per_forward"]),
        interval=(low, high),
        pooled=_positive(entry["pooled"]),
        accepted=float(entry["accepted"]),
        hit_rate=float(entry["hits"]),
    )


def preferred_draft_length(
    calibration: Calibration | None, block_size: int, kind: str | None = None
) -> int | None:
    """The fastest draft length measured on this kind of device; None if none was measured.

    Args:
      calibration: the model's, or None.
      block_size: the trained K.
      kind: device kind; None is this machine's.

    Raises:
      UserError: for a length that the model cannot draft.
    """
    lengths = {} if calibration is None else calibration.draft_length
    rates = lengths.get(kind or jax.devices()[0].device_kind)
    if rates is None:
        return None
    if not 2 <= rates.draft_length <= block_size:
        raise UserError(
            f"{FILE}: draft_length={rates.draft_length} must be from 2 to {block_size}; "
            "delete the file and run eval.calibrate --only draft-length again"
        )
    return rates.draft_length


@dataclasses.dataclass(frozen=True)
class PlannerChoice:
    """The chosen strategy, and the reason in a sentence."""

    strategy: Strategy
    why: str


def choose(
    calibration: Calibration | None, rows: int, batch: int, block_size: int, kind: str | None = None
) -> PlannerChoice:
    """The strategy of at most `rows` rows per forward with the most expected tokens per second.

    Args:
      calibration: the model's, or None.
      rows: of one prompt in the largest forward, at least 1.
      batch: prompts decoded together.
      block_size: the trained K.
      kind: device kind; None is this machine's.

    Raises:
      UserError: for a budget or a batch below 1.
    """
    check_whole("rows", rows, 1)
    check_whole("batch_size", batch, 1)
    kind = kind or jax.devices()[0].device_kind
    if calibration is None or not calibration.measurements:
        return default_strategy(rows, batch, block_size, kind)
    measured = calibration.cost.get(kind)
    source = "measured here" if measured else f"estimated, never run: {kind} was not calibrated"
    cycle_cost = _cycle_costs(calibration, batch, kind)
    relative_cost = lambda strategy: cycle_cost(strategy) / strategy.forwards

    fitting = [m for m in calibration.measurements if m.strategy.rows <= rows]
    speed = {m: m.pooled / relative_cost(m.strategy) for m in fitting}
    best = max(speed, key=speed.__getitem__, default=None)
    if best is None or speed[best] <= 1:
        gain = f"the best drafting strategy gives {speed[best]:.2f}" if best else "none fits"
        return PlannerChoice(
            Strategy("ar"),
            f"one token per forward is fastest with {rows} rows at batch {batch}: {gain} of its "
            f"speed (costs {source})",
        )
    return PlannerChoice(
        best.strategy,
        f"{best.pooled:.2f} tokens per forward at {relative_cost(best.strategy):.2f} times the "
        f"cost of one row, {speed[best]:.2f} times AR's speed (costs {source})",
    )


def contenders(
    calibration: Calibration | None,
    batch: int,
    block_size: int,
    draft_length: int | None = None,
    kind: str | None = None,
) -> tuple[Contender, ...]:
    """AR and the two drafting strategies, of different methods, that are expected to be fastest.

    The fastest comes first; where acceptance is a guess, the paper's cycle. One that is expected
    to be far slower than AR is left out.

    Args:
      calibration: the model's, or None; then the paper's cycle and `default_strategy` draft.
      batch: prompts decoded together.
      block_size: the trained K.
      draft_length: the fastest of the paper's cycle, if it was measured.
      kind: device kind; None is this machine's.
    """
    kind = kind or jax.devices()[0].device_kind
    cost = _cycle_costs(calibration, batch, kind)
    measurements = () if calibration is None else calibration.measurements
    tokens = {m.strategy: m.accepted + 1 + m.strategy.leading_tokens for m in measurements}
    paper = Strategy("orthrus", draft_length or block_size)
    if not tokens:
        rule = default_strategy(batch * DEFAULT_RIDGE, batch, block_size, kind).strategy
        tokens = {s: _guessed_tokens(s) for s in (paper, rule) if s.method != "ar"}
    elif draft_length is not None:  # the paper's cycle has this length and no other
        papers = {s: n for s, n in tokens.items() if s.method == "orthrus"}
        same = [n for s, n in papers.items() if s.draft_length == draft_length]
        tokens = {s: n for s, n in tokens.items() if s not in papers}
        tokens[paper] = same[0] if same else min([_guessed_tokens(paper), *papers.values()])
    speed = {s: n / cost(s) for s, n in tokens.items()}
    best: dict[str, Strategy] = {}  # by method
    for strategy in sorted(speed, key=speed.__getitem__, reverse=True):
        if speed[strategy] >= HOPELESS:
            best.setdefault(strategy.method, strategy)
    drafting = [Contender(s, tokens[s], cost(s)) for s in list(best.values())[:2]]
    ar = Contender(Strategy("ar"), 1.0, 1.0)
    order = sorted([*drafting, ar], key=lambda c: c.tokens / c.cost, reverse=True)
    if not measurements:  # a guess puts nothing before the paper's cycle, which soon tells better
        order.sort(key=lambda c: c.strategy != paper)
    return tuple(order)


def _guessed_tokens(strategy: Strategy) -> float:
    """Tokens per cycle where acceptance was not measured."""
    chain = strategy.block_size - (2 if strategy.method == "orthrus-1f" else 1)
    return sum(ACCEPTED**n for n in range(chain + 1)) + strategy.leading_tokens


def _cycle_costs(
    calibration: Calibration | None, batch: int, kind: str
) -> Callable[[Strategy], float]:
    """The cost of a strategy's cycle in AR steps: measured on this device, or estimated."""
    curves = None if calibration is None else calibration.cost.get(kind)
    estimate = lambda n: estimated_cost(kind, batch * n)
    cost = (lambda n: _cost(curves, batch, n)) if curves else estimate
    return lambda strategy: sum(map(cost, strategy.forward_rows)) / cost(1)


def estimated_cost(kind: str, rows: int) -> float:
    """A forward's time in forwards of one row, where nothing was measured.

    By a compiler's estimate or another model if there is one; else 1 up to the ridge, then in
    proportion.
    """
    if points := ESTIMATED.get(kind) or MEASURED.get(kind):
        return interpolated(points, rows)
    return max(1.0, rows / _ridge(kind))


def _ridge(kind: str) -> int:
    return next((n for name, n in RIDGE.items() if kind.startswith(name)), DEFAULT_RIDGE)


def _free_rows(kind: str) -> int:
    """The most rows of a forward that costs no more than FREE, or the ridge."""
    if kind not in ESTIMATED:
        return _ridge(kind)
    most = ESTIMATED[kind][-1][0]
    return max(n for n in range(1, most + 1) if estimated_cost(kind, n) <= FREE)


def default_strategy(rows: int, batch: int, block: int, kind: str) -> PlannerChoice:
    """Without measured acceptance: fill the free rows, 70 % with early blocks, 30 % with a tree."""
    free = min(rows, _free_rows(kind) // batch)
    early = max(1, int(0.7 * free / block))
    nodes = free - 1 - early * block
    note = (
        f"by rule: about {free} rows are free on {kind} at batch {batch}; no acceptance in {FILE}"
    )
    if free < 3:
        return PlannerChoice(Strategy("ar"), note)
    if nodes < 1:
        length = min(block, free - 1)  # it drafts with one row more
        return PlannerChoice(Strategy("orthrus-2f", length), note)
    return PlannerChoice(Strategy("orthrus-1f", block, nodes, min(early, nodes + 1)), note)


def _cost(curves: dict[int, list[tuple[int, float]]], batch: int, rows: int) -> float:
    """Milliseconds of a forward, on the nearest measured batch's curve at equal rows in all."""
    nearest = min(curves, key=lambda b: (abs(b - batch), b))
    return interpolated(curves[nearest], rows * batch / nearest)


def interpolated(points: Sequence[tuple[int, float]], rows: float) -> float:
    """Linear between points and, through the last two, beyond them."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect.bisect_left([n for n, _ in points], rows), 1), len(points) - 1)
    (a, low), (b, high) = points[right - 1], points[right]
    return max(low + (high - low) * (rows - a) / (b - a), points[0][1])
