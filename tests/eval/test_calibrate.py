"""Calibration: replays match decoding cycle by cycle, and each part is measured and kept."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest

from eval import calibrate
from eval.replay import ReplayResult, record, simulate
from orthrus_jax import generate
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import planner
from orthrus_jax.engine.planner import Calibration, LengthRates, Measurement
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import params
from orthrus_jax.model.pairwise import HEAD, KINDS, TABLE
from tests.support.configs import tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_head, random_params

VOCAB = 400
CONFIG = tiny_config(vocab_size=VOCAB, mask_token_id=VOCAB - 1, num_hidden_layers=1, block_size=6)


def half_right(seed: int) -> dict:
    """Weights whose drafting view is near the AR view, and both prefer a few tokens."""
    frozen, _ = params.split(random_params(CONFIG, seed, gain=2.0))
    table = np.array(frozen["embed_tokens"]["embedding"])
    table[np.arange(0, VOCAB, 40)] *= 2.5
    frozen = frozen | {"embed_tokens": {"embedding": table}}
    near = params.diffusion_from_base(params.merge(frozen, {}))
    return params.merge(frozen, jax.tree.map(lambda x: x * 1.01, near))


@pytest.fixture(scope="module")
def answered():
    """A model, prompts, and its own answers, one of them cut short."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(8, VOCAB - 2, n).tolist() for n in (3, 9, 14, 5)]
    model = LLM(CONFIG, half_right(1))
    answers = [c.tokens for c in model.complete(prompts, strategy="ar", max_new_tokens=40)]
    answers[1] = answers[1][:17]
    return model, prompts, answers


REPLAYED = [
    Strategy("orthrus", 6, early_blocks=0),
    Strategy("orthrus-2f", 6, early_blocks=0),
    Strategy("orthrus-2f", 6, 9, 0),
    Strategy("orthrus-1f", 6, 0, 2),
    Strategy("orthrus-1f", 6, 8, 2, 2),
    Strategy("orthrus-1f", 6, 0, 0, 3),
    Strategy("orthrus-1f", 6, 8, 0, 2),
]


@pytest.mark.parametrize("strategy", REPLAYED, ids=lambda s: str(s.flags()))
def test_replay_takes_the_cycles_that_decoding_takes(answered, strategy: Strategy) -> None:
    model, prompts, answers = answered
    recording = record(model, prompts, answers, strategy.draft_length)
    replayed = simulate(recording, strategy)
    assert replayed.tokens.tolist() == [len(answer) for answer in answers]
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        real = model.complete([prompt], max_new_tokens=len(answer), strategy=strategy)[0]
        assert real.tokens == answer
        assert real.forwards == replayed.forwards[i]
    assert replayed.accepted > 0.2, "a drafter that is never right tests little"
    assert 0 < replayed.hit_rate <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_replay_with_a_pairwise_head_takes_the_cycles_that_decoding_takes(answered, kind) -> None:
    """And the head matters: some answers take other numbers of forwards with it."""
    plain, prompts, answers = answered
    model = LLM(CONFIG, plain.params | {HEAD: random_head(CONFIG, 5, kind=kind)})
    recording, differ = record(model, prompts, answers, 6), 0
    for strategy in REPLAYED if kind == TABLE else REPLAYED[:1]:
        replayed = simulate(recording, strategy)
        without = simulate(recording, dataclasses.replace(strategy, pairwise=False))
        differ += (replayed.forwards != without.forwards).sum()
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            real = model.complete([prompt], max_new_tokens=len(answer), strategy=strategy)[0]
            assert real.tokens == answer
            assert real.forwards == replayed.forwards[i], strategy
    assert differ


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draft_temperature_with_most_tokens_is_fitted_and_used(
    answered, temperature, monkeypatch
) -> None:
    """Of two, the one with more tokens per forward; the engine decodes with the calibrated one."""
    model, prompts, answers = answered
    recording = record(model, prompts, answers, 6)
    monkeypatch.setattr(calibrate, "TEMPERATURES", (1.0, 0.5))
    forwards = lambda s: np.array([10 if s.draft_temperature == temperature else 11])
    monkeypatch.setattr(
        calibrate,
        "simulate",
        lambda recording, strategy: ReplayResult(np.array([20]), forwards(strategy), 1.0, 1.0),
    )
    assert calibrate.fit_draft_temperature(recording) == temperature
    calibration = Calibration(draft_temperature=temperature)
    calibrated = LLM(CONFIG, model.params, calibration=calibration)
    tree = Strategy("orthrus-1f", tree_nodes=8)
    assert calibrated.engine.resolve(tree).draft_temperature == temperature
    texts = calibrated.complete(prompts, max_new_tokens=17, strategy=tree)
    assert [c.tokens for c in texts] == [answer[:17] for answer in answers]


def test_replayed_ar_takes_one_forward_per_token(answered) -> None:
    model, prompts, answers = answered
    replayed = simulate(record(model, prompts, answers, 6), Strategy("ar"))
    np.testing.assert_array_equal(replayed.forwards, replayed.tokens)


def test_strategies_spend_at_most_their_budget() -> None:
    strategies = calibrate.strategies(8, (32, 64))
    assert len(set(strategies)) == len(strategies)
    assert {s.method for s in strategies} == {"orthrus", "orthrus-2f", "orthrus-1f"}
    assert max(s.rows for s in strategies) == 64
    assert all(s.early_blocks <= s.drafts + 1 for s in strategies)
    assert any(s.fresh_blocks for s in strategies)


@pytest.fixture
def directory(tmp_path):
    """A small trained checkpoint, and a file of prompts."""
    texts = ["How many apples are 12 and 30?", "They are 42 apples."] * 20
    path = tmp_path / "model"
    config = dataclasses.replace(CONFIG, eos_token_ids=(2,))
    save_checkpoint(path, config, half_right(1), tokenizer=small_tokenizer(texts, VOCAB))
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in texts[:2])
    )
    return path


@pytest.fixture
def command(directory, monkeypatch):
    """Run the command on few strategies and budgets; its options end with those given."""
    few = [
        Strategy("orthrus", 6, early_blocks=0),
        Strategy("orthrus-2f", 6, 9, 0),
        Strategy("orthrus-1f", 6, 5, 1),
    ]
    monkeypatch.setattr(calibrate, "strategies", lambda block, budgets: few)
    monkeypatch.setattr(calibrate, "BUDGETS", (16,))
    monkeypatch.setattr(calibrate, "LENGTHS", (2, 4, 16))
    monkeypatch.setattr(calibrate, "fit_draft_temperature", lambda recording: 0.8)
    prompts = str(directory.parent / "prompts.jsonl")
    sizes = ["--max-new-tokens", "12", "--batches", "1,2", "--repeats", "1", "--dtype", "float32"]
    return lambda *more: calibrate.main(
        ["--model", str(directory), "--prompts", prompts, *sizes, *more]
    )


def test_command_keeps_all_parts_beside_the_model(directory, command, capsys, monkeypatch) -> None:
    plot = directory.parent / "rows.png"
    command("--plot", str(plot))
    assert plot.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "| 12 | one-forward | 6 | 5 | 1 | 0 |" in out
    assert out.startswith("acceptance: 2 prompts, 12 new tokens at most: too few prompts for an ")
    assert "±" not in out
    kept = planner.load(directory)
    assert [m.strategy for m in kept.measurements] == calibrate.strategies(6, ())
    assert kept.draft_temperature == 0.8
    (curves,) = kept.cost.values()
    assert [[n for n, _ in points] for points in curves.values()] == [[1, 6, 16]] * 2
    assert all(ms > 0 for points in curves.values() for _, ms in points)
    (rates,) = kept.draft_length.values()
    assert list(rates.tokens_per_second) == [2, 4, 6]
    assert rates.tokens_per_second[rates.draft_length] == max(rates.tokens_per_second.values())
    assert f"draft length {rates.draft_length:3d}" in out
    assert out.count("<- best") == 1

    # Again: acceptance is kept, costs are measured anew; other prompts need --overwrite.
    monkeypatch.setattr(calibrate, "record", None)
    command("--only", "costs")
    again = planner.load(directory)
    assert again.measurements == kept.measurements
    assert again.draft_length == kept.draft_length
    with pytest.raises(
        UserError, match=r"on other prompts \(2 prompts, 12 new tokens at most\): --overwrite"
    ):
        command("--limit", "1")


@pytest.mark.parametrize(("dear", "cycle"), [(1.0, "one-forward"), (100.0, "")])
def test_rows_option_decodes_as_the_calibration_says(dear, cycle, directory, capsys) -> None:
    """The strategy with most tokens where rows are free; none where they are dear."""
    strategies = (
        Strategy("orthrus", 6, early_blocks=0),
        Strategy("orthrus-2f", 6, 9, 0),
        Strategy("orthrus-1f", 6, 5, 1),
    )
    kind = jax.devices()[0].device_kind
    Calibration(
        tuple(
            Measurement(s, tokens, (tokens, tokens), tokens, 1.0, 1.0)
            for s, tokens in zip(strategies, (1.5, 1.7, 2.5), strict=True)
        ),
        cost={kind: {1: [(1, 1.0), (16, dear)]}},
    ).save(directory)
    generate.main(
        ["--model", str(directory), "--prompt", "Hi", "--max-new-tokens", "5", "--rows", "16"]
    )
    chosen = capsys.readouterr().err
    if cycle:
        assert f"--rows 16: --mode orthrus --cycle {cycle} --draft-length 6" in chosen
        assert "2.50 tokens per forward at 1.00 times the cost of one row" in chosen
    else:
        assert "--rows 16: --mode ar\n" in chosen


@pytest.mark.parametrize("part", ["costs", "draft-length"])
def test_command_measures_one_part_alone(part: str, directory, command, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "record", None)
    command("--only", part)
    kept = planner.load(directory)
    assert kept.measurements == ()
    assert bool(kept.cost) == (part == "costs")
    assert bool(kept.draft_length) == (part == "draft-length")
    assert "by rule" in planner.choose(kept, 16, 1, 6).why
    model = generate.load(directory)
    assert model.plan(16) == planner.choose(model.calibration, 16, 1, 6).strategy


def test_measured_draft_length_is_the_default_of_a_loaded_model(directory) -> None:
    assert generate.load(directory).draft_length is None
    kind = jax.devices()[0].device_kind
    elsewhere = LengthRates(3, {3: 1.0})
    Calibration(draft_length={"another device": elsewhere}).save(directory)
    assert generate.load(directory).draft_length is None
    here = LengthRates(4, {2: 1.0, 4: 2.0})
    calibrate.add_draft_length(planner.load(directory), here).save(directory)
    assert generate.load(directory).draft_length == 4
    assert planner.load(directory).draft_length == {"another device": elsewhere, kind: here}


def test_draft_lengths_take_turns_and_the_first_turn_is_not_timed(monkeypatch) -> None:
    """Each length answers once per turn; tokens over seconds, the median of the timed turns."""
    order = []

    def complete(prompts, strategy, **options):
        assert strategy == Strategy(draft_length=strategy.draft_length)
        assert options == {"max_new_tokens": 7}
        order.append(strategy.draft_length)
        return [types.SimpleNamespace(tokens=[0] * 4 * strategy.draft_length)] * len(prompts)

    model = types.SimpleNamespace(config=types.SimpleNamespace(block_size=5), complete=complete)
    clock = itertools.count()
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
    rates = calibrate.measure_draft_lengths(model, [[1], [2]], 2, max_new_tokens=7)
    assert order == [2, 3, 4, 5] * 3
    assert rates == LengthRates(5, {k: 8.0 * k for k in (2, 3, 4, 5)})


def test_interval_is_shown_where_there_are_prompts_enough() -> None:
    paper = Strategy("orthrus", 6, early_blocks=0)
    measured = (Measurement(paper, 2.0, (1.9, 2.1), 2.0, 1.0, 1.0),)
    tables = [
        calibrate.table(Calibration(measured, about={"prompts": n}), (16,), 6) for n in (9, 10)
    ]
    assert "| 2.00 |" in tables[0]
    assert "| 2.00 ± 0.10 |" in tables[1]


def test_unwritable_model_is_refused_before_anything_is_measured(command, monkeypatch) -> None:
    def refuse(directory):
        raise UserError("calibration.json cannot be written")

    monkeypatch.setattr(planner, "check_writable", refuse)
    monkeypatch.setattr(calibrate, "load", None)
    with pytest.raises(UserError, match="cannot be written"):
        command()


def test_bad_input_is_refused_by_name(directory, command, monkeypatch, capsys) -> None:
    monkeypatch.setattr(calibrate, "load", None)
    refused = {"--limit": "0", "--batches": "1,0", "--repeats": "-1", "--batch-size": "x"}
    for flag, value in refused.items():
        with pytest.raises(SystemExit) as end:
            command(flag, value)
        assert end.value.code == 2
        assert f"argument {flag}: {value!r} is not a " in capsys.readouterr().err
    positions = CONFIG.max_position_embeddings
    with pytest.raises(UserError, match=f"--context 9999999: the model has {positions} positions"):
        command("--context", "9999999")
    with pytest.raises(UserError, match=r"--batches 100000000 with --context 64 needs about .* GB"):
        command("--context", "64", "--batches", "1,100000000")
    with pytest.raises(UserError, match=r"--prompts FILE\.jsonl is needed, except with"):
        calibrate.main(["--model", str(directory)])
    with pytest.raises(UserError, match=r"--model absent is no directory: calibration\.json"):
        calibrate.main(["--model", "absent"])
