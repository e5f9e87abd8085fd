"""The open queue: submit while others run, cancel, refuse; each answer is the request's alone.

All on HashModel, whose text shows every stale or misplaced cache slot.
"""

import numpy as np
import pytest

from orthrus_jax.engine import STREAM_CYCLES, Capacity, Plan, Request, SamplingParams, Session
from orthrus_jax.errors import UserError
from tests.support.engine import (
    KINDS,
    answers_alone,
    hashing,
    plain_text_of,
    plan_of,
    prompts_of,
    requests_of,
    table_of,
)
from tests.support.fake_models.hashed import VOCAB, greedy_text

ALL = Capacity(
    slots=320,
    max_new_tokens=64,
    ends=4,
    sampled=True,
    filtered=True,
    min_tokens=True,
    logprobs=True,
)


def greedy(prompt, new: int = 20, **fields) -> Request:
    return Request(prompt, SamplingParams(max_new_tokens=new, **fields))


def finish(queue, completions=None) -> dict:
    """Step until the queue is idle; return the completions by ticket."""
    completions = {} if completions is None else completions
    while queue.busy:
        for event in queue.step():
            if event.completion is not None:
                assert event.index not in completions
                completions[event.index] = event.completion
    return completions


def tokens_of(completions) -> dict:
    return {ticket: completion.tokens for ticket, completion in completions.items()}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_events_equal_those_of_serve(kind, refill, stream) -> None:
    engine, requests = hashing().engine, requests_of(23, kind)
    plan = plan_of("orthrus", kind, batch_size=3, refill=refill, stream=stream)
    shown = lambda e: (e.index, e.text, e.completion and e.completion.tokens)
    expected = [shown(e) for e in engine.serve(requests, plan)]
    queue = engine.open(plan, engine.capacity(requests, plan))
    assert [queue.submit(request) for request in requests] == list(range(23))
    events = []
    while queue.busy:
        events += [shown(e) for e in queue.step()]
    assert events == expected
    assert queue.step() == []


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_requests_submitted_at_any_time_are_answered_as_alone(kind, mode, batch) -> None:
    """During a run, at an idle queue, several at once and none."""
    requests, alone = requests_of(23, kind), answers_alone(kind, mode)
    queue = hashing().engine.open(plan_of(mode, kind, batch_size=batch, stream=True), ALL)
    rng, left, completions = np.random.default_rng(3), list(requests), {}
    while left or queue.busy:
        for _ in range(rng.integers(0, 3) if queue.busy else 1):
            if left:
                queue.submit(left.pop(0))
        for event in queue.step():
            if event.completion is not None:
                completions[event.index] = event.completion
        if len(left) == 10:
            finish(queue, completions)
            assert not queue.busy
    assert tokens_of(completions) == {i: alone[i].tokens for i in range(23)}
    for i, completion in completions.items():
        assert (completion.cycles, completion.accepted) == (alone[i].cycles, alone[i].accepted)


def test_open_queue_mixes_greedy_and_sampled_requests() -> None:
    model, (prompt,) = hashing(), prompts_of(1, seed=31)
    fields = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.9, "seed": 3, "top_p": 0.9, "top_k": 20},
        {"min_new_tokens": 5, "stop_token_ids": (7,)},
        {"logprobs": True},
    ]
    queue = model.engine.open(Plan(batch_size=2), ALL)
    for some in fields:
        queue.submit(greedy(prompt, **some))
    completions = finish(queue)
    for i, some in enumerate(fields):
        (alone,) = model.complete([prompt], mode="orthrus", max_new_tokens=20, **some)
        assert completions[i].tokens == alone.tokens
        assert (completions[i].logprobs is None) == ("logprobs" not in some)
    assert len({tuple(tokens) for tokens in tokens_of(completions).values()}) == 3


def test_new_prompts_of_seen_buckets_compile_nothing_in_an_open_queue() -> None:
    engine = hashing.__wrapped__().engine
    queue = engine.open(Plan(batch_size=3, stream=True), ALL)
    prompts = prompts_of(20, seed=32)
    for prompt in prompts[:6]:
        queue.submit(greedy(prompt, 30, stop=("q",)))
        queue.step()
    queue.cancel(5)  # so that `stop` is compiled, too
    finish(queue)
    programs = set(engine.programs.compiled)
    for i, prompt in enumerate(prompts):
        queue.submit(greedy(prompt, 10 + i, temperature=0.3 * (i % 2), stop_token_ids=(i,)))
        queue.step()
    queue.cancel(19)
    finish(queue)
    assert set(engine.programs.compiled) == programs
    assert len(programs) <= 5


# Cancel


def test_cancelled_waiting_request_is_forgotten() -> None:
    queue = hashing().engine.open(plan_of("ar", batch_size=2, stream=True), ALL)
    prompts = prompts_of(5, seed=33)
    for prompt in prompts:
        queue.submit(greedy(prompt))
    queue.cancel(0)  # nothing has run yet
    queue.step()
    queue.cancel(4)
    expected = {i: greedy_text(prompts[i], table_of("plain"), 20) for i in (1, 2, 3)}
    assert tokens_of(finish(queue)) == expected


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("refill", [True, False])
def test_row_of_a_cancelled_request_serves_the_next_as_alone(mode, refill) -> None:
    queue = hashing().engine.open(plan_of(mode, batch_size=2, refill=refill, stream=True), ALL)
    prompts = prompts_of(4, seed=34)
    for prompt in prompts:
        queue.submit(greedy(prompt, 60))
    events = queue.step()
    assert {e.index for e in events} <= {0, 1}
    queue.cancel(0)
    after, completions = [], {}
    while queue.busy:
        for event in queue.step():
            after.append(event.index)
            if event.completion is not None:
                completions[event.index] = event.completion
    assert 0 not in after
    assert set(completions) == {1, 2, 3}
    if refill:
        assert after.index(2) < after.index(3), "the free row is filled at the next step"
        assert 2 in after[:2]
    for i, completion in completions.items():
        assert completion.tokens == greedy_text(prompts[i], table_of("plain"), 60)


def test_cancelled_rows_take_no_more_cycles() -> None:
    """A row that is cancelled without a successor does not keep the loop running."""
    engine = hashing().engine
    prompts = prompts_of(2, seed=35)
    queue = engine.open(plan_of("ar", batch_size=2, stream=True), ALL)
    queue.submit(greedy(prompts[0], 64))
    queue.submit(greedy(prompts[1], 20))
    queue.step()
    queue.cancel(0)
    steps = 1
    while queue.busy:
        queue.step()
        steps += 1
    assert steps == -(-19 // STREAM_CYCLES)


def test_cancelling_all_leaves_a_queue_that_begins_anew() -> None:
    queue = hashing().engine.open(Plan(batch_size=3, stream=True), ALL)
    prompts = prompts_of(6, seed=36)
    for prompt in prompts[:3]:
        queue.submit(greedy(prompt, 60))
    queue.step()
    for ticket in (0, 1, 2):
        queue.cancel(ticket)
    assert not queue.busy
    assert queue.step() == []
    for prompt in prompts[3:]:
        queue.submit(greedy(prompt))
    expected = {i: greedy_text(prompts[i], table_of("plain"), 20) for i in (3, 4, 5)}
    assert tokens_of(finish(queue)) == expected


def test_unknown_and_finished_tickets_are_ignored() -> None:
    queue = hashing().engine.open(Plan(), ALL)
    queue.cancel(0)
    assert queue.submit(greedy([1, 2])) == 0
    assert set(finish(queue)) == {0}
    for ticket in (0, 0, 1, -1):
        queue.cancel(ticket)
    assert queue.submit(greedy([1, 2])) == 1
    assert set(finish(queue)) == {1}


def test_closed_queue_is_idle() -> None:
    queue = hashing().engine.open(Plan(batch_size=2, stream=True), ALL)
    for prompt in prompts_of(4, seed=37):
        queue.submit(greedy(prompt, 60))
    queue.step()
    queue.close()
    assert not queue.busy
    assert queue.step() == []


# Refusals


SMALL = Capacity(slots=128, max_new_tokens=64, ends=2)
REFUSED = {
    "new tokens": ({"new": 65}, "request 1: max_new_tokens=65 is over this queue's 64"),
    "slots": (
        {"length": 90, "new": 35},
        "request 1 has 90 tokens; with max_new_tokens=35 it needs 129 cache slots, over .* 128",
    ),
    "padding": ({"length": 129, "new": 1}, "needs 160 cache slots, over this queue's 128"),
    "ends": (
        {"stop_token_ids": (1, 2, 3)},
        "3 stop_token_ids and the model's 0 end tokens are over this queue's 2",
    ),
    "sampled": ({"temperature": 0.5}, "temperature=0.5 needs a queue opened with sampled=True"),
    "min tokens": ({"min_new_tokens": 2}, "min_new_tokens=2 needs .* with min_tokens=True"),
    "logprobs": ({"logprobs": True}, "logprobs=True needs a queue opened with logprobs=True"),
    "id": ({"stop_token_ids": (VOCAB,)}, f"vocabulary's {VOCAB}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_over_the_capacity_are_refused_with_value_and_limit(name) -> None:
    fields, message = REFUSED[name]
    fields = {"length": 3, "new": 10} | fields
    queue = hashing().engine.open(Plan(), SMALL)
    assert queue.submit(greedy([5, 6])) == 0
    with pytest.raises(UserError, match=message):
        queue.submit(greedy([5] * fields.pop("length"), **fields))
    assert queue.submit(greedy([5, 6])) == 1, "a refused request takes no ticket"
    assert set(finish(queue)) == {0, 1}


def test_filters_need_a_queue_with_filters() -> None:
    queue = hashing().engine.open(Plan(), Capacity(128, 64, sampled=True))
    with pytest.raises(UserError, match=r"top_k=3, top_p=1\.0, min_p=0\.0 needs .* filtered=True"):
        queue.submit(greedy([5], temperature=1.0, top_k=3))


def test_requests_that_just_fit_are_answered_whole() -> None:
    """60 + 64 tokens and the K - 1 = 4 slots after the last anchor are the 128."""
    prompt = [5] * 60
    queue = hashing().engine.open(Plan(), SMALL)
    queue.submit(greedy(prompt, 64))
    assert finish(queue)[0].tokens == greedy_text(prompt, table_of("plain"), 64)


def test_bad_ids_are_refused_at_submission() -> None:
    queue = hashing().engine.open(Plan(), SMALL)
    with pytest.raises(UserError, match="prompt 0, token 1: -3 is not an id"):
        queue.submit(greedy([5, -3]))


def test_session_needs_a_batch_of_one() -> None:
    with pytest.raises(UserError, match="batch_size=2 must be 1 with a session"):
        hashing().engine.open(Plan(batch_size=2), SMALL, Session(128))


def test_capacity_of_requests_is_the_smallest_bucket_that_fits() -> None:
    requests = [
        greedy([5] * 3, 10, stop_token_ids=(1, 2, 3)),
        greedy([5], 70, temperature=0.5, seed=1),
        greedy([5], 2, top_k=3, logprobs=True),  # greedy: its filter changes nothing
    ]
    assert Capacity.of(requests, 192, eos=2) == Capacity(
        192, 80, ends=8, sampled=True, filtered=False, min_tokens=False, logprobs=True
    )


# Errors


def test_failed_step_drops_running_requests_and_keeps_waiting_ones(monkeypatch) -> None:
    engine = hashing().engine
    queue = engine.open(Plan(batch_size=2, stream=True), ALL)
    prompts = prompts_of(4, seed=38)
    for prompt in prompts:
        queue.submit(greedy(prompt, 40))
    queue.step()
    with monkeypatch.context() as patch:

        def fail(*arguments, **named):
            raise RuntimeError("out of memory")

        patch.setattr(engine.programs, "run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            queue.step()
    expected = {i: greedy_text(prompts[i], table_of("plain"), 40) for i in (2, 3)}
    assert tokens_of(finish(queue)) == expected


def test_text_of_a_stopped_request_in_an_open_queue() -> None:
    (prompt,) = prompts_of(1, seed=39)
    _, text = plain_text_of(prompt)
    queue = hashing().engine.open(Plan(batch_size=2), ALL)
    queue.submit(greedy(prompt, 40, stop=(text[9:12],)))
    assert finish(queue)[0].text == text[: text.index(text[9:12])]
