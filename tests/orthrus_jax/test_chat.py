"""Conversations: turns that continue from the cache equal a fresh prefill."""

import io

import pytest

import orthrus_jax
from orthrus_jax import chat
from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import encode_messages
from tests.support.marks import slow

TURNS = ("Tom has 3 apples and buys 5 more. How many?", "And if he eats 2?", "Why?")


@pytest.fixture(scope="module")
def model(tiny_base):
    return orthrus_jax.load(tiny_base, dtype="float32")


def drain(pieces) -> tuple[str, orthrus_jax.Completion]:
    text = []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            return "".join(text), end.value


@pytest.mark.parametrize("mode", ["orthrus", *slow("ar")])
def test_every_turn_equals_a_fresh_prefill(model, mode: str) -> None:
    conversation = orthrus_jax.Conversation(model, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, question in enumerate(TURNS):
        known = list(conversation.session.ids)
        messages.append({"role": "user", "content": question})
        ids = encode_messages(model.tokenizer, messages)
        text, completion = drain(conversation.ask(question, strategy=mode, max_new_tokens=40))
        (fresh,) = model.complete([ids], strategy=mode, max_new_tokens=40)
        assert completion.tokens == fresh.tokens
        assert text == completion.text == fresh.text
        messages.append({"role": "assistant", "content": text})
        assert conversation.messages == messages
        if turn:
            assert known == ids[: len(known)], "tokens read before are a part of the dialogue"
            assert conversation.session.ids[: len(ids)] == ids


def test_turn_reads_only_new_tokens(model, monkeypatch) -> None:
    prefills = []
    prefill = model.engine.prefill

    def watched(rows, plan, capacity, cache=None, kept=0):
        prefills.append((kept, len(rows[0].prompt)))
        return prefill(rows, plan, capacity, cache, kept)

    monkeypatch.setattr(model.engine, "prefill", watched)
    conversation = orthrus_jax.Conversation(model)
    for question in TURNS:
        drain(conversation.ask(question, max_new_tokens=24))
    (first, _), *later = prefills
    assert first == 0
    assert all(total - kept < 40 for kept, total in later), prefills


@pytest.mark.slow
def test_dialogue_that_outgrows_its_slots_is_read_anew(model) -> None:
    small = orthrus_jax.Conversation(model, slots=64)
    large = orthrus_jax.Conversation(model, slots=1024)
    for question in TURNS:
        texts = [drain(c.ask(question, max_new_tokens=30))[0] for c in (small, large)]
        assert texts[0] == texts[1]
    assert small.session.slots > 64


def test_dialogue_continues_after_an_abandoned_answer(model) -> None:
    conversation = orthrus_jax.Conversation(model)
    pieces = conversation.ask(TURNS[0], max_new_tokens=60)
    beginning = next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": beginning}
    ids = encode_messages(
        model.tokenizer, [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    )
    text, _ = drain(conversation.ask(TURNS[1], max_new_tokens=30))
    assert text == model.complete([ids], max_new_tokens=30)[0].text


@pytest.mark.parametrize("function", ["prefill", "speculative_decode"])
@pytest.mark.parametrize("reset", [True, False])
def test_dialogue_continues_after_an_interrupt_within_a_program(
    model, function, reset, monkeypatch
) -> None:
    conversation = orthrus_jax.Conversation(model)
    drain(conversation.ask(TURNS[0], max_new_tokens=24))
    run = model.engine.programs.run

    def interrupted(called, *arguments, **named):
        result = run(called, *arguments, **named)  # which donates
        if called.__name__ == function:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(model.engine.programs, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drain(conversation.ask(TURNS[1], mode="orthrus", max_new_tokens=24))
    assert conversation.session.ids == []
    if reset:
        conversation.reset()
        assert conversation.messages == []
    messages = [*conversation.messages, {"role": "user", "content": TURNS[2]}]
    text, _ = drain(conversation.ask(TURNS[2], max_new_tokens=24))
    (fresh,) = model.generate(messages, max_new_tokens=24)
    assert text == fresh.text


@pytest.mark.parametrize("reset", [True, False])
def test_dialogue_continues_after_an_interrupt_between_pieces(model, reset) -> None:
    conversation = orthrus_jax.Conversation(model)
    pieces = conversation.ask(TURNS[0], max_new_tokens=60)
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert conversation.session.cache is not None
    if reset:
        conversation.reset()
    messages = [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    text, _ = drain(conversation.ask(TURNS[1], max_new_tokens=24))
    (fresh,) = model.generate(messages, max_new_tokens=24)
    assert text == fresh.text


def test_two_open_answers_of_one_dialogue_are_both_right(model) -> None:
    conversation = orthrus_jax.Conversation(model)
    drain(conversation.ask(TURNS[0], max_new_tokens=24))
    dialogues = [[*conversation.messages, {"role": "user", "content": t}] for t in TURNS[1:]]
    expected = [c.text for c in model.generate(dialogues, max_new_tokens=40)]
    answers = [conversation.ask(text, max_new_tokens=40) for text in TURNS[1:]]
    texts, open_answers = ["", ""], {0, 1}
    while open_answers:
        for i in sorted(open_answers):
            piece = next(answers[i], None)
            if piece is None:
                open_answers.remove(i)
            else:
                texts[i] += piece
    assert texts == expected


def test_command_goes_on_after_an_interrupted_answer(model, tiny_base, monkeypatch, capsys) -> None:
    run, pending = model.engine.programs.run, ["speculative_decode"]

    def interrupted(called, *arguments, **named):
        result = run(called, *arguments, **named)
        if called.__name__ in pending:
            pending.clear()
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(chat, "load", lambda source, **options: model)
    monkeypatch.setattr(model.engine.programs, "run", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TURNS[0]}\n/reset\n{TURNS[0]}\n"))
    chat.main(["--model", str(tiny_base), "--max-new-tokens", "30", "--mode", "orthrus"])
    out, err = capsys.readouterr()
    assert "[interrupted]" in err
    assert model.generate(TURNS[0], max_new_tokens=30)[0].text in out


def test_question_that_does_not_fit_leaves_the_dialogue_unchanged(model) -> None:
    conversation = orthrus_jax.Conversation(model)
    with pytest.raises(UserError, match="over the model's 2048 positions"):
        conversation.ask("one two " * 2000, max_new_tokens=30)
    assert conversation.messages == []


def test_command_advises_a_reset_only_where_it_makes_room(
    model, tiny_base, monkeypatch, capsys
) -> None:
    long = "one two " * 2000
    script = f"{long}\n{TURNS[0]}\n{long}\na\ud800\n"
    monkeypatch.setattr(chat, "load", lambda source, **options: model)
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    chat.main(["--model", str(tiny_base), "--max-new-tokens", "8"])
    errors = [x for x in capsys.readouterr().err.split("\n") if x.startswith("error: ")]
    assert [x.endswith("; /reset makes room") for x in errors] == [False, True, False]


def test_command_streams_resets_and_reports(model, tiny_base, monkeypatch, capsys) -> None:
    script = f"{TURNS[0]}\n/reset\n{TURNS[0]}\n/what\n\n/exit\nnot read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    chat.main(["--model", str(tiny_base), "--dtype", "float32", "--max-new-tokens", "30"])
    out, err = capsys.readouterr()
    expected = model.generate([TURNS[0]], max_new_tokens=30)[0].text
    assert out == f"{expected}\n" * 2
    assert err.count("tokens per forward") == 2
    assert "/what is unknown" in err
