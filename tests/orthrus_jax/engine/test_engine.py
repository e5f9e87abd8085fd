"""The serving loop: every request as if alone, each stop rule, streaming, samples, conversations.

Most of it runs on a model whose next token is a hash of all tokens before it: exact in any batch,
quick to compile, and every stale or misplaced cache slot shows in the text. What touches the real
cache is tried on the real model too.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import generate
from orthrus_jax.decoding.prefill import prefill
from orthrus_jax.decoding.sampling import Proposal, Rule
from orthrus_jax.engine import STREAM_CYCLES, Engine, Plan, Request, SamplingParams, Session, bucket
from orthrus_jax.engine import queue as queue_module
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.llm import LLM
from orthrus_jax.tokenizer import decode as decode_text
from tests.support.fake_models.hashed import (
    CONFIG,
    LIMIT,
    RESULTS,
    VOCAB,
    HashModel,
    K,
    forwards,
    greedy_text,
)
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

REAL = dataclasses.replace(  # with tied embeddings it would repeat itself
    CONFIG, num_hidden_layers=1, tie_word_embeddings=False
)
TEXTS = [
    "How many apples are 12 and 30?",
    "They are 42 apples. The answer is \\boxed{42}.",
    "Ein Käfer, 6 große Bäume: 日本語 für 3 €.",
] * 20


@functools.cache
def tokenizer():
    return small_tokenizer(TEXTS, VOCAB)


@functools.cache
def table_of(kind: str) -> np.ndarray:
    """Logits for texts of ASCII tokens and the special token 0, or of bytes that are seldom so."""
    table = np.random.default_rng(0).normal(0, 2, (RESULTS, VOCAB)).astype(np.float32)
    pieces = [decode_text(tokenizer(), [i]) for i in range(VOCAB)]
    plain = np.array([bool(t) and t.isascii() and t.isprintable() for t in pieces])
    if kind == "plain":
        table[:, ~plain] -= 50
        table[:, 0] += 50
    else:
        high = [i for i, t in enumerate(pieces) if not t.isascii()]
        table[:, high] += 2
    return table


@functools.cache
def hashing(*, counted: bool = False, **changes) -> LLM:
    """A generator over a HashModel, with a tokenizer. One for each use: it keeps its programs."""
    config = dataclasses.replace(CONFIG, **changes)
    found = LLM(config, {"table": jnp.asarray(table_of("plain"))}, tokenizer())
    found.engine.model = HashModel(config, counted)
    return found


@pytest.fixture
def model() -> LLM:
    return hashing()


@pytest.fixture(scope="module")
def real() -> LLM:
    return LLM(REAL, random_params(REAL, 0, gain=2.5), tokenizer())


def prompts_of(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB - 1, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


# Requests in batches


KINDS = {"greedy": Rule.COUPLED, "coupled": Rule.COUPLED, "rejection": Rule.REJECTION}


def requests_of(count: int, kind: str) -> list[Request]:
    """Mixed lengths, budgets, seeds and temperatures; the last request is the first one again."""
    rng = np.random.default_rng(1)
    budgets = [1, 40, 2, *rng.integers(1, 41, count - 3).tolist()]
    budgets[-1] = budgets[0] = 25
    heats = [0.0] * count if kind == "greedy" else [(0.9, 0.0, 1.3)[i % 3] for i in range(count)]
    prompts = prompts_of(count - 1)
    prompts.append(prompts[0])
    seeds = [i % 4 for i in range(count)]
    seeds[-1], heats[-1] = seeds[0], heats[0]
    return [
        Request(prompt, SamplingParams(temperature=heat, seed=seed, max_new_tokens=budget))
        for prompt, heat, seed, budget in zip(prompts, heats, seeds, budgets, strict=True)
    ]


def served(engine: Engine, requests, plan: Plan):
    """The answers by index, and the indices as they were answered."""
    events = [e for e in engine.serve(requests, plan) if e.completion is not None]
    order = [e.index for e in events]
    assert sorted(order) == list(range(len(requests))), "one answer each"
    return {e.index: e.completion for e in events}, order


def finishing_order(cycles: list[int], batch: int, refill: bool) -> list[int]:
    """The order of answers where row i takes cycles[i], told in plain Python."""
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


@functools.cache
def answers_alone(kind: str, mode: str, count: int = 23):
    answers = {}
    engine = hashing().engine
    for i, request in enumerate(requests_of(count, kind)):
        (event,) = engine.serve([request], Plan(mode, KINDS[kind]))
        answers[i] = event.completion
    return answers


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_answered_as_if_it_were_alone(kind, mode, batch, refill) -> None:
    requests, alone = requests_of(23, kind), answers_alone(kind, mode)
    plan = Plan(mode, KINDS[kind], batch_size=batch, refill=refill)
    answers, order = served(hashing().engine, requests, plan)
    for i, request in enumerate(requests):
        assert answers[i].tokens == alone[i].tokens, i
        assert len(answers[i].tokens) == request.sampling.max_new_tokens
        assert (answers[i].cycles, answers[i].accepted) == (alone[i].cycles, alone[i].accepted)
    assert answers[0].tokens == answers[22].tokens, "one prompt, one seed"
    assert order == finishing_order([alone[i].cycles for i in range(23)], batch, refill)


@pytest.mark.parametrize("kind", ["greedy", "coupled"])
def test_orthrus_answers_as_ar_does_and_greedily_by_the_table(kind) -> None:
    answers = [answers_alone(kind, mode) for mode in ("ar", "orthrus")]
    for i, request in enumerate(requests_of(23, kind)):
        assert answers[1][i].tokens == answers[0][i].tokens
        if request.sampling.temperature == 0:
            budget = request.sampling.max_new_tokens
            expected = greedy_text(request.prompt, table_of("plain"), budget)
            assert answers[0][i].tokens == expected
    accepted = [n for a in answers[1].values() for n in a.accepted]
    assert {0, K - 1} <= set(accepted), "drafts are both refused and accepted to the last"


def test_likeliest_drafts_give_a_text_that_depends_on_no_batch_either() -> None:
    requests = requests_of(7, "rejection")
    alone = Plan(proposal=Proposal.ARGMAX)
    expected = [served(hashing().engine, [r], alone)[0][0].tokens for r in requests]
    plan = dataclasses.replace(alone, batch_size=3)
    answers, _ = served(hashing().engine, requests, plan)
    assert [answers[i].tokens for i in range(7)] == expected


def test_the_first_token_is_timed_where_asked_for_and_changes_no_text() -> None:
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


def test_text_and_order_do_not_depend_on_pauses_for_streaming() -> None:
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
def test_the_real_model_answers_each_request_as_if_it_were_alone(real, mode, kind) -> None:
    requests = requests_of(9, kind)
    alone = Plan(mode, KINDS[kind])
    expected = [served(real.engine, [r], alone)[0][0].tokens for r in requests]
    for refill in (True, False):
        plan = Plan(mode, KINDS[kind], batch_size=3, refill=refill)
        answers, _ = served(real.engine, requests, plan)
        assert [answers[i].tokens for i in range(9)] == expected
    assert len({t for text in expected for t in text}) > 40, "a text that says nothing"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_more_prompts_of_a_bucket_compile_nothing(mode) -> None:
    generator = hashing.__wrapped__()
    programs = generator.engine.programs.compiled
    prompts = prompts_of(23, seed=3)
    options = {"mode": mode, "batch_size": 3, "max_new_tokens": 20, "stop": ("qqq",)}
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
def test_a_batch_that_would_be_mostly_padding_is_read_one_by_one(mode, monkeypatch) -> None:
    """The same texts, in the same order; prefill sees each prompt in its own bucket."""
    rng = np.random.default_rng(5)
    lengths = (9, 200, 3, 50, 60, 12, 7, 8)
    requests = [
        Request(rng.integers(3, VOCAB - 1, n).tolist(), SamplingParams(max_new_tokens=5 + n % 7))
        for n in lengths
    ]
    plan = Plan(mode, batch_size=6)
    found = {}
    for padding in 0, 1 << 30:
        monkeypatch.setattr(queue_module, "MAX_PREFILL_PADDING", padding)
        engine, shapes = hashing.__wrapped__().engine, []

        def watched(function, *args, run=engine.programs.run, shapes=shapes, **named):
            if function is prefill:
                shapes.append(args[0].shape)
            return run(function, *args, **named)

        monkeypatch.setattr(engine.programs, "run", watched)
        answers, order = served(engine, requests, plan)
        found[padding] = [answers[i].tokens for i in range(len(lengths))], order, shapes
    apart, together = found.values()
    assert apart[:2] == together[:2]
    assert apart[2] == [(6, 64), (1, 64), (1, 224), *[(1, 64)] * 6]
    assert together[2][0] == (6, 224)


def test_calls_that_name_the_same_slots_share_the_loop() -> None:
    engine = hashing.__wrapped__().engine
    sampling = SamplingParams(max_new_tokens=20)
    loops = lambda: [key for key in engine.programs.compiled if key[0].__name__ == "orthrus_decode"]
    for slots, count in (0, 2), (400, 3):  # a short and a long prompt: each its own; then one
        for length in 5, 200:
            served(engine, [Request([7] * length, sampling)], Plan(slots=slots))
        assert len(loops()) == count


# The end of the loop


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_loop_ends_with_the_last_row_and_fillers_take_no_cycle(mode, count) -> None:
    generator = hashing(counted=True)
    plan = Plan(mode, batch_size=5)
    requests = requests_of(23, "greedy")[1 : count + 1]
    forwards.clear()
    answers, _ = served(generator.engine, requests, plan)
    jax.effects_barrier()
    most = max(answer.cycles for answer in answers.values())
    cycle = ["ar"] if mode == "ar" else ["diffusion", "ar"]
    assert forwards == ["ar", *cycle * most]
    tokens = {i: answer.tokens for i, answer in answers.items()}
    assert tokens == {i: answers_alone("greedy", mode)[i + 1].tokens for i in range(count)}


def test_rows_done_by_their_first_token_are_answered_and_replaced(model) -> None:
    prompts = prompts_of(10, seed=4)
    for refill in (True, False):
        found = model.complete(prompts, max_new_tokens=1, batch_size=4, refill=refill)
        assert [c.tokens for c in found] == [greedy_text(p, table_of("plain"), 1) for p in prompts]
        assert {(c.cycles, c.forwards, c.finish_reason) for c in found} == {(0, 1, "length")}


def test_no_prompt_gives_no_completion(model) -> None:
    assert model.complete([]) == []


# Stop rules


def plain_text_of(prompt, budget: int = 40) -> tuple[list[int], str]:
    ids = greedy_text(prompt, table_of("plain"), budget)
    return ids, decode_text(tokenizer(), ids)


def cut_at(ids: list[int], stops) -> tuple[list[int], str, str]:
    """Ids, text and finish_reason of an answer `ids` with stop strings, by looking at all of it."""
    text = decode_text(tokenizer(), ids)
    starts = [(text.find(s), len(s)) for s in stops if s in text]
    if not starts:
        return ids, text, "length"
    start, size = min(starts)
    needed = next(
        n for n in range(1, len(ids) + 1) if len(decode_text(tokenizer(), ids[:n])) >= start + size
    )
    return ids[:needed], text[:start], "stop"


def stop_strings_of(prompt) -> list[tuple[str, ...]]:
    """Stop strings out of the text: within tokens, over borders of tokens, of cycles; and none."""
    ids, text = plain_text_of(prompt)
    ends = np.cumsum([len(decode_text(tokenizer(), [i])) for i in ids])
    assert text.isascii()
    assert ends[-1] == len(text)
    over = [(text[e - 2 : e + 2],) for e in ends[:24].tolist() if 2 <= e < len(text) - 2]
    long = [(text[e - 1 : e + 12],) for e in ends[1:20:5].tolist()]
    single = [(text[i],) for i in (0, 1, 7, 30)]
    several = [(text[20:23], text[9:14], "\u00e9"), (text[9:14], text[9:11]), ("never in it",)]
    return [*over, *long, *single, *several, (text[-3:],)]


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stop_string_ends_the_text_wherever_it_lies(model, mode, seed) -> None:
    (prompt,) = prompts_of(1, seed)
    ids, _ = plain_text_of(prompt)
    reasons = set()
    for stop in stop_strings_of(prompt):
        (found,) = model.complete([prompt], mode=mode, max_new_tokens=40, stop=stop)
        assert (found.tokens, found.text, found.finish_reason) == cut_at(ids, stop), stop
        reasons.add((found.finish_reason, len(found.tokens) == 40))
    assert ("stop", False) in reasons
    assert ("length", True) in reasons


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_the_stop_string_wins_over_an_end_token_behind_it(model, mode) -> None:
    (prompt,) = prompts_of(1, 5)
    ids, text = plain_text_of(prompt)
    options = {"mode": mode, "max_new_tokens": 40, "stop_token_ids": (ids[10],)}
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
def test_a_row_ended_by_a_stop_string_is_replaced(model, refill, mode, accept, temperature) -> None:
    prompts = prompts_of(13, seed=6)
    options = {"max_new_tokens": 60, "stop": ("Q", "5", "z4"), "temperature": temperature}
    options |= {"mode": mode, "accept": accept}
    alone = [model.complete([p], **options)[0] for p in prompts]
    full = [model.complete([p], **options | {"stop": ()})[0].tokens for p in prompts]
    together = model.complete(prompts, **options, batch_size=4, refill=refill)
    expected = [cut_at(ids, options["stop"]) for ids in full]
    shown = lambda found: [(c.tokens, c.text, c.finish_reason) for c in found]
    assert shown(alone) == expected
    assert shown(together) == expected
    sizes = [len(c.tokens) for c in together]
    assert min(sizes) < 20 < max(sizes), "some end early, some late"


def test_a_batch_whose_rows_stop_runs_on_only_for_the_rows_that_are_left() -> None:
    """Without a refill a stopped row is done at the next pause; its cycles stop there too."""
    generator = hashing(counted=True)
    prompts = prompts_of(3, seed=7)
    texts = [plain_text_of(p, 60)[1] for p in prompts]
    options = {"mode": "ar", "max_new_tokens": 60, "batch_size": 3, "refill": False}
    stop = (texts[0][2:6], texts[1][4:9])
    forwards.clear()
    found = generator.complete(prompts, **options, stop=stop)
    jax.effects_barrier()
    assert [c.finish_reason for c in found] == ["stop", "stop", "length"]
    assert [c.cycles for c in found] == [STREAM_CYCLES, STREAM_CYCLES, 59]
    assert len(forwards) == 60

    forwards.clear()
    generator.complete(prompts[:2] * 2, **options | {"batch_size": 4}, stop=stop)
    jax.effects_barrier()
    assert len(forwards) == 1 + STREAM_CYCLES, "all rows stopped: the loop ends"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("ends", [(0,), (2, 0, 7), (2, 1, 0, 319, 318)])
def test_any_of_several_end_tokens_ends_an_answer_also_id_0(mode, ends) -> None:
    generator = hashing(eos_token_ids=ends)
    prompts = prompts_of(6, seed=8)
    found = generator.complete(prompts, mode=mode, max_new_tokens=90, batch_size=2)
    expected = [greedy_text(p, table_of("plain"), 90, ends) for p in prompts]
    assert [c.tokens for c in found] == expected
    for completion in found:
        ended = completion.tokens[-1] in ends
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.tokens) == 90
        assert completion.text == decode_text(tokenizer(), completion.tokens)
    assert 0 in [c.tokens[-1] for c in found], "id 0 ended none"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_stop_token_ids_hold_for_their_own_request(mode) -> None:
    engine = hashing(eos_token_ids=(0,)).engine
    prompts, requests, expected = prompts_of(8, seed=9), [], []
    for i, prompt in enumerate(prompts):
        ids, _ = plain_text_of(prompt)
        own = tuple(ids[3 : 3 + i % 4])
        requests.append(Request(prompt, SamplingParams(max_new_tokens=40, stop_token_ids=own)))
        expected.append(greedy_text(prompt, table_of("plain"), 40, (0, *own)))
    answers, _ = served(engine, requests, Plan(mode, batch_size=3))
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
    options |= {"temperature": temperature, "accept": "coupled"}
    for least in (1, 2, 7, 30):
        options["min_new_tokens"] = least
        ar, orthrus = (generator.complete(prompts, mode=m, **options) for m in ("ar", "orthrus"))
        assert [c.tokens for c in orthrus] == [c.tokens for c in ar]
        assert [c.finish_reason for c in orthrus] == [c.finish_reason for c in ar]
        if temperature == 0:
            expected = [greedy_text(p, table, 30, ends, least) for p in prompts]
            assert [c.tokens for c in ar] == expected
        rejection = generator.complete(prompts, **options | {"accept": "rejection"})
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
        (found,) = model.complete([prompt], mode=mode, max_new_tokens=budget)
        assert found.tokens == greedy_text(prompt, table_of("plain"), budget)
        assert found.finish_reason == "length"
        ids, end = found.tokens, found.tokens[-1]
        (ended,) = model.complete([prompt], mode=mode, max_new_tokens=budget, stop_token_ids=(end,))
        assert ended.tokens == ids[: ids.index(end) + 1]
        assert ended.finish_reason == "stop"


def test_an_answer_may_fill_the_models_positions_to_the_last(model) -> None:
    prompt = prompts_of(1, seed=12, longest=1)[0] * (LIMIT - 20)
    for mode in ("ar", "orthrus"):
        (found,) = model.complete([prompt], mode=mode, max_new_tokens=20)
        assert found.tokens == greedy_text(prompt, table_of("plain"), 20)


# Streaming


STREAMED = [
    {"mode": "ar"},
    {"mode": "orthrus"},
    {"mode": "orthrus", "draft_length": 2},
    {"mode": "ar", "temperature": 0.9, "seed": 3},
    {"mode": "orthrus", "temperature": 0.9, "seed": 3, "accept": "coupled"},
    {"mode": "orthrus", "temperature": 0.9, "seed": 3, "top_p": 0.9, "min_p": 0.01},
]


def streamed(generator: LLM, prompt: str, **options):
    """The pieces of a stream, and the completion it returned."""
    pieces = []
    stream = generator.stream(prompt, chat=False, **options)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("kind", ["plain", "bytes"])
@pytest.mark.parametrize("options", STREAMED, ids=str)
def test_the_pieces_are_the_text_of_generate(kind, options, monkeypatch) -> None:
    generator = hashing()
    monkeypatch.setattr(generator.engine, "params", {"table": jnp.asarray(table_of(kind))})
    for prompt in ("How many?", "The answer"):
        (whole,) = generator.generate([prompt], chat=False, max_new_tokens=60, **options)
        pieces, last = streamed(generator, prompt, max_new_tokens=60, **options)
        assert "".join(pieces) == whole.text == last.text
        assert last.tokens == whole.tokens
        assert last.finish_reason == whole.finish_reason
        assert all(pieces), "an empty piece"
        if options["mode"] == "ar":
            assert len(pieces) > 4


@pytest.mark.parametrize("options", STREAMED[:2] + STREAMED[-2:], ids=str)
def test_the_host_reads_once_in_a_chunk_of_cycles(options, monkeypatch) -> None:
    generator = hashing()
    reads = []
    fetch = queue_module._fetch
    monkeypatch.setattr(queue_module, "_fetch", lambda s: reads.append(s) or fetch(s))
    gets, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: gets.append(x) or get(x))
    for budget in (1, 2, 9, 10, 60):
        reads.clear()
        gets.clear()
        _, last = streamed(generator, "How many?", max_new_tokens=budget, **options)
        assert len(reads) == max(1, -(-last.cycles // STREAM_CYCLES))
        assert len(gets) == len(reads)
        reads.clear()
        generator.generate(["How many?"], chat=False, max_new_tokens=budget, **options)
        assert len(reads) == 1, "nobody looks at the text in between"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_nothing_at_or_behind_a_stop_string_is_ever_streamed(mode) -> None:
    generator = hashing()
    prompt = tokenizer()("How many?")["input_ids"]
    ids, text = plain_text_of(prompt)
    stops = [*stop_strings_of(prompt), (text[20:24], "never in it")]
    for stop in stops:
        pieces, last = streamed(generator, "How many?", mode=mode, max_new_tokens=40, stop=stop)
        expected = cut_at(ids, stop)
        assert ("".join(pieces), last.text) == (expected[1], expected[1])
        assert (last.tokens, last.finish_reason) == (expected[0], expected[2])
        so_far = ""
        for piece in pieces:
            so_far += piece
            assert not any(s in so_far for s in stop)


def test_a_stream_left_in_the_middle_leaves_the_generator_sound() -> None:
    generator = hashing()
    stream = generator.stream("How many?", chat=False, mode="ar", max_new_tokens=60)
    first = next(stream)
    stream.close()
    (whole,) = generator.generate(["How many?"], chat=False, mode="ar", max_new_tokens=60)
    assert whole.text.startswith(first)
    assert len(first) < len(whole.text)


# Samples


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
@pytest.mark.parametrize("accept", ["coupled", "rejection"])
def test_samples_of_a_prompt_differ_and_come_again(model, mode, accept) -> None:
    prompts = prompts_of(2, seed=13)
    options = {"mode": mode, "accept": accept, "temperature": 1.0, "max_new_tokens": 20, "n": 3}
    found = model.complete(prompts, **options, batch_size=3)
    assert [(c.prompt, c.sample) for c in found] == [(p, s) for p in (0, 1) for s in (0, 1, 2)]
    tokens = [c.tokens for c in found]
    assert len({tuple(t) for t in tokens}) == 6
    assert [c.tokens for c in model.complete(prompts, **options, batch_size=3)] == tokens
    assert [c.tokens for c in model.complete(prompts, **options, batch_size=8)] == tokens
    assert [c.tokens for c in model.complete(prompts[1:], **options, batch_size=3)] == tokens[3:]
    (first,) = model.complete(prompts[:1], **options | {"n": 1})
    assert first.tokens == tokens[0]
    other = model.complete(prompts, **options, seed=1, batch_size=3)
    assert not {tuple(t) for t in tokens} & {tuple(c.tokens) for c in other}


# What cannot be done


REFUSED = {
    "temperature": ({"temperature": -0.5}, "temperature=-0.5 must be 0 or more"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
    "min_p": ({"min_p": 1.0}, "min_p=1.0 must be from 0"),
    "top_k": ({"top_k": -1}, "top_k=-1 must be 0"),
    "seed": ({"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
    "positions": ({"max_new_tokens": 511}, "2 tokens; with max_new_tokens=511 .* 512 positions"),
    "min_new_tokens": (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        "min_new_tokens=9 must be from 0 to max_new_tokens=8",
    ),
    "unknown": ({"temprature": 1.0}, "unknown option temprature: sampling has temperature, "),
    "long block": ({"draft_length": K + 1}, f"draft_length={K + 1} must be from 2 to {K}"),
    "short block": ({"draft_length": 1}, f"draft_length=1 must be from 2 to {K}"),
    "no block": ({"draft_length": 0}, f"draft_length=0 must be from 2 to {K}"),
    "stop ids": ({"stop_token_ids": (3, VOCAB)}, rf"\[{VOCAB}\] .* vocabulary's {VOCAB}"),
    "negative ids": ({"stop_token_ids": (-1,)}, r"stop_token_ids=\(-1,\) must be ids of 0 or more"),
    "stop": ({"stop": "end"}, "stop='end' must be a sequence of strings"),
    "empty stop": ({"stop": ("",)}, r"stop=\(''?,?\) must be a sequence of strings, none empty"),
    "batch_size": ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    "batch_size below": ({"batch_size": -2}, "batch_size=-2 must be at least 1"),
    "n": ({"n": 4, "temperature": 1.0, "batch_size": 3}, "n=4 is over batch_size=3"),
    "equal samples": ({"n": 2, "batch_size": 2}, "n=2 with temperature=0 would give 2 equal"),
    "accept": ({"accept": "all"}, "accept='all' is not one of rejection, coupled"),
    "mode": ({"mode": "fast"}, "mode='fast' is not one of orthrus, ar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_value_and_limit(model, name) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        model.complete([[1, 2]], **options)


def test_stop_strings_and_streams_need_a_tokenizer() -> None:
    bare = LLM(CONFIG, {"table": jnp.asarray(table_of("plain"))})
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        bare.complete([[1, 2]], stop=("x",))
    with pytest.raises(UserError, match="without a tokenizer"):
        next(bare.stream("x"))
    with pytest.raises(UserError, match="without a tokenizer"):
        bare.generate(["x"])


def test_a_refused_request_starts_nothing(model) -> None:
    before = len(model.engine.programs.compiled)
    with pytest.raises(UserError, match="prompt 1 has 500 tokens"):
        model.complete([[1], [2] * 500], max_new_tokens=40)
    assert len(model.engine.programs.compiled) == before


COMMANDS = {
    "--temperature -1": "temperature=-1.0 must be 0 or more",
    "--top-p 0": "top_p=0.0 must be above 0",
    "--min-p 1.5": "min_p=1.5 must be from 0",
    "--max-new-tokens 0": "max_new_tokens=0 must be at least 1",
    "--max-new-tokens 600": "over the model's 512 positions",
    "--min-new-tokens 9 --max-new-tokens 3": "min_new_tokens=9 must be from 0 to max_new_tokens=3",
    "--draft-length 9": f"draft_length=9 must be from 2 to {K}",
    f"--stop-token-id {VOCAB}": f"vocabulary's {VOCAB}",
    "--batch-size 0": "batch_size=0 must be at least 1",
    "--n 3 --temperature 1 --batch-size 2": "n=3 is over batch_size=2",
    "--n 2": "n=2 with temperature=0",
    "--seed -1": "seed=-1 must be from 0",
    "--stop=": "must be a sequence of strings, none empty",
    "--stream --draft-length 1": f"draft_length=1 must be from 2 to {K}",
}


@pytest.fixture
def command(model, monkeypatch):
    """The command on a model that is already loaded."""
    monkeypatch.setattr(generate, "load", lambda source, **options: model)
    prefix = ["--model", "loaded", "--prompt", "How many?", "--no-chat"]
    return lambda *flags: generate.main([*prefix, *flags])


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_command_tells_it_in_one_line_and_ends_with_status_2(command, capsys, flags) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: command(*flags.split()))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert COMMANDS[flags] in line


def test_the_commands_samples_and_stream_are_the_interfaces(model, command, capsys) -> None:
    flags = ["--max-new-tokens", "12", "--temperature", "1", "--seed", "4"]
    command(*flags, "--n", "2", "--json", "--logprobs")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    options = {"chat": False, "max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    found = model.generate(["How many?"], **options, n=2, batch_size=2, logprobs=True)
    assert [line["token_ids"] for line in lines] == [c.tokens for c in found]
    assert [line["sample"] for line in lines] == [0, 1]
    assert [line["logprobs"] for line in lines] == [c.logprobs for c in found]
    assert [len(line["logprobs"]) for line in lines] == [12, 12]
    command(*flags, "--stream")
    assert capsys.readouterr().out.startswith(found[0].text + "\n\n12 tokens | ")


# Conversations


def read_by(engine: Engine, monkeypatch) -> list[tuple[int, int]]:
    """Of every prefill from now on: the rows it is padded to, and the tokens it really reads."""
    found, run = [], engine.programs.run

    def watched(function, *arguments, **named):
        if function is prefill:
            found.append((arguments[0].shape[1], int(arguments[1].sum())))
        return run(function, *arguments, **named)

    monkeypatch.setattr(engine.programs, "run", watched)
    return found


def turn(engine: Engine, prompt, session, *, mode="orthrus", **sampling):
    sampling = SamplingParams(**({"max_new_tokens": 20} | sampling))
    (event,) = engine.serve([Request(prompt, sampling)], Plan(mode), session)
    return event.completion


@pytest.mark.parametrize(
    ("mode", "sampled"), [("ar", False), ("orthrus", False), ("orthrus", True)]
)
def test_turns_say_what_a_fresh_prefill_of_the_whole_would_say(mode, sampled, monkeypatch) -> None:
    engine = hashing().engine
    read = read_by(engine, monkeypatch)
    options = {"mode": mode} | ({"temperature": 0.9, "seed": 2} if sampled else {})
    rng, session, history = np.random.default_rng(14), Session(slots=640), []
    for i in range(4):
        said = rng.integers(3, VOCAB - 1, 50 + i).tolist()
        prompt = history + said
        answer = turn(engine, prompt, session, **options)
        padded, tokens = read.pop()
        if i:  # the last token of an answer is not in the cache yet
            assert tokens == len(said) + 1
            assert padded == 64
        assert session.ids == [*prompt, *answer.tokens[:-1]]
        fresh = turn(engine, prompt, Session(session.slots), **options)
        assert answer.tokens == fresh.tokens
        assert answer.accepted == fresh.accepted
        assert read.pop() == (bucket(len(prompt)), len(prompt))
        history = [*prompt, *answer.tokens]
    assert len(history) > 250


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("in the middle", 30),
        ("at the first token", 0),
        ("in the answer", 63),
        ("shorter", 29),  # its last token is read anew
        ("shorter and other", 10),
        ("equal", 59),
        ("all that is remembered", 78),
        ("longer", 79),
    ],
)
def test_what_the_next_prompt_shares_is_kept_and_no_more(change, kept, monkeypatch) -> None:
    engine = hashing().engine
    (prompt,) = prompts_of(1, seed=15, longest=1)
    prompt = np.random.default_rng(15).integers(3, 99, 60).tolist()
    session = Session(slots=256)
    known = [*prompt, *turn(engine, prompt, session).tokens[:-1]]
    assert session.ids == known
    assert len(known) == 79
    following = {
        "in the middle": [*prompt[:30], 100, *known[31:]],
        "at the first token": [100, *prompt],
        "in the answer": [*known[:63], 315, 100],
        "shorter": prompt[:30],
        "shorter and other": [*prompt[:10], 100, 100],
        "equal": prompt,
        "all that is remembered": known,
        "longer": [*known, *range(100, 140)],
    }[change]
    read = read_by(engine, monkeypatch)
    answer = turn(engine, following, session)
    assert read == [(64, len(following) - kept)]
    assert answer.tokens == greedy_text(following, table_of("plain"), 20)
    assert session.ids == [*following, *answer.tokens[:-1]]
    again = [*session.ids, *answer.tokens[-1:], 100, 101]
    assert turn(engine, again, session).tokens == greedy_text(again, table_of("plain"), 20)


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_a_conversation_goes_on_behind_a_stop_string(mode, monkeypatch) -> None:
    """What stands behind the stop string in the cache is no part of the next prompt."""
    engine = hashing().engine
    (prompt,) = prompts_of(1, seed=16)
    ids, text = plain_text_of(prompt)
    session = Session(slots=256)
    answer = turn(engine, prompt, session, mode=mode, max_new_tokens=40, stop=(text[9:12],))
    assert (answer.tokens, answer.text, answer.finish_reason) == cut_at(ids, (text[9:12],))
    live = len(session.ids) - len(prompt)
    assert session.ids == [*prompt, *ids[:live]]
    following = [*prompt, *answer.tokens, 200, 201]
    kept = len(prompt) + min(live, len(answer.tokens))
    read = read_by(engine, monkeypatch)
    again = turn(engine, following, session, mode=mode)
    assert read == [(64, len(following) - kept)]
    assert again.tokens == greedy_text(following, table_of("plain"), 20)


def test_a_conversation_that_outgrows_its_slots_is_read_anew(monkeypatch) -> None:
    engine = hashing().engine
    read = read_by(engine, monkeypatch)
    session, rng = Session(slots=64), np.random.default_rng(17)
    history: list[int] = []
    for size in (20, 100, 30, 150, 8):
        before = session.slots
        prompt = [*history, *rng.integers(3, 99, size).tolist()]
        answer = turn(engine, prompt, session)
        assert answer.tokens == greedy_text(prompt, table_of("plain"), 20)
        tokens = read.pop()[1]
        grew = session.slots > before
        assert tokens == (len(prompt) if grew else size + 1)
        assert session.slots >= len(prompt) + 20 + K - 1
        history = [*prompt, *answer.tokens]


def test_what_is_left_of_a_prompt_fits_behind_what_is_kept_even_when_padded() -> None:
    """A write that ran over the end would be moved back over live slots."""
    for length in range(1, 3000, 7):
        slots = bucket(bucket(length) + bucket(1) + 2)
        assert all(kept + bucket(length - kept) <= slots for kept in range(0, length, 3))


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_the_real_model_continues_a_conversation_from_its_cache(real, mode, monkeypatch) -> None:
    read = read_by(real.engine, monkeypatch)
    rng, session, history = np.random.default_rng(19), Session(slots=320), []
    for i in range(4):
        prompt = history + rng.integers(3, VOCAB - 1, 40 - i).tolist()
        answer = turn(real.engine, prompt, session, mode=mode)
        resumed = read.pop()
        assert resumed[0] == 64 or i == 3
        assert answer.tokens == turn(real.engine, prompt, Session(320), mode=mode).tokens
        history = [*prompt, *answer.tokens]
        if i == 2:
            history[50] = 4  # the user edits what was said
    assert resumed[1] == len(prompt) - 50
