"""Text to ids and back: a checkpoint's tokenizer and its chat template.

Refuses by name input that would give ids without meaning: a tokenizer of another model, text that
is not Unicode. Knows no weights.
"""

import os
import pathlib
from typing import Any

from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError

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
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {error}") from None


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


def encode(tokenizer: Tokenizer, text: str, *, chat: bool, thinking: bool = False) -> list[int]:
    """Return the prompt ids of one user message, wrapped in the chat template if `chat`.

    Raises:
      UserError: for an empty prompt, text with a lone surrogate, or `chat` with a tokenizer whose
        template is missing or damaged.
    """
    if not text:
        raise UserError("the prompt is empty: give at least one character of text")
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}], thinking=thinking)
    return _ids(tokenizer, text)


def encode_messages(
    tokenizer: Tokenizer, messages: list[dict[str, str]], *, thinking: bool = False
) -> list[int]:
    """Return the ids of a dialogue up to where the assistant answers.

    Raises:
      UserError: when the tokenizer has no chat template, its template does not parse or refuses
        the dialogue, or the text has a lone surrogate.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: it takes plain text only (generate --no-chat)"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    except Exception as error:  # a template is a program: it can raise anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the tokenizer's chat template cannot be applied ({cause}): mend the template, or "
            "give plain text (generate --no-chat)"
        ) from None
    return _ids(tokenizer, text)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of generated ids, without special tokens, otherwise unchanged."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        before, surrogate = text[max(0, error.start - 20) : error.start], text[error.start]
        raise UserError(
            f"the text holds the lone surrogate {surrogate!r} after {before!r}: it is not Unicode"
        ) from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]
