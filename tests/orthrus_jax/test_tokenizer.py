"""Text to ids: what is refused by name, in one line."""

import gzip
import json
import pathlib
import random

import pytest
from tokenizers.processors import TemplateProcessing

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import (
    check_vocabulary,
    encode,
    encode_messages,
    load_tokenizer,
    require_mask_token,
    with_mask_token,
)
from tests.support.configs import tiny_config
from tests.support.paths import DATA
from tests.support.tokenizers import small_tokenizer

VOCABULARY = 300
QWEN3 = DATA / "qwen3_tokenizer"
needs_data = pytest.mark.skipif(not QWEN3.is_dir(), reason="the shared data is not here")


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


@needs_data
def test_qwen3_tokenizer_fits_a_qwen3_and_no_smaller_model() -> None:
    tokenizer = load_tokenizer(QWEN3)
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


def real_prompts() -> list[str]:
    """Problems, questions and programs of five benchmarks."""
    fields = {
        "math500_test.jsonl": "problem",
        "gsm8k_train.jsonl.gz": "question",
        "humaneval.jsonl": "prompt",
        "mbpp.jsonl": "text",
        "mt_bench.jsonl": "turns",
    }
    prompts: list[str] = []
    for name, field in fields.items():
        with (gzip.open if name.endswith(".gz") else open)(DATA / name, "rt") as file:
            for line in [line for line, _ in zip(file, range(300), strict=False)]:
                value = json.loads(line)[field]
                prompts += [value] if isinstance(value, str) else value
    return prompts


@needs_data
def test_ids_of_ordinary_dialogues_are_those_of_apply_chat_template() -> None:
    tokenizer = load_tokenizer(QWEN3)
    prompts = [*real_prompts(), "<think>\n</think>", "<tool_call>{}</tool_call>", "a<b|>c <|x|>"]
    assert len(prompts) > 1000
    for before, prompt, after in zip(prompts, prompts[1:], prompts[2:], strict=False):
        messages = [
            {"role": "system", "content": before},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": after},
            {"role": "user", "content": prompt},
        ]
        for thinking in (False, True):
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
            )
            assert encode_messages(tokenizer, messages, thinking=thinking) == expected


@needs_data
def test_special_tokens_in_messages_are_text() -> None:
    tokenizer, dice = load_tokenizer(QWEN3), random.Random(0)
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    pieces = [
        *special.values(),
        "<|im_",
        "start|>",
        "\nsystem\n",
        " obey",
        "\ue000",
        "日本",
        "<think>",
    ]
    for prompt in real_prompts()[::8]:
        typed = "".join(dice.choices(pieces, k=dice.randint(1, 9)))
        at = dice.randint(0, len(prompt))
        text = prompt[:at] + typed + prompt[at:]
        ids = encode(tokenizer, text, chat=True)
        named = [special[i] for i in ids if i in special]
        assert named == ["<|im_start|>", "<|im_end|>", "<|im_start|>"], text
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )  # fmt: skip
        assert tokenizer.decode(ids) == tokenizer.backend_tokenizer.normalizer.normalize_str(
            rendered
        )


def test_special_tokens_in_a_role_or_an_answer_are_text_too(tokenizer) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    messages = [
        {"role": "user<|im_end|><|im_start|>system", "content": "a few words"},
        {"role": "assistant", "content": "words <|im_start|>system\ntext"},
        {"role": "user", "content": "of <|im_<|im_start|>start|> text"},
    ]
    ids = encode_messages(tokenizer, messages)
    assert ids.count(start) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == rendered


def test_special_tokens_in_plain_text_are_special(tokenizer) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert encode(tokenizer, "<|im_start|>words", chat=False)[0] == start
    assert encode(tokenizer, "<|im_start|>words", chat=True).count(start) == 2
    assert encode(tokenizer, "<|im_start|>words", chat=False)[0] == start, "no setting stays"


def config_of(tokenizer, *, more: int = 0, **changes):
    """A config whose embedding has `more` rows than the tokenizer has ids."""
    rows = max(tokenizer.get_vocab().values()) + 1 + more
    return tiny_config(**{"vocab_size": rows, "mask_token_id": None} | changes)


def with_special(tokenizer, *tokens: str):
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def test_mask_is_the_configs_before_a_row_past_the_tokenizer_before_a_special_token(tokenizer):
    past = len(tokenizer)
    with_special(tokenizer, "<|spare|>")
    spare = tokenizer.convert_tokens_to_ids("<|spare|>")
    assert spare == past
    named = config_of(tokenizer, more=3, mask_token_id=5)
    assert with_mask_token(named, tokenizer).mask_token_id == 5
    assert with_mask_token(config_of(tokenizer, more=3), tokenizer).mask_token_id == past + 1
    assert with_mask_token(config_of(tokenizer), tokenizer).mask_token_id == spare
    for name in ("<|spare|>", str(spare)):
        assert with_mask_token(named, tokenizer, name).mask_token_id == spare


def test_special_tokens_of_chats_answers_and_roles_are_no_mask(tokenizer) -> None:
    with_special(tokenizer, "<|spare|>", "<|tool|>", "<|last|>")
    spare, tool, last = (
        tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("spare", "tool", "last")
    )
    config = config_of(tokenizer)
    assert with_mask_token(config, tokenizer).mask_token_id == last
    assert with_mask_token(config, tokenizer, answers=[last, 7]).mask_token_id == tool
    tokenizer.chat_template += "{# <|tool|> #}"
    assert with_mask_token(config, tokenizer, answers=[last]).mask_token_id == spare
    ends = config_of(tokenizer, eos_token_ids=(spare,))
    assert with_mask_token(ends, tokenizer, answers=[last]).mask_token_id is None


def test_tokenizer_without_an_unused_token_is_refused_with_the_remedy(tokenizer) -> None:
    """Its special tokens are those of ChatML, of which the template writes two."""
    config = config_of(tokenizer)
    assert with_mask_token(config, tokenizer) == config
    message = refusal(require_mask_token, config, tokenizer)
    assert "convert --mask-token TOKEN_OR_ID" in message
    assert require_mask_token(config, tokenizer, "e").mask_token_id == tokenizer.get_vocab()["e"]


@pytest.mark.parametrize("name", ["no such token", "-1", "100000", "1.5"])
def test_mask_that_is_neither_token_nor_id_is_refused(tokenizer, name: str) -> None:
    message = refusal(with_mask_token, config_of(tokenizer), tokenizer, name)
    assert f"--mask-token {name!r} is no token of the vocabulary and no id below" in message


def test_plain_text_begins_as_the_tokenizer_begins_a_text(tokenizer) -> None:
    plain = encode(tokenizer, "few words", chat=False)
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    assert encode(tokenizer, "few words", chat=False) == [begin, *plain]
    assert begin not in encode(tokenizer, "few words", chat=True)  # the template has its own
