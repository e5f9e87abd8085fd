"""Text to ids: what is refused by name, in one line."""

import pathlib

import pytest

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import check_vocabulary, encode, encode_messages, load_tokenizer
from tests.support.configs import tiny_config
from tests.support.paths import DATA
from tests.support.tokenizers import small_tokenizer

VOCABULARY = 300


@pytest.fixture
def tokenizer():
    return small_tokenizer(["a few words of text"], VOCABULARY)


def refusal(function, *args, **options) -> str:
    with pytest.raises(UserError) as raised:
        function(*args, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer, tmp_path: pathlib.Path) -> None:
    largest = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, tiny_config(vocab_size=largest + 1))
    check_vocabulary(tokenizer, tiny_config(vocab_size=largest + 100))
    message = refusal(check_vocabulary, tokenizer, tiny_config(vocab_size=largest))
    assert f"has ids up to {largest}, but the model has vocab_size={largest}" in message
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert f"the tokenizer in {tmp_path}" in refusal(check_vocabulary, loaded, tiny_config())


def test_added_tokens_count_as_part_of_the_tokenizer(tokenizer) -> None:
    config = tiny_config(vocab_size=max(tokenizer.get_vocab().values()) + 1)
    tokenizer.add_tokens(["<new>"])
    assert f"has ids up to {config.vocab_size}" in refusal(check_vocabulary, tokenizer, config)


@pytest.mark.skipif(not (DATA / "qwen3_tokenizer").is_dir(), reason="the shared data is not here")
def test_qwen3_tokenizer_fits_a_qwen3_and_no_smaller_model() -> None:
    tokenizer = load_tokenizer(DATA / "qwen3_tokenizer")
    check_vocabulary(tokenizer, tiny_config(vocab_size=151_936))
    check_vocabulary(tokenizer, tiny_config(vocab_size=151_669))
    message = refusal(check_vocabulary, tokenizer, tiny_config(vocab_size=151_668))
    assert "has ids up to 151668, but the model has vocab_size=151668" in message


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0]['content'] | nonsense }}", "nonsense"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ missing.field.of }}", "missing"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_damaged_chat_template_is_refused_in_one_line(tokenizer, template, cause: str) -> None:
    tokenizer.chat_template = template
    for message in (
        refusal(encode_messages, tokenizer, [{"role": "user", "content": "hi"}]),
        refusal(encode, tokenizer, "hi", chat=True),
    ):
        assert message.startswith("the tokenizer's chat template cannot be applied (")
        assert cause in message
    assert encode(tokenizer, "hi", chat=False)


def test_missing_chat_template_is_refused(tokenizer) -> None:
    tokenizer.chat_template = None
    assert "has no chat template" in refusal(encode, tokenizer, "hi", chat=True)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("text", ["abc \ud83d!", "\udc80 abc", "a\ud83d\ud83d"])
def test_lone_surrogate_is_refused_by_name(tokenizer, text: str, chat: bool) -> None:
    surrogate = next(character for character in text if "\ud800" <= character <= "\udfff")
    message = refusal(encode, tokenizer, text, chat=chat)
    assert f"the lone surrogate {surrogate!r}" in message
    assert message.isprintable()
    assert encode(tokenizer, "abc \U0001f600!", chat=chat)


def test_empty_prompt_is_refused(tokenizer) -> None:
    assert "the prompt is empty" in refusal(encode, tokenizer, "", chat=True)
