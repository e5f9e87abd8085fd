"""Text to ids and back: a checkpoint's tokenizer and its chat template.

Decides that a message is text whatever it spells: only the template writes special tokens, so no
user opens a turn. Refuses by name a tokenizer of another model and text that is not Unicode: their
ids would be meaningless. Knows no weights.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; imported late, it takes seconds


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Load the tokenizer files of a checkpoint directory. Runs no code from the checkpoint.

    Raises:
      UserError: when the directory holds no tokenizer or a broken one.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    directory = pathlib.Path(directory)
    if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
        raise UserError(
            f"{directory} has no tokenizer.json: text needs the model's tokenizer files"
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file makes the library raise anything
        cause = first_line(error)
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {cause}") from None


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer with ids beyond the model's vocabulary: they have no embedding.

    A smaller tokenizer is usual: Qwen3's vocabulary is padded with rows that no text uses.

    Raises:
      UserError: naming the tokenizer, its largest id and the vocabulary's size.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path or 'memory'} has ids up to {largest}, but "
            f"the model has vocab_size={config.vocab_size}: it belongs to another model"
        )


def with_mask_token(
    config: ModelConfig, tokenizer: Tokenizer, named: str = "", answers: Iterable[int] = ()
) -> ModelConfig:
    """Return the config with the id of its MASK token, as far as one can be had.

    In this order: the token that `named` names; the config's own; the first row of the embedding
    past the tokenizer; the last special token that neither the chat template uses, nor a role of
    the tokenizer (begin, end, unknown, padding), nor `answers`. Whatever it is, text stays exact: a
    base may emit its MASK.

    Args:
      config: of the base.
      tokenizer: of the base.
      named: a token of the vocabulary, or an id.
      answers: ids of a sample of the answers that a view is trained on.

    Raises:
      UserError: when `named` is neither.
    """
    vocabulary = tokenizer.get_vocab()
    past = max(vocabulary.values(), default=-1) + 1
    if named:
        mask = vocabulary.get(named, int(named) if named.isdecimal() else -1)
        if not 0 <= mask < config.vocab_size:
            raise UserError(
                f"--mask-token {named!r} is no token of the vocabulary and no id below "
                f"{config.vocab_size} (vocab_size)"
            )
    elif config.mask_token_id is not None:
        return config
    elif past < config.vocab_size:
        mask = past
    else:
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        unused = special - _ids_in_use(tokenizer) - set(config.eos_token_ids) - set(answers)
        if not unused:
            return config
        mask = max(unused)
    return dataclasses.replace(config, mask_token_id=mask)


def require_mask_token(
    config: ModelConfig, tokenizer: Tokenizer, named: str = "", answers: Iterable[int] = ()
) -> ModelConfig:
    """`with_mask_token`, or an error where there is none.

    Raises:
      UserError: naming the tokenizer, and how to name a token.
    """
    config = with_mask_token(config, tokenizer, named, answers)
    if config.mask_token_id is None:
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path or 'memory'} has no special token that "
            "chats leave unused, and drafting needs one: name a token that the model's answers "
            "hardly use, orthrus_jax.convert --mask-token TOKEN_OR_ID"
        )
    return config


def _ids_in_use(tokenizer: Tokenizer) -> set[int]:
    """Ids of roles, and those that the chat template names or writes."""
    roles = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    used = {getattr(tokenizer, name) for name in roles}
    template = str(tokenizer.chat_template)
    used |= {id for id, t in tokenizer.added_tokens_decoder.items() if t.content in template}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for messages in (turns, [{"role": "system", "content": "z"}, *turns]):
        with contextlib.suppress(Exception):  # no template, or one that refuses a system message
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            used |= set(tokenizer(text)["input_ids"])
    return used


def encode(tokenizer: Tokenizer, text: str, *, chat: bool, thinking: bool = False) -> list[int]:
    """Return the prompt ids of one user message, wrapped in the chat template if `chat`.

    Without it, special tokens that the text spells are read as such, as transformers reads them:
    plain text is how a caller writes a whole prompt by hand.

    Raises:
      UserError: for an empty prompt, text with a lone surrogate, or `chat` with a tokenizer whose
        template is missing or damaged.
    """
    if not text:
        raise UserError("the prompt is empty: give at least one character of text")
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}], thinking=thinking)
    return _ids(tokenizer, text, special=True)


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Return the ids of a dialogue up to where the assistant answers.

    Special tokens that a message or a tool's definition spells are read as ordinary text. Otherwise
    the ids are those of transformers' `apply_chat_template`.

    Raises:
      UserError: when the tokenizer has no chat template, its template does not parse or refuses
        the dialogue, or the text has a lone surrogate.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: it takes plain text only (generate --no-chat)"
        )
    special = _special_tokens(tokenizer)
    typed = "".join(_strings([messages, tools]))
    unused = (chr(i) for i in range(0xE000, 0x110000) if chr(i) not in typed)
    # While the template runs, a private character stands for each special token that was typed.
    stand_ins = dict(zip(sorted(set(special.findall(typed))), unused, strict=False))
    hide = lambda text: special.sub(lambda match: stand_ins[match[0]], text)
    if stand_ins:
        messages, tools = _map_strings([messages, tools], hide)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    except Exception as error:  # a template is a program: it can raise anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the tokenizer's chat template cannot be applied ({cause}): mend the template, or "
            "give plain text (generate --no-chat)"
        ) from None
    if not stand_ins:
        return _ids(tokenizer, text)
    shown = str.maketrans({stand_in: token for token, stand_in in stand_ins.items()})
    ids: list[int] = []
    for at, part in enumerate(re.split(f"({special.pattern})", text)):
        if at % 2:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids += _ids(tokenizer, part.translate(shown), split_special_tokens=True)
    return ids


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of generated ids, without special tokens, otherwise unchanged."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Match each special token; where one begins with another, the longer."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_strings, value.items()))
    elif isinstance(value, Sequence):
        yield from itertools.chain.from_iterable(map(_strings, value))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(one, change) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(one, change) for one in value]
    return value


def _ids(tokenizer: Tokenizer, text: str, *, special: bool = False, **options: bool) -> list[int]:
    """Ids of a text; with `special` also what the tokenizer puts before a text (Llama's begin)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        before, surrogate = text[max(0, error.start - 20) : error.start], text[error.start]
        raise UserError(
            f"the text holds the lone surrogate {surrogate!r} after {before!r}: it is not Unicode"
        ) from None
    return tokenizer(text, add_special_tokens=special, **options)["input_ids"]
