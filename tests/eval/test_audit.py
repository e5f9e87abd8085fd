"""The audit of greedy and coupled text passes exact decoders, and finds faults in others."""

import dataclasses

import jax.numpy as jnp
import pytest

from eval.audit import Options
from eval.lossless import table
from eval.reference import near_tie
from orthrus_jax.attention import cache
from orthrus_jax.decoding import Acceptance, Strategy, sampling, speculative
from orthrus_jax.errors import UserError
from tests.support.audits import (
    accepted_drafts_not_written,
    always_accept_equal,
    audited,
    tiny_model,
    write,
    written_late,
)
from tests.support.configs import tiny_config

slow = pytest.mark.slow  # each of these compiles an audit of its own


@pytest.mark.parametrize("view", ["copy", "random"])
def test_honest_rule_passes_token_by_token(view: str) -> None:
    texts = {"coupled": 16} if view == "copy" else {"greedy": 8}
    model = tiny_model(view=view, num_hidden_layers=2)
    result = audited(*texts, model=model, seeds=2, batch_size=6)
    assert not result["failures"]
    assert table(result).endswith("\nPASS")
    for part, count in texts.items():
        figures = result["parts"][part]
        assert figures["texts"] == count
        assert figures["divergences"] == []
        assert figures["acceptance_length"] > (0.2 if view == "copy" else 0.01)
        for f in (figures["orthrus"], *figures["floor"].values()):
            assert f["exact_match"] == 1.0
        for f in (figures["orthrus"], figures["floor"]["AR, no cache"]):
            assert f["flips"] == 0
            assert f["tokens"] > 8 * count
            assert f["largest_gap"] == 0


TREE = Strategy("orthrus-1f", tree_nodes=6, early_blocks=2, fresh_blocks=1)


@pytest.mark.parametrize("part", ["coupled", pytest.param("greedy", marks=slow)])
def test_tree_verified_while_drafting_passes(part: str) -> None:
    result = audited(part, seeds=2, strategy=TREE)
    assert not result["failures"]
    assert result["parts"][part]["orthrus"]["exact_match"] == 1.0
    assert result["parts"][part]["acceptance_length"] > 0, "no draft was audited"


def test_two_forward_cycle_passes() -> None:
    """A cycle emits one token more than the paper's for as many accepted drafts."""
    result = audited("greedy", strategy=Strategy("orthrus-2f"))
    assert not result["failures"]
    assert result["parts"]["greedy"]["orthrus"]["exact_match"] == 1.0


def test_tree_slots_left_uncompacted_are_failures(monkeypatch) -> None:
    monkeypatch.setattr(cache.KVCache, "compact", lambda self, first, rows: self)
    failures = audited("greedy", strategy=TREE)["failures"]
    assert {failure.text for failure in failures} == {"orthrus"}
    assert all(failure.gap > failure.limit for failure in failures)


def test_audit_of_ar_is_refused() -> None:
    with pytest.raises(UserError, match="strategy 'ar' drafts nothing"):
        Options(parts=("greedy",), strategy=Strategy("ar"))


@slow
def test_draft_length_option_is_the_one_audited() -> None:
    result = audited("greedy", strategy=Strategy(draft_length=2))
    assert not result["failures"]
    assert 0 < result["parts"]["greedy"]["acceptance_length"] <= 1


@slow
def test_bfloat16_passes_within_its_near_ties_and_shows_its_noise_floor() -> None:
    """Its roundings do change tokens: without an allowance the same model fails."""
    model = tiny_model(num_hidden_layers=3, dtype="bfloat16")
    options = {"seeds": 8, "temperature": 0.5, "batch_size": 16}
    result = audited("coupled", model=model, **options)
    assert not result["failures"], result["failures"]
    figures = result["parts"]["coupled"]
    floor = figures["floor"]["AR, no cache"]
    assert 0 < floor["flips"] < 0.05 * floor["tokens"]
    assert 0.5 < floor["exact_match"] < 1
    assert figures["orthrus"]["exact_match"] > 0.5
    assert 0 < floor["largest_relative_gap"] < near_tie(model.config)
    assert len(figures["divergences"]) == round(64 * (1 - figures["orthrus"]["exact_match"]))
    for d in figures["divergences"]:
        assert abs(d["gap"]) <= d["limit"]
    strict = audited("coupled", model=model, near_tie=0.0, **options)
    assert {failure.why for failure in strict["failures"]} >= {"no cache"}


def bonus_off_by_one(drafts, predicted) -> Acceptance:
    """The token after the accepted drafts is taken one row too early."""
    accepted = sampling.accept_equal(drafts, predicted).accepted
    index = jnp.arange(predicted.shape[1])
    source = jnp.where((index == accepted[:, None]) & (accepted[:, None] > 0), index - 1, index)
    return Acceptance(jnp.take_along_axis(predicted, source, axis=1), accepted)


def all_written_late(kv, k, v, start):
    """In every loop alike, the reference's among them: AR decoding agrees with it."""
    return write(kv, k, v, start + 1)


CHOICE_FAULTS = {
    "always accept": (speculative, "accept_equal", always_accept_equal),
    "bonus off by one": (speculative, "accept_equal", bonus_off_by_one),
    "a slot late": (cache.LayerCache, "write", written_late),
    "drafts not written": (cache.LayerCache, "write", accepted_drafts_not_written),
    "all a slot late": (cache.LayerCache, "write", all_written_late),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name in ("always accept", "all a slot late") else slow)
        for name in CHOICE_FAULTS
    ],
)
def test_fault_shows_in_greedy_texts(fault: str, monkeypatch) -> None:
    monkeypatch.setattr(*CHOICE_FAULTS[fault])
    result = audited("greedy")
    failures = result["failures"]
    assert failures
    ours = [f for f in failures if f.text == "orthrus" and f.gap is not None]
    assert all(f.gap > f.limit > 0 for f in ours)
    assert all(f.token != f.ar_token for f in ours)
    references = {f.why for f in ours}
    if fault == "all a slot late":
        assert result["parts"]["greedy"]["orthrus"]["exact_match"] == 1.0
        assert references == {"no cache"}
        assert any(f.text == "ar" for f in failures)
    else:
        assert references == {"one row", "no cache"}
        figures = result["parts"]["greedy"]
        assert figures["orthrus"]["exact_match"] < 1
        # Both texts share the context of the first divergence: there the gap is the failure's.
        by_place = {(f.prompt, f.position): f for f in ours if f.why == "one row"}
        for d in figures["divergences"]:
            assert by_place[d["prompt"], d["position"]].gap == pytest.approx(d["gap"])
    text = table(result)
    assert "\nFAIL: " in text
    assert str(failures[0]) in text


@slow
def test_always_accept_rule_shows_in_coupled_texts(monkeypatch) -> None:
    monkeypatch.setattr(speculative, "accept_equal", always_accept_equal)
    result = audited("coupled", seeds=1)
    assert {failure.part for failure in result["failures"]} == {"coupled"}
    assert result["parts"]["coupled"]["orthrus"]["exact_match"] < 0.2


def test_answer_that_ends_too_early_is_a_failure(monkeypatch) -> None:
    model = tiny_model()
    honest = model.engine.serve

    def cut(requests, plan):
        for event in honest(requests, plan):
            if event.index == 3 and plan.strategy.method == "orthrus":
                answer = dataclasses.replace(event.completion, tokens=event.completion.tokens[:-1])
                event = dataclasses.replace(event, completion=answer)
            yield event

    monkeypatch.setattr(model.engine, "serve", cut)
    result = audited("greedy", model=model)
    (failure,) = result["failures"]
    assert (failure.prompt, failure.text) == (3, "orthrus")
    assert "must end after" in str(failure)
    (divergence,) = result["parts"]["greedy"]["divergences"]
    assert (divergence["token"], divergence["gap"]) == (None, None)
    assert "prompt 3, seed 0" in table(result)


def test_near_tie_depends_on_dtype_and_depth() -> None:
    at = lambda **changes: near_tie(tiny_config(**changes))
    assert at(num_hidden_layers=28) == 1e-3
    assert at(num_hidden_layers=4, dtype="bfloat16") == pytest.approx(8 * 2**-8 * 3)
    assert at(num_hidden_layers=4, dtype="float16") == pytest.approx(8 * 2**-11 * 3)
    assert at(dtype="bfloat16") < at(dtype="bfloat16", num_hidden_layers=28) < 0.3
