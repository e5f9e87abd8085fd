"""The planner: its choice from measured figures, from an estimate, by rule; and its file."""

import dataclasses
import json
import pathlib

import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import planner
from orthrus_jax.engine.planner import (
    Calibration,
    LengthRates,
    Measurement,
    choose,
    preferred_draft_length,
)
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config

KIND = "a device"
PAPER = Strategy("orthrus", 8, early_blocks=0)
WIDE = Strategy("orthrus-1f", 8, 15, 6)
WIDER = Strategy("orthrus-2f", 8, 63, 0)


def calibration(curves: dict[int, list[tuple[int, float]]] | None = None) -> Calibration:
    """The paper's cycle, 64 rows in one forward, 64 rows in the second of two."""
    figures = {PAPER: 2.6, WIDE: 4.8, WIDER: 3.5}
    measured = (Measurement(s, n, (n - 0.1, n + 0.1), n, 3.0, 0.9) for s, n in figures.items())
    return Calibration(tuple(measured), {KIND: curves} if curves else {}, {"prompts": 3})


RATES = LengthRates(4, {2: 5.0, 4: 9.5, 8: 7.25})
FLAT = {1: [(1, 10.0), (256, 10.0)]}
STEEP = {1: [(1, 10.0), (9, 14.0), (64, 80.0)]}


@pytest.mark.parametrize(
    ("curves", "rows", "strategy", "reason"),
    [
        (FLAT, 64, WIDE, "4.80 tokens per forward at 1.00 times the cost of one row, 4.80 times"),
        (FLAT, 63, PAPER, "2.60 tokens per forward"),
        (STEEP, 64, PAPER, "2.60 tokens per forward at 1.35 times the cost of one row, 1.93 times"),
        (
            FLAT,
            7,
            Strategy("ar"),
            "per forward is fastest with 7 rows at batch 1: none fits",
        ),
        ({1: [(1, 1.0), (8, 8.0)]}, 64, Strategy("ar"), "gives 0.33 of its speed"),
    ],
)
def test_choice_has_most_tokens_per_second(
    curves, rows: int, strategy: Strategy, reason: str
) -> None:
    choice = choose(calibration(curves), rows, 1, 8, KIND)
    assert choice.strategy == strategy
    assert reason in choice.why
    assert "measured here" in choice.why


def test_batch_multiplies_the_cost_of_rows() -> None:
    """Four prompts of 64 rows are 256 rows: at batch 4 the measured curve, else the nearest's."""
    curves = {1: [(1, 10.0), (64, 11.0), (256, 40.0)]}
    assert choose(calibration(curves), 64, 1, 8, KIND).strategy == WIDE
    assert choose(calibration(curves), 64, 4, 8, KIND).strategy == PAPER
    assert (
        choose(calibration(curves | FLAT | {4: [(1, 1.0), (64, 1.0)]}), 64, 4, 8, KIND).strategy
        == WIDE
    )


def test_uncalibrated_device_is_estimated_by_its_compiler_another_model_or_its_ridge() -> None:
    on = lambda kind, batch: choose(calibration(FLAT), 256, batch, 8, kind)
    assert on("TPU v6 lite", 1).strategy == WIDE
    assert "estimated, never run: TPU v6 lite was not calibrated" in on("TPU v6 lite", 1).why
    assert on("TPU v6 lite", 8).strategy == PAPER
    assert on("TPU v6 lite", 64).strategy == Strategy("ar")
    assert on("cpu", 4).strategy == PAPER
    assert on("cpu", 16).strategy == Strategy("ar")


def test_estimated_cost_follows_the_compiler_s_curve_where_there_is_one() -> None:
    cost = planner.estimated_cost
    for kind, points in planner.ESTIMATED.items():
        assert [cost(kind, rows) for rows, _ in points] == [ratio for _, ratio in points]
    assert cost("TPU v5 lite", 96) == pytest.approx(1.13)
    assert cost("TPU v5 lite", 512) > 3.5
    assert cost("NVIDIA H100 80GB HBM3", 165) == 1
    assert cost("NVIDIA H100 80GB HBM3", 330) == 2


@pytest.mark.parametrize(
    ("kind", "rows", "batch", "strategy"),
    [
        ("TPU v6 lite", 160, 1, Strategy("orthrus-1f", 32, 50, 3)),
        ("TPU v5 lite", 512, 1, Strategy("orthrus-1f", 32, 60, 2)),
        ("TPU v5 lite", 512, 8, Strategy("orthrus-2f", 14)),
        ("TPU v5 lite", 4, 1, Strategy("orthrus-2f", 3)),
        ("TPU v5 lite", 2, 1, Strategy("ar")),
        ("NVIDIA H200 141GB", 64, 1, Strategy("orthrus-1f", 32, 31, 1)),
        ("cpu", 160, 1, Strategy("orthrus-2f", 3)),
        ("cpu", 160, 8, Strategy("ar")),
        ("unheard of", 160, 1, Strategy("orthrus-1f", 32, 63, 3)),
    ],
)
def test_without_acceptance_the_free_rows_are_filled(kind, rows, batch, strategy) -> None:
    choice = choose(None, rows, batch, 32, kind)
    assert choice.strategy == strategy
    assert choice.strategy.resolve(tiny_config(block_size=32)).rows <= max(rows, 1)
    assert "by rule" in choice.why
    others = Calibration(cost={kind: FLAT}, draft_length={kind: RATES})
    assert choose(others, rows, batch, 32, kind) == choice


@pytest.mark.parametrize(
    ("points", "rows", "cost"),
    [
        ([(1, 2.0), (9, 4.0), (17, 12.0)], 5, 3.0),
        ([(1, 2.0), (9, 4.0), (17, 12.0)], 17, 12.0),
        ([(1, 2.0), (9, 4.0), (17, 12.0)], 25, 20.0),
        ([(1, 5.0), (2, 4.0)], 40, 5.0),
        ([(1, 5.0)], 40, 5.0),
    ],
)
def test_costs_between_and_beyond_measured_points(points, rows, cost) -> None:
    assert planner.interpolated(points, rows) == pytest.approx(cost)


def test_file_is_read_as_it_was_written(tmp_path) -> None:
    written = calibration(STEEP)
    assert planner.load(tmp_path) is None
    assert written.save(tmp_path).name == planner.FILE
    assert planner.load(tmp_path) == written


@pytest.mark.parametrize(
    "written",
    [
        calibration(),
        Calibration(cost={KIND: STEEP}),
        Calibration(draft_length={KIND: RATES, "another": LengthRates(2, {2: 1.0})}),
        dataclasses.replace(calibration(FLAT), draft_temperature=0.65, draft_length={KIND: RATES}),
    ],
    ids=["acceptance", "costs", "draft length", "all"],
)
def test_file_may_hold_any_part(written: Calibration, tmp_path) -> None:
    path = written.save(tmp_path)
    assert planner.load(tmp_path) == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_preferred_draft_length_is_that_of_the_device() -> None:
    lengths = Calibration(draft_length={KIND: RATES})
    assert preferred_draft_length(lengths, 8, KIND) == 4
    assert preferred_draft_length(lengths, 4, KIND) == 4
    assert preferred_draft_length(lengths, 8, "another device") is None
    assert preferred_draft_length(lengths, 8) is None
    assert preferred_draft_length(calibration(FLAT), 8, KIND) is None
    assert preferred_draft_length(None, 8, KIND) is None


@pytest.mark.parametrize("length", [1, 0, 4])
def test_preferred_draft_length_outside_the_trained_one_is_refused(length: int) -> None:
    lengths = Calibration(draft_length={KIND: LengthRates(length, {length: 1.0})})
    with pytest.raises(
        UserError, match=rf"^calibration\.json: draft_length={length} must be from 2"
    ):
        preferred_draft_length(lengths, 3, KIND)


def test_unwritable_directory_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    planner.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)  # tests may run as root
    with pytest.raises(
        UserError, match=r"calibration\.json cannot be written \(Permission denied\)"
    ):
        planner.check_writable(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"about": {}, "earned": [{"cycle": "paper"}], "cost": {}}',
        '{"draft_length": {"a device": 4}}',
        '{"draft_length": {"a device": {"draft_length": null, "tokens_per_second": {}}}}',
        '{"draft_length": {"a device": {"draft_length": 4, "tokens_per_second": {"two": 5}}}}',
    ],
)
def test_damaged_file_is_refused_by_name(tmp_path, text: str) -> None:
    (tmp_path / planner.FILE).write_text(text)
    with pytest.raises(UserError, match=r"calibration\.json is damaged .* delete it or run"):
        planner.load(tmp_path)


@pytest.mark.parametrize(("rows", "batch", "name"), [(0, 1, "rows=0"), (9, 0, "batch_size=0")])
def test_no_rows_and_no_prompts_are_refused(rows, batch, name) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1"):
        LLM(tiny_config(), {}).plan(rows, batch)


def test_flags_are_those_of_the_commands(tmp_path) -> None:
    assert Strategy("ar").flags() == {"mode": "ar"}
    calibration(FLAT).save(tmp_path)
    flags = planner.choose(planner.load(tmp_path), 64, 1, 8, KIND).strategy.flags()
    assert flags == {
        "mode": "orthrus", "cycle": "one-forward", "draft_length": 8,
        "tree_nodes": 15, "early_blocks": 6, "fresh_blocks": 0,
    }  # fmt: skip
    assert json.loads((tmp_path / planner.FILE).read_text())["earned"][1]["rows"] == 64


# Contenders


def contenders(*args, **options) -> list[Strategy]:
    return [c.strategy for c in planner.contenders(*args, kind=KIND, **options)]


def test_contenders_are_ar_and_the_fastest_of_two_methods_best_first() -> None:
    assert contenders(calibration(FLAT), 1, 8) == [WIDE, WIDER, Strategy("ar")]
    ranked = planner.contenders(calibration(STEEP), 1, 8, kind=KIND)
    assert [c.strategy for c in ranked[:2]] == [PAPER, Strategy("ar")]
    assert ranked[0].tokens == 4.0, "three accepted, and the AR view's own"
    assert ranked[0].cost == pytest.approx(2.7), "two forwards of eight rows"


def test_batch_in_which_drafts_cannot_pay_has_ar_alone() -> None:
    assert contenders(calibration({1: [(1, 1.0), (8, 8.0)]}), 1, 8) == [Strategy("ar")]
    assert contenders(calibration(STEEP), 64, 8) == [Strategy("ar")]
    assert [c.strategy for c in planner.contenders(None, 64, 32, kind="cpu")] == [Strategy("ar")]


def test_measured_draft_length_is_the_paper_cycles() -> None:
    papers = [s for s in contenders(calibration(STEEP), 1, 8, draft_length=4) if s != WIDER]
    assert papers == [Strategy("orthrus", 4), Strategy("ar")]
    assert contenders(None, 1, 8, draft_length=4)[0] == Strategy("orthrus", 4)


def test_guessed_acceptance_puts_nothing_before_the_paper_cycle() -> None:
    on = lambda kind, batch: [c.strategy for c in planner.contenders(None, batch, 8, kind=kind)]
    assert on("cpu", 1) == [Strategy("orthrus", 8), Strategy("ar"), Strategy("orthrus-2f", 3)]
    assert on("cpu", 16) == [Strategy("orthrus", 8), Strategy("ar")]
    first, second, last = on("NVIDIA H100 80GB HBM3", 1)
    assert (first, second.method, last) == (Strategy("orthrus", 8), "orthrus-1f", Strategy("ar"))
    assert on("NVIDIA H100 80GB HBM3", 64) == [Strategy("orthrus", 8), Strategy("ar")]
    assert on("NVIDIA H100 80GB HBM3", 512) == [Strategy("ar")]
