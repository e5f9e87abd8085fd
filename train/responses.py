"""Responses to train on, as ids: a directory that distill.py wrote, or another engine's files.

Knows no rows and no batches: data.py packs the dialogues.
"""

import collections
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orthrus_jax import checkpoint
from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import Tokenizer, encode_messages
from train.data import ChatEncoder, TokenizedDialogue
from train.prompts import COLUMNS, Messages, Skip, dialogue_of, file_rows, local_files, opening

MANIFEST = "manifest.json"
IDS = ["prompt_ids", "answer_ids"]  # columns of a shard
SHARD = re.compile(r"responses-\d{5,}-of-\d{5,}\.parquet")
ANSWERS = ("response", "answer", "output")  # columns in which other engines' files hold the answer


class Responses:
    """Dialogues to train on; each iteration reads the files again.

    Attributes:
      identity: a hash of all files, for the recipe of the packed rows.
      read: rows read in the last iteration.
      skipped: rows of the last iteration that were not used, by reason.
    """

    def __init__(self, path: str | pathlib.Path, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._chat = tokenizer, ChatEncoder(tokenizer)
        self._prompt = {thinking: prompt_encoder(tokenizer, thinking) for thinking in (False, True)}
        path = pathlib.Path(path)
        self._distilled = (path / MANIFEST).is_file()
        self._files = self._shards(path) if self._distilled else local_files(path)
        self.identity = digest(self._files)
        self.read, self.skipped = 0, collections.Counter[str]()

    def __iter__(self) -> Iterator[TokenizedDialogue]:
        self.read, self.skipped = 0, collections.Counter()
        for path in self._files:
            yield from self._ids(path) if self._distilled else self._texts(path)

    def _shards(self, path: pathlib.Path) -> list[pathlib.Path]:
        manifest = read_manifest(path)
        if not manifest["complete"]:
            raise UserError(f"{path} lacks shards of its responses: run python -m train.distill")
        name = self._tokenizer.name_or_path  # "" for one made in memory
        directory = pathlib.Path(name)
        if name and directory.is_dir():
            expected = manifest["asked"]["model"]["tokenizer"]
            if tokenizer_identity(directory) != expected:
                raise UserError(f"{path} holds ids of another tokenizer than that of {directory}")
        return [path / name for name in manifest["shards"]]

    def _ids(self, path: pathlib.Path) -> Iterator[TokenizedDialogue]:
        """Read a distilled shard, without making Python lists of the ids."""
        try:
            with pq.ParquetFile(path) as file:
                columns = [file.schema_arrow.field(name).type for name in IDS]
                if columns != [pa.list_(pa.int32())] * len(IDS):
                    raise pa.ArrowInvalid("other columns than those of train.distill")
                for batch in file.iter_batches(1024, columns=IDS):
                    self.read += len(batch)
                    yield from map(TokenizedDialogue, *(map(_slices, batch.columns)))
        except (OSError, KeyError, pa.ArrowException):  # KeyError: a column is missing
            raise UserError(
                f"{path} is damaged: delete it and run python -m train.distill"
            ) from None

    def _texts(self, path: pathlib.Path) -> Iterator[TokenizedDialogue]:
        for row in file_rows(path, (*COLUMNS, *ANSWERS, "truncated", "finish_reason")):
            self.read += 1
            try:
                yield self._dialogue(row)
            except Skip as reason:
                self.skipped[str(reason)] += 1

    def _dialogue(self, row: Any) -> TokenizedDialogue:
        """Encode another engine's row: messages with answers, or a prompt and an answer."""
        dialogue = dialogue_of(row)
        opening(dialogue)  # raises Skip without a prompt
        answers = [row[name] for name in ANSWERS if row.get(name) is not None]
        if not answers:
            return self._chat(dialogue)
        if dialogue[-1]["role"] == "assistant":
            raise Skip("an answer among the messages, and another in its own column")
        if not isinstance(answers[0], str):
            raise Skip("answer of wrong type")
        text = answers[0].removesuffix(self._tokenizer.eos_token)
        if not text.strip():
            raise Skip("empty answer")
        if any(mark in text for mark in self._chat.marks):
            raise Skip("an answer with the template's own marks")
        # An answer with a thinking part was generated with the thinking template.
        thinking = text.lstrip().startswith("<think>")
        prompt = self._prompt[thinking](dialogue)
        answer = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        complete = row.get("truncated") is not True and row.get("finish_reason") != "length"
        return TokenizedDialogue(
            prompt, [*answer, self._tokenizer.eos_token_id] if complete else answer
        )


def _slices(column: pa.ListArray) -> list[np.ndarray]:
    """The lists of a column, as views of its array of values."""
    return np.split(column.values.to_numpy(), column.offsets.to_numpy())[1:-1]


def read_responses(path: str | pathlib.Path, tokenizer: Tokenizer) -> Responses:
    """Open responses: a directory that train.distill wrote, or another engine's files.

    The latter are JSONL (.gz) or Parquet: a file, a glob or a directory. A row has a prompt as
    prompts.py finds it and an answer in "response", "answer" or "output", or it has messages that
    include their answers. The chat template turns text into ids. An answer ends with the
    end-of-turn token unless the row has "truncated": true or "finish_reason": "length".

    Raises:
      UserError: when there is no file, shards are missing, or their ids are of another tokenizer.
    """
    return Responses(path, tokenizer)


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Read the manifest of a directory of responses.

    Raises:
      UserError: when it is missing or damaged.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        parts = (manifest["prompts"]["skipped"], manifest["asked"]["model"]["tokenizer"])
        valid = (
            list(map(type, parts)) == [dict, str]
            and type(manifest["complete"]) is bool
            and all(SHARD.fullmatch(name) for name in manifest["shards"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f"{directory / MANIFEST} is missing or damaged: use --overwrite")
    return manifest


def prompt_encoder(tokenizer: Tokenizer, thinking: bool) -> Any:
    """The `encode` of a Mix: messages to ids, a Skip for a dialogue that the template refuses.

    Raises:
      UserError: when the template is missing, or refuses any dialogue.
    """
    encode_messages(tokenizer, [{"role": "user", "content": "x"}], thinking=thinking)

    def encode_prompt(messages: Messages) -> list[int]:
        try:
            return encode_messages(tokenizer, messages, thinking=thinking)
        except UserError as error:  # this dialogue alone, its roles for example
            raise Skip("refused by the chat template") from error

    return encode_prompt


def tokenizer_identity(directory: str | pathlib.Path) -> str:
    """SHA-256 of the tokenizer files of a checkpoint directory."""
    files = sorted(pathlib.Path(directory).iterdir())
    return digest(path for path in files if checkpoint.TOKENIZER_FILE.fullmatch(path.name))


def digest(files: Iterable[pathlib.Path]) -> str:
    """Hash names and contents."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
