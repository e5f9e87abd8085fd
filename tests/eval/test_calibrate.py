"""Calibration: what is played through a recording is what decoding does, cycle for cycle."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from eval import calibrate
from eval.recorded import Outcome, record, simulate
from orthrus_jax import generate
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.engine import Plan, planner
from orthrus_jax.engine.planner import Calibration, Split
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import params
from tests.support.configs import tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

VOCAB = 400
CONFIG = tiny_config(vocab_size=VOCAB, mask_token_id=VOCAB - 1, num_hidden_layers=1, block_size=6)


def half_right(seed: int) -> dict:
    """Weights whose drafting view is near the AR view, and both like a few tokens best."""
    frozen, _ = params.split(random_params(CONFIG, seed, gain=2.0))
    table = np.array(frozen["embed_tokens"]["embedding"])
    table[np.arange(0, VOCAB, 40)] *= 2.5
    frozen = frozen | {"embed_tokens": {"embedding": table}}
    near = params.diffusion_from_base(params.merge(frozen, {}))
    return params.merge(frozen, jax.tree.map(lambda x: x * 1.01, near))


@pytest.fixture(scope="module")
def told():
    """A model, prompts, and its own answers, some ending early."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(8, VOCAB - 2, n).tolist() for n in (3, 9, 14, 5)]
    model = LLM(CONFIG, half_right(1))
    said = [c.tokens for c in model.complete(prompts, mode="ar", max_new_tokens=40)]
    said[1] = said[1][:17]
    return model, prompts, said


@pytest.mark.parametrize(
    "split",
    [
        Split("paper", 6),
        Split("two-forward", 6),
        Split("two-forward", 6, 9),
        Split("one-forward", 6, 0, 2),
        Split("one-forward", 6, 8, 2, 2),
        Split("one-forward", 6, 0, 0, 3),
        Split("one-forward", 6, 8, 0, 2),
    ],
    ids=lambda s: f"{s.cycle} {s.tree_nodes} {s.early_blocks}+{s.fresh_blocks}",
)
def test_what_is_played_through_is_what_decoding_does(told, split: Split) -> None:
    model, prompts, said = told
    outcome = simulate(record(model, prompts, said, split.draft_length), split.cycle, split.scheme)
    budgets = [len(answer) for answer in said]
    assert outcome.tokens.tolist() == budgets
    for i, (prompt, answer) in enumerate(zip(prompts, said, strict=True)):
        real = model.complete([prompt], max_new_tokens=len(answer), **split.options)[0]
        assert real.tokens == answer
        assert real.forwards == outcome.forwards[i]
    assert outcome.accepted > 0.2, "a drafter that is never right tests little"
    assert 0 < outcome.hits <= 1


@pytest.mark.parametrize("trust", [1.0, 0.5])
def test_confidence_is_trusted_as_far_as_it_earns(told, trust: float, monkeypatch) -> None:
    """Of two, the one with more tokens a forward; and the engine decodes with what it is told."""
    model, prompts, said = told
    recording = record(model, prompts, said, 6)
    monkeypatch.setattr(calibrate, "TRUSTS", (1.0, 0.5))
    earns = lambda r, cycle, scheme: dataclasses.replace(
        OUTCOME, forwards=np.array([10 if scheme.trust == trust else 11])
    )
    monkeypatch.setattr(calibrate, "simulate", earns)
    assert calibrate.trusted(recording) == trust
    found = LLM(CONFIG, model.params, calibration=Calibration((), {}, {}, trust))
    plan = Plan(cycle="one-forward", tree_nodes=8)
    assert found.engine._scheme(plan).trust == trust
    answers = found.complete(prompts, max_new_tokens=17, cycle="one-forward", tree_nodes=8)
    assert [c.tokens for c in answers] == [text[:17] for text in said]


OUTCOME = Outcome(np.array([20]), np.array([10]), 1.0, 1.0)


def test_ar_is_one_forward_a_token(told) -> None:
    model, prompts, said = told
    outcome = simulate(record(model, prompts, said, 6), "ar", Split("paper", 6).scheme)
    np.testing.assert_array_equal(outcome.forwards, outcome.tokens)


def test_splits_spend_at_most_their_budget() -> None:
    found = calibrate.splits(8, (32, 64))
    assert len(set(found)) == len(found)
    assert {s.cycle for s in found} == {"paper", "two-forward", "one-forward"}
    assert max(s.rows for s in found) == 64
    assert all(s.early_blocks <= s.scheme.drafts + 1 for s in found)
    assert any(s.fresh_blocks for s in found)


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


def test_the_command_keeps_both_sides_beside_the_model(directory, capsys, monkeypatch) -> None:
    few = [Split("paper", 6), Split("two-forward", 6, 9), Split("one-forward", 6, 5, 1)]
    monkeypatch.setattr(calibrate, "splits", lambda block, budgets: few)
    monkeypatch.setattr(calibrate, "BUDGETS", (16,))
    monkeypatch.setattr(calibrate, "trusted", lambda recording: 0.8)
    options = ["--model", str(directory), "--prompts", str(directory.parent / "prompts.jsonl")]
    options += [
        "--max-new-tokens",
        "12",
        "--batches",
        "1,2",
        "--repeats",
        "1",
        "--dtype",
        "float32",
    ]
    plot = directory.parent / "rows.png"
    calibrate.main([*options, "--plot", str(plot)])
    assert plot.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "| 12 | one-forward | 6 | 5 | 1 | 0 |" in out
    found = planner.load(directory)
    assert [e.split for e in found.earned] == few
    assert found.trust == 0.8
    (curves,) = found.cost.values()
    assert [[n for n, _ in points] for points in curves.values()] == [[1, 6, 16]] * 2
    assert all(ms > 0 for points in curves.values() for _, ms in points)

    # Again: acceptance is kept, costs are taken anew; other prompts are not mixed in unasked.
    monkeypatch.setattr(calibrate, "record", None)
    calibrate.main(options)
    assert planner.load(directory).earned == found.earned
    with pytest.raises(UserError, match=r"acceptance on other prompts .*--overwrite"):
        calibrate.main([*options, "--limit", "1"])

    capsys.readouterr()
    generate.main(
        ["--model", str(directory), "--prompt", "Hi", "--max-new-tokens", "5", "--rows", "16"]
    )
    assert "--rows 16: --mode" in capsys.readouterr().err
