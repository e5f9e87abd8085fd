"""The queue of a server: prefixes are reused, options mixed, rows fail alone; texts are alone's.

All on HashModel, whose text shows every stale or misplaced cache slot.
"""

import dataclasses

import numpy as np
import pytest

from orthrus_jax.engine import Capacity, Engine, Plan, Request, SamplingParams
from orthrus_jax.engine import queue as queue_module
from orthrus_jax.engine.resident import ResidentQueue
from orthrus_jax.errors import UserError
from tests.support.engine import KINDS, hashing, plan_of, prompts_of, table_of
from tests.support.fake_models.hashed import K, greedy_text

CONTEXT = 250
ANNOUNCED = Capacity.announced(CONTEXT, K - 1)
NARROW = dataclasses.replace(ANNOUNCED, widths=(64,))


def opened(engine: Engine | None = None, mode="orthrus", kind="greedy", batch=3, **fields):
    plan = plan_of(mode, kind, batch_size=batch, stream=True)
    capacity = dataclasses.replace(ANNOUNCED, **fields)
    return (engine or hashing().engine).open_resident(plan, capacity)


def greedy(prompt, new: int = 20, **fields) -> Request:
    return Request(prompt, SamplingParams(max_new_tokens=new, **fields))


def finish(queue: ResidentQueue) -> dict:
    """Step until the queue is idle; the completions by ticket."""
    completions = {}
    while queue.busy:
        completions |= {e.index: e.completion for e in queue.step() if e.completion is not None}
    return completions


def answer(queue: ResidentQueue, request: Request):
    ticket = queue.submit(request)
    return finish(queue)[ticket]


def alone(request: Request, mode="orthrus", kind="greedy"):
    (event,) = hashing().engine.serve([request], plan_of(mode, kind))
    return event.completion


def related_requests(count: int, kind: str, seed: int = 0) -> list[Request]:
    """Prompts that begin like others, whole dialogues continued, and unrelated ones."""
    rng, prompts = np.random.default_rng(seed), prompts_of(4, seed=seed, longest=60)
    requests = []
    for i in range(count):
        base = prompts[rng.integers(0, len(prompts))]
        cut = rng.integers(0, len(base) + 1)
        prompt = [*base[:cut], *rng.integers(3, 300, rng.integers(1, 30)).tolist()][:150]
        prompts.append(prompt)
        heat = 0.0 if kind == "greedy" else (0.9, 0.0, 1.3)[i % 3]
        sampling = SamplingParams(
            temperature=heat,
            seed=i % 4,
            max_new_tokens=int(rng.integers(1, 40)),
            logprobs=i % 5 == 0,
        )
        requests.append(Request(prompt, sampling))
    return requests


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("kind", KINDS)
def test_related_prompts_at_any_time_are_answered_as_alone(kind, mode) -> None:
    requests = related_requests(40, kind)
    queue = opened(mode=mode, kind=kind)
    rng, left, completions = np.random.default_rng(3), list(requests), {}
    while left or queue.busy:
        for _ in range(rng.integers(0, 3) if queue.busy else 1):
            if left:
                queue.submit(left.pop(0))
        completions |= {e.index: e.completion for e in queue.step() if e.completion is not None}
    assert any(c.cached_tokens for c in completions.values())
    for i, request in enumerate(requests):
        expected = alone(request, mode, kind)
        assert completions[i].tokens == expected.tokens
        assert completions[i].accepted == expected.accepted
        assert (completions[i].logprobs is None) == (expected.logprobs is None)


def test_dialogue_reads_only_what_follows_and_gives_a_cold_caches_text() -> None:
    queue, rng, history = opened(), np.random.default_rng(5), []
    for turn in range(4):
        prompt = [*history, *rng.integers(3, 300, 30).tolist()]
        completion = answer(queue, greedy(prompt))
        assert completion.tokens == greedy_text(prompt, table_of("plain"), 20)
        assert completion.cached_tokens == (len(history) - 1 if turn else 0)
        history = [*prompt, *completion.tokens]


def test_rows_used_least_recently_are_given_up_first() -> None:
    """Dialogues in turns, whose first four ids, like a template's, are the same."""
    queue = opened(batch=3)
    texts = np.random.default_rng(30).integers(9, 300, (4, 30)).tolist()
    histories = [[5, 6, 7, 8, *text] for text in texts]

    def goes_on(i: int) -> bool:
        """Whether dialogue i was still in a row; the next text is a cold cache's."""
        prompt = [*histories[i], 9]
        completion = answer(queue, greedy(prompt, 5))
        assert completion.tokens == greedy_text(prompt, table_of("plain"), 5)
        there = completion.cached_tokens == len(histories[i]) - 1
        assert there or completion.cached_tokens <= 4
        histories[i] = [*prompt, *completion.tokens]
        return there

    assert not any(goes_on(i) for i in (0, 1, 2))
    assert not goes_on(3)  # takes the row of 0
    assert goes_on(1)
    assert not goes_on(0)  # takes the row of 2
    assert all(goes_on(i) for i in (3, 1))
    assert not goes_on(2)  # takes the row of 0
    assert all(goes_on(i) for i in (1, 2, 3))


def test_row_is_used_until_its_answer_ends() -> None:
    queue, (long, short, other) = opened(batch=2), prompts_of(3, seed=31)
    for prompt, budget in ((long, 60), (short, 2)):
        queue.submit(greedy(prompt, budget))
    finish(queue)
    answer(queue, greedy(other, 2))  # takes the row of `short`
    goes_on = [*long, *greedy_text(long, table_of("plain"), 60), 9]
    assert answer(queue, greedy(goes_on, 2)).cached_tokens == len(goes_on) - 2


def test_samples_of_one_prompt_read_it_once() -> None:
    queue, (prompt,) = opened(), prompts_of(1, seed=7, longest=60)
    requests = [
        Request(prompt, SamplingParams(temperature=0.9, max_new_tokens=20, n=3), sample)
        for sample in range(3)
    ]
    for request in requests:
        queue.submit(request)
    completions = finish(queue)
    assert [completions[i].cached_tokens for i in range(3)] == [0, *[len(prompt) - 1] * 2]
    assert [completions[i].tokens for i in range(3)] == [alone(r).tokens for r in requests]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 200, 229, 230])
@pytest.mark.parametrize("kept", [0, 1, 40, 199])
def test_long_prompts_are_read_in_parts_wherever_the_cache_ends(length, kept) -> None:
    """A write that ran over the end would be moved back over live slots."""
    prompt = np.random.default_rng(length).integers(3, 300, length).tolist()
    queue = opened(batch=2, widths=(64,))
    if 0 < kept < length:
        answer(queue, greedy(prompt[:kept], 1))
    completion = answer(queue, greedy(prompt))
    assert completion.tokens == greedy_text(prompt, table_of("plain"), 20)
    assert (completion.cached_tokens > 0) == (0 < kept < length)


def test_cancelled_rows_keep_what_they_read() -> None:
    queue, (prompt,) = opened(), prompts_of(1, seed=9)
    queue.cancel(queue.submit(greedy(prompt, 60)))
    assert answer(queue, greedy(prompt, 60)).cached_tokens == 0, "it had not begun"
    other = prompts_of(2, seed=10)[1]
    ticket = queue.submit(greedy(other, 60))
    queue.step()
    queue.cancel(ticket)
    longer = [*other, *greedy_text(other, table_of("plain"), 4), 100, 101]
    completion = answer(queue, greedy(longer))
    assert completion.cached_tokens == len(other) + 4
    assert completion.tokens == greedy_text(longer, table_of("plain"), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_queue_compiles_nothing_more(kind) -> None:
    engine = hashing.__wrapped__().engine
    queue = opened(engine, kind=kind, grammar=True)
    queue.warm_up()
    programs = set(engine.programs.compiled)
    requests = related_requests(30, kind, seed=4)
    requests += [greedy([5] * length, 3) for length in (1, 64, 65, 128, 129, 200, 240)]
    requests += [dataclasses.replace(r, grammar=Ladder) for r in requests[:4] if len(r.prompt) > 1]
    requests.append(greedy([5, 6, 7], 40, stop=("q",), top_p=0.5, temperature=0.7))
    for i, request in enumerate(requests):
        queue.cancel(queue.submit(request) if i % 7 == 0 else -1)
        queue.submit(request)
        queue.step()
    finish(queue)
    assert set(engine.programs.compiled) == programs


def test_events_tell_where_each_token_comes_from() -> None:
    queue, requests = opened(), related_requests(12, "greedy", seed=6)
    requests.append(greedy(requests[0].prompt, 60, stop=("e",), logprobs=True))
    for request in requests:
        queue.submit(request)
    news, completions = {}, {}
    while queue.busy:
        for event in queue.step():
            news.setdefault(event.index, []).append(event)
            if event.completion is not None:
                completions[event.index] = event.completion
    gather = lambda i, name: [x for event in news[i] for x in getattr(event, name)]
    for i, completion in completions.items():
        tokens, drafted, cycles = (gather(i, name) for name in ("tokens", "drafted", "cycles"))
        assert tokens == completion.tokens
        assert gather(i, "text") == list(completion.text)
        assert len(drafted) == len(cycles) == len(tokens)
        assert cycles[0] == 0
        assert cycles == sorted(cycles)
        accepted = [
            sum(d for d, c in zip(drafted, cycles, strict=True) if c == cycle + 1)
            for cycle in range(completion.cycles)
        ]
        assert accepted == completion.accepted
        assert gather(i, "logprobs") == (completion.logprobs or [])


# Failures


def test_row_without_finite_logits_ends_alone() -> None:
    queue, prompts = opened(), prompts_of(4, seed=21)
    bad = queue.submit(greedy(prompts[0], temperature=1.2e-38))
    good = [queue.submit(greedy(prompt, 40)) for prompt in prompts[1:]]
    events = []
    while queue.busy:
        events += queue.step()
    (failed,) = [e for e in events if e.error is not None]
    assert failed.index == bad
    assert "not finite" in failed.error
    completions = {e.index: e.completion for e in events if e.completion is not None}
    assert {i: c.tokens for i, c in completions.items()} == {
        i: greedy_text(prompts[i], table_of("plain"), 40) for i in good
    }
    assert answer(queue, greedy(prompts[0])).tokens == greedy_text(
        prompts[0], table_of("plain"), 20
    )


def test_failed_step_drops_the_running_and_keeps_the_waiting(monkeypatch) -> None:
    queue, prompts = opened(), prompts_of(5, seed=22)
    for prompt in prompts:
        queue.submit(greedy(prompt, 40))
    queue.step()

    def fail(state):
        raise RuntimeError("a device failed")

    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "_fetch", fail)
        with pytest.raises(RuntimeError, match="a device failed"):
            queue.step()
    assert queue.waiting == (3, 4)
    completions = finish(queue)
    assert set(completions) == {3, 4}
    for i, completion in completions.items():
        assert completion.cached_tokens == 0
        assert completion.tokens == greedy_text(prompts[i], table_of("plain"), 40)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (greedy([5] * 233, 20), "needs 257 cache slots"),
        (greedy([5, 6], 251), "max_new_tokens=251 is over this queue's 250"),
        (greedy([5, 6], min_new_tokens=3), "min_tokens=True"),
        (Request([5, 6], SamplingParams(), grammar=lambda: None), "grammar=True"),
    ],
)
def test_requests_over_the_announced_capacity_are_refused(request_, message) -> None:
    with pytest.raises(UserError, match=message):
        opened().submit(request_)


# Grammars


class Ladder:
    """Every token has the next residue modulo 3; it is complete after 17 of them."""

    def __init__(self) -> None:
        self.count = 0

    def fill(self, drafts, allowed) -> None:
        for j in range(len(allowed)):
            allowed[j] = words(self.count + j)
            if j < len(drafts) and drafts[j] % 3 != (self.count + j) % 3:
                return

    def consume(self, tokens) -> int | None:
        for taken, token in enumerate(tokens, 1):
            assert token % 3 == self.count % 3
            self.count += 1
            if self.count == 17:
                return taken
        return None


def words(count: int) -> np.ndarray:
    return np.packbits(np.arange(320) % 3 == count % 3, bitorder="little").view("<u4")


def laddered_text(prompt, budget: int) -> list[int]:
    """What greedy decoding under Ladder's masks must give, in plain Python."""
    table, ids = table_of("plain"), list(prompt)
    for count in range(min(budget, 17)):
        mask = np.arange(320) % 3 == count % 3
        ids.append(masked_choice(ids, np.where(mask, table, -np.inf)))
    return ids[len(prompt) :]


def masked_choice(ids, table) -> int:
    return greedy_text(ids, table, 1)[0]


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_grammar_gives_the_text_of_greedy_decoding_under_its_masks(mode) -> None:
    queue, prompts = opened(mode=mode, grammar=True), prompts_of(8, seed=25)
    held = [
        Request([1, *p], SamplingParams(max_new_tokens=n), grammar=Ladder)
        for p, n in zip(prompts, [17, 20, 40, 5, 1, 2, 60, 17], strict=True)
    ]
    for i, request in enumerate(held):
        queue.submit(request)
        queue.submit(greedy(prompts[i], 30))
        queue.step()
    completions = finish(queue) | {}
    assert len(completions) <= 16
    for i, request in enumerate(held):
        again = answer(queue, request)  # from a warm cache
        budget = request.sampling.max_new_tokens
        assert again.tokens == laddered_text(request.prompt, budget)
        assert again.finish_reason == ("stop" if budget >= 17 else "length")
        # The last cycle's own token may come after the grammar's end.
        assert sum(again.accepted) + again.cycles - len(again.tokens) in (0, 1)
        assert answer(queue, greedy(prompts[i], 30)).tokens == greedy_text(
            prompts[i], table_of("plain"), 30
        )
    for ticket, completion in completions.items():
        request = held[ticket // 2]
        expected = (
            greedy_text(prompts[ticket // 2], table_of("plain"), 30)
            if ticket % 2
            else laddered_text(request.prompt, request.sampling.max_new_tokens)
        )
        assert completion.tokens == expected


def test_sampled_text_under_a_grammar_is_that_of_ar_if_coupled() -> None:
    prompts, texts = prompts_of(6, seed=26), {}
    for mode in ("ar", "orthrus"):
        queue = opened(mode=mode, kind="coupled", grammar=True)
        sampling = SamplingParams(temperature=0.9, seed=3, max_new_tokens=30)
        for prompt in prompts:
            queue.submit(Request([1, *prompt], sampling, grammar=Ladder))
        texts[mode] = {i: c.tokens for i, c in finish(queue).items()}
    assert texts["ar"] == texts["orthrus"]
    assert len({tuple(t) for t in texts["ar"].values()}) == 6


def test_first_token_under_a_full_mask_is_the_sampled_one_without_grammar() -> None:
    """The noise is that of the whole prompt, though its last token is read by the first cycle."""

    class Free:
        def fill(self, drafts, allowed) -> None: ...

        def consume(self, tokens) -> None: ...

    queue = opened(kind="coupled", grammar=True)
    for prompt in prompts_of(4, seed=27):
        sampling = SamplingParams(temperature=0.9, seed=3, max_new_tokens=30)
        request = Request([1, *prompt], sampling)
        held = answer(queue, dataclasses.replace(request, grammar=Free))
        assert held.tokens == alone(request, kind="coupled").tokens


def test_grammar_that_cannot_be_followed_ends_its_row_alone() -> None:
    class Broken(Ladder):
        def consume(self, tokens) -> None:
            raise UserError("the grammar is too complex")

    queue, prompts = opened(grammar=True), prompts_of(2, seed=28)
    queue.submit(Request([1, 2, 3], SamplingParams(max_new_tokens=30), grammar=Broken))
    queue.submit(greedy(prompts[1], 30))
    events = []
    while queue.busy:
        events += queue.step()
    assert [(e.index, e.error) for e in events if e.error] == [(0, "the grammar is too complex")]
    (completion,) = [e.completion for e in events if e.completion]
    assert completion.tokens == greedy_text(prompts[1], table_of("plain"), 30)


def test_cycles_with_an_ahead_drafter_follow_no_grammar() -> None:
    with pytest.raises(UserError, match="method='orthrus-1f' follows no grammar"):
        opened(mode="orthrus-1f", grammar=True)


def test_batch_size_is_checked() -> None:
    with pytest.raises(UserError, match="batch_size=0"):
        hashing().engine.open_resident(Plan(batch_size=0, stream=True), ANNOUNCED)
