"""Text to ids and back: loading a checkpoint's tokenizer and applying its chat template."""

import os
import pathlib
from typing import Any

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
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {error}") from None


def encode(tokenizer: Tokenizer, text: str, *, chat: bool, thinking: bool = False) -> list[int]:
    """Return the prompt ids of one user message, wrapped in the chat template if `chat`.

    Raises:
      UserError: for an empty prompt, or `chat` with a tokenizer that has no template.
    """
    if not text:
        raise UserError("the prompt is empty: give at least one character of text")
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}], thinking=thinking)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_messages(
    tokenizer: Tokenizer, messages: list[dict[str, str]], *, thinking: bool = False
) -> list[int]:
    """Return the ids of a dialogue up to where the assistant answers.

    Raises:
      UserError: when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: use --no-chat for plain text")
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of generated ids, without special tokens, otherwise as it is."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
