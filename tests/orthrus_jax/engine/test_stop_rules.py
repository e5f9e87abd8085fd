"""The ends of an answer: stop strings, end tokens, minimum and maximum of tokens."""

import jax
import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import STREAM_CYCLES, Request, SamplingParams
from orthrus_jax.engine import queue as queue_module
from orthrus_jax.tokenizer import decode as decode_text
from tests.support.engine import (
    cut_at,
    hashing,
    plain_text_of,
    plan_of,
    prompts_of,
    served,
    stop_strings_of,
    table_of,
    tokenizer,
)
from tests.support.fake_models.hashed import LIMIT, K, forwards, greedy_text

CYCLES = {
    "ar": Strategy("ar"),
    "paper": Strategy("orthrus", accept="coupled"),
    "two-forward": Strategy("orthrus-2f"),
    "one-forward": Strategy("orthrus-1f"),
    "tree": Strategy("orthrus-1f", tree_nodes=6),
}


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("seed", [0, 1])
def test_stop_string_ends_the_text_anywhere(model, mode, seed) -> None:
    (prompt,) = prompts_of(1, seed)
    ids, _ = plain_text_of(prompt)
    reasons = set()
    for stop in stop_strings_of(prompt):
        (completion,) = model.complete([prompt], strategy=mode, max_new_tokens=40, stop=stop)
        assert (completion.tokens, completion.text, completion.finish_reason) == cut_at(
            ids, stop
        ), stop
        reasons.add((completion.finish_reason, len(completion.tokens) == 40))
    assert ("stop", False) in reasons
    assert ("length", True) in reasons


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_stop_string_wins_over_a_later_end_token(model, mode) -> None:
    (prompt,) = prompts_of(1, 5)
    ids, text = plain_text_of(prompt)
    options = {"strategy": mode, "max_new_tokens": 40, "stop_token_ids": (ids[10],)}
    plain = ids[: ids.index(ids[10]) + 1]
    (ended,) = model.complete([prompt], **options)
    assert (ended.tokens, ended.finish_reason) == (plain, "stop")
    (stopped,) = model.complete([prompt], **options, stop=(text[3:6],))
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == cut_at(plain, (text[3:6],))
    assert len(stopped.tokens) < len(plain)
    (unstopped,) = model.complete([prompt], **options, stop=(text[-3:],))
    assert unstopped.tokens == plain


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize(("mode", "accept"), [("ar", "coupled"), ("orthrus", "coupled")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_row_ended_by_a_stop_string_is_replaced(model, refill, mode, accept, temperature) -> None:
    prompts = prompts_of(13, seed=6)
    options = {"max_new_tokens": 60, "stop": ("Q", "5", "z4"), "temperature": temperature}
    options |= {"strategy": Strategy(mode, accept=accept)}
    alone = [model.complete([p], **options)[0] for p in prompts]
    full = [model.complete([p], **options | {"stop": ()})[0].tokens for p in prompts]
    together = model.complete(prompts, **options, batch_size=4, refill=refill)
    expected = [cut_at(ids, options["stop"]) for ids in full]
    shown = lambda completions: [(c.tokens, c.text, c.finish_reason) for c in completions]
    assert shown(alone) == expected
    assert shown(together) == expected
    sizes = [len(c.tokens) for c in together]
    assert min(sizes) < 20 < max(sizes), "some end early, some late"


def test_loop_runs_on_only_for_rows_that_have_not_stopped(monkeypatch) -> None:
    """Without a refill a stopped row is done at the next pause; its cycles stop there too."""
    views, fetch = [], queue_module._fetch
    monkeypatch.setattr(queue_module, "_fetch", lambda s: views.append(fetch(s)) or views[-1])
    generator = hashing(counted=True)
    prompts = prompts_of(3, seed=7)
    texts = [plain_text_of(p, 60)[1] for p in prompts]
    options = {"strategy": "ar", "max_new_tokens": 60, "batch_size": 3, "refill": False}
    stop = (texts[0][2:6], texts[1][4:9])
    forwards.clear()
    completions = generator.complete(prompts, **options, stop=stop)
    jax.effects_barrier()
    assert [c.finish_reason for c in completions] == ["stop", "stop", "length"]
    assert views[-1].cycles.tolist() == [STREAM_CYCLES, STREAM_CYCLES, 59]
    assert [c.cycles for c in completions] == [len(c.tokens) - 1 for c in completions]
    assert len(forwards) == 60

    forwards.clear()
    generator.complete(prompts[:2] * 2, **options | {"batch_size": 4}, stop=stop)
    jax.effects_barrier()
    assert len(forwards) == 1 + STREAM_CYCLES, "all rows stopped: the loop ends"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("ends", [(0,), (2, 0, 7), (2, 1, 0, 319, 318)])
def test_any_end_token_ends_an_answer_also_id_0(mode, ends) -> None:
    generator = hashing(eos_token_ids=ends)
    prompts = prompts_of(6, seed=8)
    completions = generator.complete(prompts, strategy=mode, max_new_tokens=90, batch_size=2)
    expected = [greedy_text(p, table_of("plain"), 90, ends) for p in prompts]
    assert [c.tokens for c in completions] == expected
    for completion in completions:
        ended = completion.tokens[-1] in ends
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.tokens) == 90
        assert completion.text == decode_text(tokenizer(), completion.tokens)
    assert 0 in [c.tokens[-1] for c in completions], "id 0 ended none"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_stop_token_ids_apply_to_their_own_request(mode) -> None:
    engine = hashing(eos_token_ids=(0,)).engine
    prompts, requests, expected = prompts_of(8, seed=9), [], []
    for i, prompt in enumerate(prompts):
        ids, _ = plain_text_of(prompt)
        own = tuple(ids[3 : 3 + i % 4])
        requests.append(Request(prompt, SamplingParams(max_new_tokens=40, stop_token_ids=own)))
        expected.append(greedy_text(prompt, table_of("plain"), 40, (0, *own)))
    answers, _ = served(engine, requests, plan_of(mode, batch_size=3))
    assert [answers[i].tokens for i in range(8)] == expected
    assert {len(tokens) for tokens in expected} != {40}
    for i, request in enumerate(requests):
        ended = expected[i][-1] in (0, *request.sampling.stop_token_ids)
        assert answers[i].finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_comes_before_min_new_tokens(temperature) -> None:
    prompts, table = prompts_of(5, seed=10), table_of("plain")
    ends = tuple({t for p in prompts for t in greedy_text(p, table, 6)})
    generator = hashing(eos_token_ids=ends[:3])
    options = {"max_new_tokens": 30, "stop_token_ids": ends[3:], "batch_size": 2}
    options |= {"temperature": temperature}
    strategies = Strategy("ar"), Strategy(accept="coupled")
    for least in (1, 2, 7, 30):
        options["min_new_tokens"] = least
        ar, orthrus = (generator.complete(prompts, strategy=s, **options) for s in strategies)
        assert [c.tokens for c in orthrus] == [c.tokens for c in ar]
        assert [c.finish_reason for c in orthrus] == [c.finish_reason for c in ar]
        if temperature == 0:
            expected = [greedy_text(p, table, 30, ends, least) for p in prompts]
            assert [c.tokens for c in ar] == expected
        rejection = generator.complete(prompts, **options)
        for completion in (*ar, *rejection):
            assert not set(completion.tokens[:least]) & set(ends)
            assert not set(completion.tokens[:-1]) & set(ends)
            assert least <= len(completion.tokens) <= 30
            ended = completion.tokens[-1] in ends
            assert completion.finish_reason == ("stop" if ended else "length")
        assert any(c.finish_reason == "stop" for c in ar) == (least < 30)


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_every_budget_is_met_exactly(model, mode) -> None:
    (prompt,) = prompts_of(1, seed=11)
    for budget in range(1, 2 * K + 2):
        (completion,) = model.complete([prompt], strategy=mode, max_new_tokens=budget)
        assert completion.tokens == greedy_text(prompt, table_of("plain"), budget)
        assert completion.finish_reason == "length"
        ids, end = completion.tokens, completion.tokens[-1]
        (ended,) = model.complete(
            [prompt], strategy=mode, max_new_tokens=budget, stop_token_ids=(end,)
        )
        assert ended.tokens == ids[: ids.index(end) + 1]
        assert ended.finish_reason == "stop"


def test_answer_may_fill_all_positions_of_the_model(model) -> None:
    prompt = prompts_of(1, seed=12, longest=1)[0] * (LIMIT - 20)
    for mode in ("ar", "orthrus"):
        (completion,) = model.complete([prompt], strategy=mode, max_new_tokens=20)
        assert completion.tokens == greedy_text(prompt, table_of("plain"), 20)


@pytest.mark.parametrize("way", CYCLES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_statistics_of_a_stopped_answer_count_only_the_cycles_it_needed(
    model, way, temperature
) -> None:
    """They equal those of the answer whose budget ends at the same token."""
    (prompt,) = prompts_of(1, seed=21)
    options = {"strategy": CYCLES[way], "temperature": temperature}
    (full,) = model.complete([prompt], **options, max_new_tokens=60)
    text, lengths = decode_text(tokenizer(), full.tokens), set()
    for end in range(2, 24):
        stop = (text[end - 2 : end],)
        (stopped,) = model.complete([prompt], **options, max_new_tokens=60, stop=stop)
        size = len(stopped.tokens)
        (short,) = model.complete([prompt], **options, max_new_tokens=size)
        assert stopped.tokens == short.tokens == full.tokens[:size]
        assert (stopped.cycles, stopped.accepted) == (short.cycles, short.accepted)
        assert stopped.forwards == short.forwards
        if way == "ar":
            assert stopped.tokens_per_forward == 1.0
        lengths.add(size)
    assert 3 in lengths
    assert len(lengths) > 5


def test_stop_string_in_the_first_token_costs_one_forward(model) -> None:
    (prompt,) = prompts_of(1, seed=21)
    (token,) = greedy_text(prompt, table_of("plain"), 1)
    stop = (decode_text(tokenizer(), [token]),)
    (completion,) = model.complete([prompt], max_new_tokens=60, stop=stop)
    assert (completion.cycles, completion.accepted, completion.forwards) == (0, [], 1)
