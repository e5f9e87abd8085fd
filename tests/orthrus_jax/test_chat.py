"""Conversations: turns that continue from the cache say what a fresh prefill says."""

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


def said(pieces) -> tuple[str, orthrus_jax.Completion]:
    text = []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            return "".join(text), end.value


@pytest.mark.parametrize("mode", ["orthrus", *slow("ar")])
def test_every_turn_says_what_a_fresh_prefill_says(model, mode: str) -> None:
    conversation = orthrus_jax.Conversation(model, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, question in enumerate(TURNS):
        known = list(conversation.session.ids)
        messages.append({"role": "user", "content": question})
        ids = encode_messages(model.tokenizer, messages)
        text, completion = said(conversation.ask(question, mode=mode, max_new_tokens=40))
        (fresh,) = model.complete([ids], mode=mode, max_new_tokens=40)
        assert completion.tokens == fresh.tokens
        assert text == completion.text == fresh.text
        messages.append({"role": "assistant", "content": text})
        assert conversation.messages == messages
        if turn:
            assert known == ids[: len(known)], "what was read before is a part of the dialogue"
            assert conversation.session.ids[: len(ids)] == ids


def test_a_turn_reads_only_what_is_new(model, monkeypatch) -> None:
    read = []
    prefill = model.engine.prefill

    def watched(rows, plan, capacity, cache=None, kept=0):
        read.append((kept, len(rows[0].prompt)))
        return prefill(rows, plan, capacity, cache, kept)

    monkeypatch.setattr(model.engine, "prefill", watched)
    conversation = orthrus_jax.Conversation(model)
    for question in TURNS:
        said(conversation.ask(question, max_new_tokens=24))
    (first, _), *later = read
    assert first == 0
    assert all(total - kept < 40 for kept, total in later), read


@pytest.mark.slow
def test_a_dialogue_that_outgrows_its_slots_is_read_anew(model) -> None:
    small = orthrus_jax.Conversation(model, slots=64)
    large = orthrus_jax.Conversation(model, slots=1024)
    for question in TURNS:
        texts = [said(c.ask(question, max_new_tokens=30))[0] for c in (small, large)]
        assert texts[0] == texts[1]
    assert small.session.slots > 64


def test_an_abandoned_answer_leaves_a_dialogue_that_goes_on(model) -> None:
    conversation = orthrus_jax.Conversation(model)
    pieces = conversation.ask(TURNS[0], max_new_tokens=60)
    beginning = next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": beginning}
    ids = encode_messages(
        model.tokenizer, [*conversation.messages, {"role": "user", "content": TURNS[1]}]
    )
    text, _ = said(conversation.ask(TURNS[1], max_new_tokens=30))
    assert text == model.complete([ids], max_new_tokens=30)[0].text


def test_a_question_that_does_not_fit_leaves_the_dialogue_as_it_was(model) -> None:
    conversation = orthrus_jax.Conversation(model)
    with pytest.raises(UserError, match="over the model's 2048 positions"):
        conversation.ask("one two " * 2000, max_new_tokens=30)
    assert conversation.messages == []


def test_the_command_streams_resets_and_reports(model, tiny_base, monkeypatch, capsys) -> None:
    script = f"{TURNS[0]}\n/reset\n{TURNS[0]}\n/what\n\n/exit\nnot read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    chat.main(["--model", str(tiny_base), "--dtype", "float32", "--max-new-tokens", "30"])
    out, err = capsys.readouterr()
    expected = model.generate([TURNS[0]], max_new_tokens=30)[0].text
    assert out == f"{expected}\n" * 2
    assert err.count("tokens per forward") == 2
    assert "/what is unknown" in err
