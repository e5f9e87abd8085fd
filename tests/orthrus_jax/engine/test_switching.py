"""Queues that switch strategies at any pause: the text, the counts and the cache are those of one.

On HashModel, whose text shows every stale or misplaced cache slot. Trees and the real model:
test_differential.py.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Capacity, Request, SamplingParams, Session, turns
from tests.support.engine import (
    KINDS,
    answers_alone,
    hashing,
    plain_text_of,
    plan_among,
    prompts_of,
    requests_of,
    restless,
    served,
    stop_strings_of,
    table_of,
)
from tests.support.fake_models.hashed import HashModel, greedy_text

METHODS = [
    Strategy("ar"),
    Strategy("orthrus"),
    Strategy("orthrus", 3),
    Strategy("orthrus-2f", 4),
    Strategy("orthrus-1f", early_blocks=2),
    Strategy("orthrus-1f", 4, early_blocks=1, fresh_blocks=2),
]


def among(kind: str, **fields):
    methods = [dataclasses.replace(s, accept=KINDS[kind]) for s in METHODS]
    return plan_among(methods, **fields)


@pytest.fixture(scope="module")
def engine():
    return hashing.__wrapped__().engine


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["greedy", "coupled"])
@pytest.mark.parametrize("refill", [True, False])
def test_text_is_that_of_ar_whatever_runs(engine, kind, batch, refill) -> None:
    requests, alone = requests_of(23, kind), answers_alone(kind, "ar")
    choosers = restless(engine, seed=batch)
    answers, _ = served(engine, requests, among(kind, batch_size=batch, refill=refill))
    for i, answer in answers.items():
        assert answer.tokens == alone[i].tokens
        assert answer.text == alone[i].text
        assert sum(cycles for _, cycles in answer.strategies) == answer.cycles
        leading = [s.leading_tokens for s, cycles in answer.strategies for _ in range(cycles)]
        emitted = sum(n + 1 + more for n, more in zip(answer.accepted, leading, strict=True))
        assert len(answer.tokens) <= 1 + emitted <= len(answer.tokens) + 1, "an end cuts one"
        forwards = sum(s.forwards * cycles for s, cycles in answer.strategies)
        assert answer.forwards == 1 + forwards
    (chooser,) = choosers
    assert len({strategy for strategy, *_ in chooser.turns}) == len(METHODS)


def test_switching_compiles_each_program_once(engine) -> None:
    restless(engine, seed=5)
    plan, requests = among("greedy", batch_size=4), requests_of(23, "greedy")
    served(engine, requests, plan)
    programs = len(engine.programs.compiled)
    for seed in range(3):
        restless(engine, seed=seed)
        served(engine, requests, plan)
    assert len(engine.programs.compiled) == programs


def test_turns_report_what_each_sequence_emitted(engine) -> None:
    choosers = restless(engine, seed=7)
    (prompt,) = prompts_of(1, seed=40)
    request = Request(prompt, SamplingParams(max_new_tokens=60))
    answers, _ = served(engine, [request], among("greedy"))
    (chooser,) = choosers
    runs = [(s, len(list(turns))) for s, turns in itertools.groupby(t[0] for t in chooser.turns)]
    assert [s for s, _ in answers[0].strategies] == [s for s, _ in runs]
    assert sum(cycles for *_, cycles, _ in chooser.turns) == answers[0].cycles
    before = None
    for strategy, tokens, cycles, _ in chooser.turns:
        undrafted = strategy.method == "orthrus-1f" and strategy != before
        if before is not None:
            assert len(tokens) == cycles - undrafted
        assert strategy.method != "ar" or set(tokens) <= {1}
        before = strategy


@pytest.mark.parametrize("stops", stop_strings_of(prompts_of(1, seed=3)[0])[::9])
def test_stop_strings_cut_counts_of_mixed_strategies(engine, stops) -> None:
    (prompt,) = prompts_of(1, seed=3)
    request = Request(prompt, SamplingParams(max_new_tokens=40, stop=stops))
    (alone,) = served(hashing().engine, [request], plan_among(METHODS[:1]))[0].values()
    restless(engine, seed=2)
    (answer,) = served(engine, [request], among("greedy"))[0].values()
    assert (answer.tokens, answer.text) == (alone.tokens, alone.text)
    assert answer.finish_reason == alone.finish_reason
    assert sum(cycles for _, cycles in answer.strategies) == len(answer.accepted)


def test_streamed_tokens_say_where_they_come_from(engine) -> None:
    restless(engine, seed=4)
    ids, text = plain_text_of(prompts_of(1, seed=6)[0])
    request = Request(prompts_of(1, seed=6)[0], SamplingParams(max_new_tokens=40))
    events = list(engine.serve([request], among("greedy", stream=True)))
    assert [token for event in events for token in event.tokens] == ids
    assert "".join(event.text for event in events) == text
    forwards = [event.forwards for event in events]
    assert forwards == sorted(forwards)
    assert forwards[-1] == events[-1].completion.forwards
    drafted = [flag for event in events for flag in event.drafted]
    assert sum(drafted) == sum(events[-1].completion.accepted)


def test_session_goes_on_after_any_strategy(engine) -> None:
    """Each turn reads only what the cache lacks, and says what a fresh dialogue would."""
    session, ids = Session(256), prompts_of(1, seed=8)[0]
    for seed in range(6):
        restless(engine, seed=seed)
        request = Request(ids, SamplingParams(max_new_tokens=20))
        (event,) = engine.serve([request], among("greedy"), session)
        assert event.completion.tokens == greedy_text(ids, table_of("plain"), 20)
        assert (event.completion.cached_tokens > 0) == (seed > 0)
        ids = [*ids, *event.completion.tokens, 5, 6]


def test_resident_queue_compiles_nothing_after_warming_up(engine) -> None:
    restless(engine, seed=9)
    engine.programs.compiled.clear()
    plan = among("coupled", batch_size=3, stream=True)
    queue = engine.open_resident(plan, Capacity.announced(200, engine.lookahead(plan)))
    queue.warm_up()
    programs = set(engine.programs.compiled)
    left, answers = dict(enumerate(requests_of(23, "coupled"))), {}
    rng = np.random.default_rng(0)
    tickets = {}
    while left or queue.busy:
        for _ in range(rng.integers(0, 3)):
            if left:
                i, request = left.popitem()
                tickets[queue.submit(request)] = i
        for event in queue.step():
            if event.completion is not None:
                answers[tickets[event.index]] = event.completion.tokens
    assert set(engine.programs.compiled) == programs
    alone = answers_alone("coupled", "ar")
    assert answers == {i: alone[i].tokens for i in range(23)}


# The real chooser, on a clock that the loops turn


COSTS = {"ar": 1.0, "orthrus": 2.5, "orthrus-1f": 4.0}  # milliseconds per cycle


def clocked(wrong: int, monkeypatch):
    """An engine whose drafts are wrong in so many of four rows, and whose loops turn the clock."""
    engine = hashing.__wrapped__().engine
    engine.model = HashModel(engine.config, wrong=wrong)
    decode, now = engine.decode, [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def timed(state, plan, *args, **options):
        before = np.array(state.cycles)
        state = decode(state, plan, *args, **options)
        cycles = (np.array(state.cycles) - before).max()
        now[0] += cycles * COSTS[plan.strategy.method] / 1e3
        return state

    monkeypatch.setattr(engine, "decode", timed)
    return engine


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("first", ["ar", "orthrus"])
@pytest.mark.parametrize(("wrong", "best"), [(0, "orthrus"), (4, "ar")])
def test_switch_goes_to_what_earns_more(wrong, best, first, batch, monkeypatch) -> None:
    engine = clocked(wrong, monkeypatch)
    methods = [Strategy("orthrus"), Strategy("ar"), Strategy("orthrus-1f", early_blocks=1)]
    plan = plan_among(sorted(methods, key=lambda s: s.method != first), batch_size=batch)
    prompts = prompts_of(24 * batch, seed=50)
    requests = [Request(prompt, SamplingParams(max_new_tokens=60)) for prompt in prompts]
    answers, _ = served(engine, requests, plan)
    for i, prompt in enumerate(prompts):
        assert answers[i].tokens == greedy_text(prompt, table_of("plain"), 60)
    chooser = engine.chooser(plan, engine.capacity(requests, plan))
    assert chooser.contenders[chooser.incumbent].strategy.method == best
    assert answers[len(prompts) - 1].strategies[-1][0].method == best
    assert chooser.switches <= 3


def test_queues_of_one_shape_share_what_they_learned(monkeypatch) -> None:
    engine = clocked(4, monkeypatch)
    plan = plan_among([Strategy("orthrus"), Strategy("ar")])
    requests = [Request(p, SamplingParams(max_new_tokens=60)) for p in prompts_of(12, seed=51)]
    first, _ = served(engine, requests, plan)
    again, _ = served(engine, requests, plan)
    assert first[0].strategies[0][0].method == "orthrus"
    assert again[0].strategies[0][0].method == "ar"


def test_plan_of_one_contender_has_nothing_to_choose() -> None:
    engine = hashing().engine
    plan = plan_among([Strategy("ar")])
    assert engine.chooser(plan, Capacity(slots=64, max_new_tokens=64)) is None


def test_several_hosts_keep_to_the_first_contender(monkeypatch) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    plan = plan_among([Strategy("orthrus"), Strategy("ar")])
    assert hashing().engine.chooser(plan, Capacity(slots=64, max_new_tokens=64)) is None
