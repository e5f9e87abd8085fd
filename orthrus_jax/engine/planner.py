"""Split a budget of rows among drafts and blocks: which cycle says most tokens a second here.

Up to a device's ridge a forward of many rows costs little more than one of few; beyond it, or in a
batch, rows are paid for. `eval.calibrate` measures both sides and keeps them beside the model in
calibration.json: what each way to spend rows earns (tokens a forward, a property of the model) and
what a forward costs (by rows and batch, a property of the device). Without the file, a rule.
"""

import bisect
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from orthrus_jax.decoding.overlapped import Scheme
from orthrus_jax.errors import UserError

FILE = "calibration.json"
# Rows at which a bfloat16 forward's arithmetic takes as long as reading the weights: FLOP/s over
# bytes/s of the data sheets, or, on a GPU, where that was measured to begin.
RIDGE = {"TPU v5 lite": 240, "TPU v6 lite": 560, "NVIDIA H100": 165, "NVIDIA H200": 165, "cpu": 4}
USUAL_RIDGE = 160


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to decode, as arguments of Generator.complete name it."""

    cycle: str  # of engine.CYCLES, or "ar"
    draft_length: int = 1
    tree_nodes: int = 0
    early_blocks: int = 0
    fresh_blocks: int = 0

    @property
    def scheme(self) -> Scheme:
        """The same, as the loops of ahead.py are told."""
        return Scheme(self.draft_length, self.tree_nodes, self.early_blocks, self.fresh_blocks)

    @property
    def forwards(self) -> tuple[int, ...]:
        """Rows of each forward of a cycle."""
        if self.cycle == "ar":
            return (1,)
        if self.cycle == "one-forward":
            return (self.scheme.rows,)
        draft = self.draft_length + (self.cycle == "two-forward")
        return (draft, self.scheme.rows)

    @property
    def rows(self) -> int:
        """Rows of the larger forward: what a budget limits."""
        return max(self.forwards)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for Generator.complete, generate and stream."""
        if self.cycle == "ar":
            return {"mode": "ar"}
        return {"mode": "orthrus"} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Earned:
    """A split and what it was measured to earn.

    Attributes:
      tokens_per_forward: mean over prompts, prefill counted.
      interval: its 95 % interval.
      pooled: all tokens over all forwards.
      accepted: drafts emitted a verification.
      hits: share of drafts that were made for the very outcome that came about.
    """

    split: Split
    tokens_per_forward: float
    interval: tuple[float, float]
    pooled: float
    accepted: float
    hits: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A model's calibration.json.

    Attributes:
      earned: of each split that was measured.
      cost: device kind -> batch -> [(rows, milliseconds), ...], rows ascending.
      about: how it was measured: prompts, tokens, their digest.
      trust: see ahead.Scheme; what earned most.
    """

    earned: tuple[Earned, ...]
    cost: dict[str, dict[int, list[tuple[int, float]]]]
    about: dict[str, Any]
    trust: float = 1.0

    def save(self, directory: str | pathlib.Path) -> pathlib.Path:
        """Write the file beside the model."""
        path = pathlib.Path(directory) / FILE
        found: dict[str, Any] = {"about": self.about, "trust": self.trust, "earned": []}
        for each in self.earned:
            plain = dataclasses.asdict(each)
            found["earned"].append(plain.pop("split") | {"rows": each.split.rows} | plain)
        found["cost"] = self.cost
        path.write_text(json.dumps(found, indent=1) + "\n")
        return path


def load(directory: str | pathlib.Path) -> Calibration | None:
    """Read a model's calibration; None where there is none.

    Raises:
      UserError: for a damaged file.
    """
    path = pathlib.Path(directory) / FILE
    if not path.exists():
        return None
    names = [field.name for field in dataclasses.fields(Split)]
    try:
        found = json.loads(path.read_text())
        earned = tuple(
            Earned(
                Split(*(each[name] for name in names)),
                *(float(each["tokens_per_forward"]), tuple(each["interval"])),
                *(float(each[name]) for name in ("pooled", "accepted", "hits")),
            )
            for each in found["earned"]
        )
        cost = {
            kind: {
                int(b): [(int(r), float(ms)) for r, ms in points] for b, points in curves.items()
            }
            for kind, curves in found["cost"].items()
        }
        return Calibration(earned, cost, dict(found["about"]), float(found["trust"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it or run eval.calibrate"
        ) from None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the planner chose, and why, in a sentence."""

    split: Split
    why: str


def choose(
    calibration: Calibration | None, rows: int, batch: int, block_size: int, kind: str | None = None
) -> Choice:
    """The split of at most `rows` rows a forward that should say most tokens a second.

    Args:
      calibration: the model's, or None.
      rows: of one prompt's largest forward, at least 1.
      batch: prompts decoded together.
      block_size: the trained K.
      kind: device kind; None is this machine's.

    Raises:
      UserError: for a budget or a batch below 1.
    """
    for name, value in {"rows": rows, "batch_size": batch}.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    kind = kind or jax.devices()[0].device_kind
    if calibration is None:
        return _by_rule(rows, batch, block_size, kind)
    curves = calibration.cost.get(kind)
    of = (lambda n: _cost(curves, batch, n)) if curves else (lambda n: roofline(kind, batch * n))
    source = "measured here" if curves else f"estimated: {kind} was not calibrated"
    price = lambda e: sum(map(of, e.split.forwards)) / len(e.split.forwards) / of(1)
    speed = {e: e.pooled / price(e) for e in calibration.earned if e.split.rows <= rows}
    best = max(speed, key=speed.__getitem__, default=None)
    if best is None or speed[best] <= 1:
        gain = f"the best drafting split gives {speed[best]:.2f}" if best else "none fits"
        return Choice(
            Split("ar"),
            f"one token a forward is fastest with {rows} rows at batch {batch}: {gain} of its "
            f"speed (costs {source})",
        )
    return Choice(
        best.split,
        f"{best.pooled:.2f} tokens a forward at {price(best):.2f} times the cost of one row, "
        f"{speed[best]:.2f} times AR's speed (costs {source})",
    )


def roofline(kind: str, rows: int) -> float:
    """A forward's time by rows, in forwards of one row: 1 up to the ridge, then in proportion."""
    return max(1.0, rows / _ridge(kind))


def _ridge(kind: str) -> int:
    return next((n for name, n in RIDGE.items() if kind.startswith(name)), USUAL_RIDGE)


def _by_rule(rows: int, batch: int, block: int, kind: str) -> Choice:
    """No calibration: fill what is free, seven rows in ten with early blocks, with a tree else."""
    free = min(rows, _ridge(kind) // batch)
    early = max(1, int(0.7 * free / block))
    nodes = free - 1 - early * block
    note = f"by rule: about {free} rows are free on {kind} at batch {batch}; no {FILE}"
    if free < 3:
        return Choice(Split("ar"), note)
    if nodes < 1:
        return Choice(Split("two-forward", min(block, free - 1)), note)  # it drafts with one more
    return Choice(Split("one-forward", block, nodes, min(early, nodes + 1)), note)


def _cost(curves: dict[int, list[tuple[int, float]]], batch: int, rows: int) -> float:
    """Milliseconds of a forward, between measured points; a batch in between goes by its rows."""
    at = min(curves, key=lambda b: (abs(b - batch), b))
    points = curves[at]
    return interpolated(points, rows * batch / at)


def interpolated(points: Sequence[tuple[int, float]], rows: float) -> float:
    """Linear between points and, by the last two, beyond them."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect.bisect_left([n for n, _ in points], rows), 1), len(points) - 1)
    (a, low), (b, high) = points[right - 1], points[right]
    return max(low + (high - low) * (rows - a) / (b - a), points[0][1])
