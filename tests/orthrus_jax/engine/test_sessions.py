"""Sessions: a turn that continues from the cache answers as a fresh prefill of the whole does."""

import numpy as np
import pytest

from orthrus_jax.decoding import ar_decode
from orthrus_jax.decoding.prefill import prefill
from orthrus_jax.engine import (
    STREAM_CYCLES,
    Capacity,
    Engine,
    Plan,
    Request,
    SamplingParams,
    Session,
    bucket,
)
from orthrus_jax.engine import queue as queue_module
from tests.support.engine import cut_at, hashing, plain_text_of, plan_of, prompts_of, table_of
from tests.support.fake_models.hashed import VOCAB, K, greedy_text


def read_by(engine: Engine, monkeypatch) -> list[tuple[int, int]]:
    """Of every prefill from now on: the rows it is padded to, and the tokens it really reads."""
    reads, run = [], engine.programs.run

    def watched(function, *arguments, **named):
        if function is prefill:
            reads.append((arguments[0].shape[1], int(arguments[1].sum())))
        return run(function, *arguments, **named)

    monkeypatch.setattr(engine.programs, "run", watched)
    return reads


def turn(engine: Engine, prompt, session, *, mode="orthrus", **sampling):
    sampling = SamplingParams(**({"max_new_tokens": 20} | sampling))
    (event,) = engine.serve([Request(prompt, sampling)], plan_of(mode), session)
    return event.completion


@pytest.mark.parametrize(
    ("mode", "sampled"), [("ar", False), ("orthrus", False), ("orthrus", True)]
)
def test_turns_equal_a_fresh_prefill_of_the_whole_dialogue(mode, sampled, monkeypatch) -> None:
    engine = hashing().engine
    read = read_by(engine, monkeypatch)
    options = {"mode": mode} | ({"temperature": 0.9, "seed": 2} if sampled else {})
    rng, session, history = np.random.default_rng(14), Session(slots=640), []
    for i in range(4):
        question = rng.integers(3, VOCAB - 1, 50 + i).tolist()
        prompt = history + question
        answer = turn(engine, prompt, session, **options)
        padded, tokens = read.pop()
        if i:  # the last token of an answer is not in the cache yet
            assert tokens == len(question) + 1
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
def test_only_the_shared_prefix_is_kept(change, kept, monkeypatch) -> None:
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
def test_session_continues_after_a_stop_string(mode, monkeypatch) -> None:
    """Slots after the stop string are no part of the next prompt."""
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


def test_session_that_outgrows_its_slots_is_read_anew(monkeypatch) -> None:
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


def test_padded_rest_of_a_prompt_fits_after_the_kept_slots() -> None:
    """A write that ran over the end would be moved back over live slots."""
    for length in range(1, 3000, 7):
        slots = bucket(bucket(length) + bucket(1) + 2)
        assert all(kept + bucket(length - kept) <= slots for kept in range(0, length, 3))


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_real_model_continues_a_session_from_its_cache(real, mode, monkeypatch) -> None:
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
            history[50] = 4  # the user edits the dialogue
    assert resumed[1] == len(prompt) - 50


# Interrupts


def interrupted(function, programs, monkeypatch, *, donated: bool):
    """Have the next call of `function` raise KeyboardInterrupt: after it, or in place of it."""
    run, pending = programs.run, [function]

    def once(called, *arguments, **named):
        if called not in pending:
            return run(called, *arguments, **named)
        pending.clear()
        if donated:
            run(called, *arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "run", once)


def started(engine, prompt, session, new: int = 60):
    """A turn whose first piece is out."""
    plan = plan_of("ar", stream=True)
    events = engine.serve([Request(prompt, SamplingParams(max_new_tokens=new))], plan, session)
    next(events)
    return events


@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize("function", [prefill, ar_decode])
def test_interrupt_within_a_program_leaves_an_empty_session(function, donated, monkeypatch) -> None:
    engine, (prompt,) = hashing().engine, prompts_of(1, seed=41)
    session = Session(slots=256)
    known = [*prompt, *turn(engine, prompt, session, mode="ar").tokens]
    with monkeypatch.context() as patch:
        interrupted(function, engine.programs, patch, donated=donated)
        with pytest.raises(KeyboardInterrupt):
            turn(engine, [*known, 100], session, mode="ar")
    assert (session.cache, session.ids) == (None, [])
    reads = read_by(engine, monkeypatch)
    following = [*known, 100, 101]
    answer = turn(engine, following, session, mode="ar")
    assert reads == [(bucket(len(following)), len(following))]
    assert answer.tokens == greedy_text(following, table_of("plain"), 20)
    assert session.ids == [*following, *answer.tokens[:-1]]


def test_session_is_empty_while_its_cache_is_in_use() -> None:
    engine, (prompt,) = hashing().engine, prompts_of(1, seed=42)
    session = Session(slots=256)
    turn(engine, prompt, session)
    assert session.cache is not None
    events = started(engine, prompt, session)
    assert (session.cache, session.ids) == (None, [])
    events.close()
    assert session.cache is not None
    assert not session.cache.tokens.is_deleted()


def test_abandoned_turn_gives_its_cache_back_with_matching_ids(monkeypatch) -> None:
    engine, (prompt,) = hashing().engine, prompts_of(1, seed=43)
    session = Session(slots=256)
    started(engine, prompt, session).close()
    expected = greedy_text(prompt, table_of("plain"), 60)
    live = len(session.ids) - len(prompt)
    assert live == STREAM_CYCLES
    assert session.ids == [*prompt, *expected[:live]]
    following = [*session.ids, 100, 101]
    reads = read_by(engine, monkeypatch)
    assert turn(engine, following, session).tokens == greedy_text(following, table_of("plain"), 20)
    assert reads == [(64, 2)]


def test_interrupt_while_the_tokens_are_read_keeps_the_cache(monkeypatch) -> None:
    """Nothing is donated then; the ids are those of the reading before."""
    engine, (prompt,) = hashing().engine, prompts_of(1, seed=44)
    session = Session(slots=256)

    def interrupt(state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "_fetch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            turn(engine, prompt, session)
    assert session.ids == prompt
    following = [*prompt, 100, 101]
    reads = read_by(engine, monkeypatch)
    assert turn(engine, following, session).tokens == greedy_text(following, table_of("plain"), 20)
    assert reads == [(64, 2)]


def test_error_leaves_an_empty_session(monkeypatch) -> None:
    """After an error the cache may be wrong, even where it still exists."""
    engine, (prompt,) = hashing().engine, prompts_of(1, seed=45)
    session = Session(slots=256)

    def fail(state):
        raise RuntimeError("a device failed")

    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "_fetch", fail)
        with pytest.raises(RuntimeError, match="a device failed"):
            turn(engine, prompt, session)
    assert (session.cache, session.ids) == (None, [])
    assert turn(engine, prompt, session).tokens == greedy_text(prompt, table_of("plain"), 20)


def test_open_turns_of_one_session_do_not_disturb_each_other() -> None:
    """Also if one needs more slots than the session had when the other began."""
    engine, prompts = hashing().engine, prompts_of(3, seed=46)
    longer = np.random.default_rng(46).integers(3, 99, 300).tolist()
    for second in (prompts[1], longer):
        session = Session(slots=192)
        turn(engine, prompts[2], session)
        open_turns = [started(engine, prompt, session) for prompt in (prompts[0], second)]
        tokens = {}
        while open_turns:
            for i, events in enumerate(list(open_turns)):
                event = next(events, None)
                if event is None:
                    open_turns.remove(events)
                elif event.completion is not None:
                    tokens[len(tokens), i] = event.completion.tokens
        expected = [greedy_text(p, table_of("plain"), 60) for p in (prompts[0], second)]
        assert sorted(tokens.values()) == sorted(expected)
        following = [*second, *greedy_text(second, table_of("plain"), 60), 100]
        answer = turn(engine, following, session)
        assert answer.tokens == greedy_text(following, table_of("plain"), 20)


def test_queue_with_a_session_serves_one_request_after_another(monkeypatch) -> None:
    engine, session = hashing().engine, Session(slots=256)
    reads = read_by(engine, monkeypatch)
    queue = engine.open(Plan(stream=True), Capacity(256, 64), session)
    (prompt,) = prompts_of(1, seed=47)
    queue.submit(Request(prompt, SamplingParams(max_new_tokens=60)))
    queue.step()
    queue.cancel(0)
    known = list(session.ids)
    assert len(known) > len(prompt)
    following = [*known, 100, 101]
    queue.submit(Request(following, SamplingParams(max_new_tokens=20)))
    (answer,) = [e.completion for _ in range(20) for e in queue.step() if e.completion]
    assert answer.tokens == greedy_text(following, table_of("plain"), 20)
    assert reads == [(64, len(prompt)), (64, 2)]
