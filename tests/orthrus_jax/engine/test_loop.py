"""The serving loop: every request is answered as if it were alone, in any batch.

Most of it runs on HashModel; tests that concern the real cache run on the real model, too.
"""

import dataclasses

import jax
import numpy as np
import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.decoding.prefill import prefill
from orthrus_jax.engine import Plan, Request, SamplingParams
from orthrus_jax.engine import queue as queue_module
from orthrus_jax.tokenizer import decode as decode_text
from tests.support.engine import (
    KINDS,
    answers_alone,
    hashing,
    plan_of,
    prompts_of,
    requests_of,
    served,
    table_of,
    tokenizer,
)
from tests.support.fake_models.hashed import VOCAB, K, forwards, greedy_text


def finishing_order(cycles: list[int], batch: int, refill: bool) -> list[int]:
    """The order of answers where row i takes cycles[i], in plain Python."""
    queue, order = list(range(len(cycles))), []
    left: dict[int, tuple[int, int]] = {}  # row -> (request, cycles left)
    while queue or left:
        if not left:
            left = {row: (i, cycles[i]) for row, i in enumerate(queue[:batch])}
            queue = queue[batch:]
        pause = min if refill and queue else max
        step = pause(n for _, n in left.values())
        left = {row: (i, n - step) for row, (i, n) in left.items()}
        ended = [row for row, (_, n) in left.items() if n <= 0]
        order += [left.pop(row)[0] for row in sorted(ended)]
        if left and refill:
            for row in sorted(ended):
                if queue:
                    i = queue.pop(0)
                    left[row] = (i, cycles[i])
    return order


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_does_not_depend_on_the_batch(kind, mode, batch, refill) -> None:
    requests, alone = requests_of(23, kind), answers_alone(kind, mode)
    plan = plan_of(mode, kind, batch_size=batch, refill=refill)
    answers, order = served(hashing().engine, requests, plan)
    for i, request in enumerate(requests):
        assert answers[i].tokens == alone[i].tokens, i
        assert len(answers[i].tokens) == request.sampling.max_new_tokens
        assert (answers[i].cycles, answers[i].accepted) == (alone[i].cycles, alone[i].accepted)
    assert answers[0].tokens == answers[22].tokens, "one prompt, one seed"
    assert order == finishing_order([alone[i].cycles for i in range(23)], batch, refill)


@pytest.mark.parametrize("kind", ["greedy", "coupled"])
def test_orthrus_equals_ar_and_the_greedy_text(kind) -> None:
    answers = [answers_alone(kind, mode) for mode in ("ar", "orthrus")]
    for i, request in enumerate(requests_of(23, kind)):
        assert answers[1][i].tokens == answers[0][i].tokens
        if request.sampling.temperature == 0:
            budget = request.sampling.max_new_tokens
            expected = greedy_text(request.prompt, table_of("plain"), budget)
            assert answers[0][i].tokens == expected
    accepted = [n for a in answers[1].values() for n in a.accepted]
    assert {0, K - 1} <= set(accepted), "drafts are both refused and accepted to the last"


def test_rejection_text_does_not_depend_on_the_batch() -> None:
    requests = requests_of(7, "rejection")
    alone = plan_of("orthrus", "rejection")
    expected = [served(hashing().engine, [r], alone)[0][0].tokens for r in requests]
    plan = dataclasses.replace(alone, batch_size=3)
    answers, _ = served(hashing().engine, requests, plan)
    assert [answers[i].tokens for i in range(7)] == expected


def test_time_to_first_token_is_reported_on_request_and_changes_no_text() -> None:
    requests, alone = requests_of(23, "greedy"), answers_alone("greedy", "orthrus")
    for timed in (True, False):
        for event in hashing().engine.serve(
            requests, Plan(batch_size=3, time_to_first_token=timed)
        ):
            answer = event.completion
            assert answer.tokens == alone[event.index].tokens
            if timed:
                assert 0 < answer.time_to_first_token <= answer.seconds
            else:
                assert answer.time_to_first_token is None


def test_text_does_not_depend_on_pauses_for_streaming() -> None:
    requests, alone = requests_of(23, "rejection"), answers_alone("rejection", "orthrus")
    plan = Plan(batch_size=3, stream=True)
    pieces = dict.fromkeys(range(23), "")
    for event in hashing().engine.serve(requests, plan):
        pieces[event.index] += event.text
        if event.completion is not None:
            assert event.completion.tokens == alone[event.index].tokens
            assert event.completion.text == pieces[event.index]
            assert event.completion.text == decode_text(tokenizer(), event.completion.tokens)


@pytest.mark.parametrize(("mode", "kind"), [("ar", "greedy"), *(("orthrus", k) for k in KINDS)])
def test_real_model_answers_do_not_depend_on_the_batch(real, mode, kind) -> None:
    requests = requests_of(9, kind)
    alone = plan_of(mode, kind)
    expected = [served(real.engine, [r], alone)[0][0].tokens for r in requests]
    for refill in (True, False):
        plan = plan_of(mode, kind, batch_size=3, refill=refill)
        answers, _ = served(real.engine, requests, plan)
        assert [answers[i].tokens for i in range(9)] == expected
    assert len({t for text in expected for t in text}) > 40, "a text that says nothing"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_new_prompts_of_seen_buckets_compile_nothing(mode) -> None:
    generator = hashing.__wrapped__()
    programs = generator.engine.programs.compiled
    prompts = prompts_of(23, seed=3)
    options = {"strategy": mode, "batch_size": 3, "max_new_tokens": 20, "stop": ("qqq",)}
    generator.complete(prompts[:8], **options)
    generator.complete(prompts[:8], **options | {"stop": ("e",)})  # these end here and there
    seen = set(programs)
    generator.complete(prompts, **options)
    generator.complete(prompts, **options | {"stop_token_ids": (7,)})
    assert set(programs) - seen == set()
    by_name = sorted(key[0].__name__ for key in programs)
    assert len(by_name) <= 5
    assert by_name.count("prefill") == 2, "a batch, and one to insert"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_batch_of_mostly_padding_is_prefilled_one_by_one(mode, monkeypatch) -> None:
    """The same texts, in the same order; prefill sees each prompt in its own bucket."""
    rng = np.random.default_rng(5)
    lengths = (9, 200, 3, 50, 60, 12, 7, 8)
    requests = [
        Request(rng.integers(3, VOCAB - 1, n).tolist(), SamplingParams(max_new_tokens=5 + n % 7))
        for n in lengths
    ]
    plan = plan_of(mode, batch_size=6)
    results = {}
    for padding in 0, 1 << 30:
        monkeypatch.setattr(queue_module, "MAX_PREFILL_PADDING", padding)
        engine, shapes = hashing.__wrapped__().engine, []

        def watched(function, *args, run=engine.programs.run, shapes=shapes, **named):
            if function is prefill:
                shapes.append(args[0].shape)
            return run(function, *args, **named)

        monkeypatch.setattr(engine.programs, "run", watched)
        answers, order = served(engine, requests, plan)
        results[padding] = [answers[i].tokens for i in range(len(lengths))], order, shapes
    apart, together = results.values()
    assert apart[:2] == together[:2]
    assert apart[2] == [(6, 64), (1, 64), (1, 224), *[(1, 64)] * 6]
    assert together[2][0] == (6, 224)


def test_calls_with_equal_slots_share_the_loop() -> None:
    engine = hashing.__wrapped__().engine
    sampling = SamplingParams(max_new_tokens=20)
    loops = lambda: [
        key for key in engine.programs.compiled if key[0].__name__ == "speculative_decode"
    ]
    for slots, count in (0, 2), (400, 3):  # a short and a long prompt: each its own; then one
        for length in 5, 200:
            served(engine, [Request([7] * length, sampling)], Plan(slots=slots))
        assert len(loops()) == count


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_loop_ends_with_its_last_row_and_fillers_take_no_cycle(mode, count) -> None:
    generator = hashing(counted=True)
    plan = plan_of(mode, batch_size=5)
    requests = requests_of(23, "greedy")[1 : count + 1]
    forwards.clear()
    answers, _ = served(generator.engine, requests, plan)
    jax.effects_barrier()
    most = max(answer.cycles for answer in answers.values())
    cycle = ["ar"] if mode == "ar" else ["diffusion", "ar"]
    assert forwards == ["ar", *cycle * most]
    tokens = {i: answer.tokens for i, answer in answers.items()}
    assert tokens == {i: answers_alone("greedy", mode)[i + 1].tokens for i in range(count)}


def test_rows_done_at_their_first_token_are_answered_and_replaced(model) -> None:
    prompts = prompts_of(10, seed=4)
    for refill in (True, False):
        completions = model.complete(prompts, max_new_tokens=1, batch_size=4, refill=refill)
        assert [c.tokens for c in completions] == [
            greedy_text(p, table_of("plain"), 1) for p in prompts
        ]
        assert {(c.cycles, c.forwards, c.finish_reason) for c in completions} == {(0, 1, "length")}


def test_no_prompt_gives_no_completion(model) -> None:
    assert model.complete([]) == []


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("accept", ["coupled", "rejection"])
def test_samples_of_a_prompt_differ_and_are_reproducible(model, mode, accept) -> None:
    prompts = prompts_of(2, seed=13)
    options = {
        "strategy": Strategy(mode, accept=accept),
        "temperature": 1.0,
        "max_new_tokens": 20,
        "n": 3,
    }
    completions = model.complete(prompts, **options, batch_size=3)
    assert [(c.prompt, c.sample) for c in completions] == [
        (p, s) for p in (0, 1) for s in (0, 1, 2)
    ]
    tokens = [c.tokens for c in completions]
    assert len({tuple(t) for t in tokens}) == 6
    assert [c.tokens for c in model.complete(prompts, **options, batch_size=3)] == tokens
    assert [c.tokens for c in model.complete(prompts, **options, batch_size=8)] == tokens
    assert [c.tokens for c in model.complete(prompts[1:], **options, batch_size=3)] == tokens[3:]
    (first,) = model.complete(prompts[:1], **options | {"n": 1})
    assert first.tokens == tokens[0]
    other = model.complete(prompts, **options, seed=1, batch_size=3)
    assert not {tuple(t) for t in tokens} & {tuple(c.tokens) for c in other}
