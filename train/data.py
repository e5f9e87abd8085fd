"""Rows for training: conversations as ids, packed to a fixed length, in batches. Knows no model.

A packed row holds conversations one after another. `start` gives the first token of each token's
own conversation, so that attention and anchors never reach into a neighbour. Rows are files mapped
into memory; the rows of a batch are a function of seed and step.
"""

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import Tokenizer
from train.prompts import Messages, Skip

Array = Any  # numpy on the host, jax inside a step
Ids = Sequence[int] | np.ndarray
EPOCHS = (
    1 << 31
)  # in effect endless; grain's own endless repetition overflows in batches of one row
ABOUT = "rows.json"  # next to the arrays of packed rows: their recipe and counts


class TokenizedDialogue:
    """Ids of alternating prompts and answers: a prompt, its answer, the next prompt, ...

    An answer ends with the end-of-turn token, unless it was cut off.
    """

    def __init__(self, *segments: Ids) -> None:
        self.segments = segments

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, int32[n], and which of them are answer tokens, bool[n]."""
        ids = np.concatenate([np.asarray(segment, np.int32) for segment in self.segments])
        is_answer = np.arange(len(self.segments)) % 2 == 1
        return ids, np.repeat(is_answer, [len(segment) for segment in self.segments])


class Rows(NamedTuple):
    """Packed rows, each array [rows, length].

    Attributes:
      tokens: int32, padded with `pad` after the last conversation.
      start: int32, index of the first token of the token's own conversation; a padding token has
        its own index. All 0 for rows packed without document masks.
      answer: bool, the token belongs to an assistant's answer.
      used: bool, the token is not padding.
    """

    tokens: Array
    start: Array
    answer: Array
    used: Array


class ChatEncoder:
    """Encodes dialogues with the tokenizer's chat template, and marks their answers.

    The template is treated as a black box: an answer runs from the text that opens an assistant's
    turn to the end-of-turn token, inclusive. Text that the template puts before an answer generated
    without thinking (Qwen3: an empty thinking part) belongs to the prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: conversations need one")
        self._tokenizer, self._end = tokenizer, tokenizer.eos_token
        question: Messages = [{"role": "user", "content": "x"}]
        before = len(self._render(question))
        self._header, self._direct = (
            self._render(question, add_generation_prompt=True, enable_thinking=thinking)[before:]
            for thinking in (True, False)
        )
        self.marks = (self._header, self._end)  # no message may hold them

    def __call__(self, messages: Messages) -> TokenizedDialogue:
        """Encode a dialogue up to its last answer.

        Raises:
          Skip: for a dialogue without an answer, or one that the template refuses or omits.
        """
        turns = sum(message["role"] == "assistant" for message in messages)
        if not turns:
            raise Skip("no answer")
        if any(mark in m["content"] for m in messages for mark in self.marks):
            raise Skip("a message with the template's own marks")
        try:
            prompt, *rest = self._render(messages).split(self._header)
        except Exception as error:  # a template may raise anything
            raise Skip("refused by the chat template") from error
        if len(rest) != turns or not all(self._end in piece for piece in rest):
            raise Skip("an answer that the chat template does not show")
        segments: list[str] = []
        for piece in rest:
            prompt += self._header
            answer, _, rest_of_piece = piece.partition(self._end)
            if (self._header + answer).startswith(self._direct):
                skipped = self._direct[len(self._header) :]
                prompt, answer = prompt + skipped, answer[len(skipped) :]
            segments += [prompt, answer + self._end]
            prompt = rest_of_piece
        encoded = self._tokenizer(segments, add_special_tokens=False)["input_ids"]
        return TokenizedDialogue(*encoded)

    def _render(self, messages: Messages, **options: Any) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)


def pack(
    conversations: Iterable[TokenizedDialogue],
    length: int,
    pad: int,
    *,
    document_masks: bool = True,
) -> Iterator[Rows]:
    """Yield packed rows [1, length] in order; a conversation longer than a row is cut at its end.

    [p p a a a p a a . .]   tokens of two conversations (prompt, answer) and padding
    [0 0 0 0 0 5 5 5 8 9]   start

    Without `document_masks` the conversations form one stream that is cut into rows of `length`,
    and start is 0: a token sees all tokens before it in its row, as in the authors' training.
    """
    if not document_masks:
        yield from _pack_stream(conversations, length, pad)
        return
    row: list[tuple[np.ndarray, np.ndarray]] = []
    room = length
    for conversation in conversations:
        part = conversation.arrays()
        size = len(part[0])
        if row and size > room:
            yield _row(row, length, pad)
            row, room = [], length
        row.append(part)
        room -= size
    if row:
        yield _row(row, length, pad)


def _pack_stream(
    conversations: Iterable[TokenizedDialogue], length: int, pad: int
) -> Iterator[Rows]:
    whole = lambda part: _row([part], length, pad)._replace(start=np.zeros((1, length), np.int32))
    ids, answer = np.zeros(0, np.int32), np.zeros(0, bool)
    for conversation in conversations:
        ids, answer = map(np.concatenate, zip((ids, answer), conversation.arrays(), strict=True))
        while len(ids) >= length:
            yield whole((ids[:length], answer[:length]))
            ids, answer = ids[length:], answer[length:]
    if len(ids):
        yield whole((ids, answer))


def _row(row: list[tuple[np.ndarray, np.ndarray]], length: int, pad: int) -> Rows:
    tokens = np.full(length, pad, np.int32)
    start = np.arange(length, dtype=np.int32)
    answer, used = np.zeros(length, bool), np.zeros(length, bool)
    at = 0
    for ids, is_answer in row:
        end = min(at + len(ids), length)
        tokens[at:end], start[at:end], used[at:end] = ids[: end - at], at, True
        answer[at:end] = is_answer[: end - at]
        at = end
    return Rows(tokens[None], start[None], answer[None], used[None])


def stack(rows: Iterable[Rows]) -> Rows:
    """Join rows [1, length] to one set of arrays [n, length]."""
    return Rows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def write_rows(
    directory: str | pathlib.Path,
    conversations: Iterable[TokenizedDialogue],
    *,
    length: int,
    pad: int,
    document_masks: bool = True,
    recipe: Mapping[str, Any],
    overwrite: bool = False,
) -> Rows:
    """Pack to files and return the rows, mapped into memory; existing rows are reused.

    A row is written as soon as it is full, so memory use does not grow. The files take 8 bytes per
    token, and the directory gets its name when all are complete.

    Args:
      directory: for one array per field of Rows, and rows.json.
      conversations: read only if the rows do not exist yet.
      length, pad, document_masks: see `pack`.
      recipe: JSON values on which the rows also depend: the origin of the conversations.
      overwrite: replace rows of another recipe.

    Raises:
      UserError: when the directory holds rows of another recipe or other files, or there is no
        conversation.
    """
    target = pathlib.Path(directory)
    wanted = {"length": length, "pad": pad, "document_masks": document_masks, **recipe}
    if (target / ABOUT).exists():
        existing = _recipe_of(target / ABOUT)
        if existing == wanted:
            return open_rows(target)
        if not overwrite:
            changed = [k for k in {**wanted, **existing} if wanted.get(k) != existing.get(k)]
            changes = ", ".join(f"{k} {existing.get(k)!r}, now {wanted.get(k)!r}" for k in changed)
            raise UserError(f"{target} holds rows of another recipe ({changes}): use --overwrite")
    elif target.exists() and any(target.iterdir()):
        raise UserError(f"{target} holds no packed rows, but other files: name another directory")
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    fresh.mkdir(parents=True)
    try:
        counts = _write(fresh, conversations, length, pad, document_masks)
        about = {"recipe": wanted, **counts}
        (fresh / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return open_rows(target)


def _recipe_of(path: pathlib.Path) -> dict[str, Any]:
    """The recipe in rows.json; {}, which is no rows' recipe, if the file is damaged."""
    try:
        existing = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return existing if isinstance(existing, dict) else {}


def open_rows(directory: str | pathlib.Path) -> Rows:
    """Map the rows of a directory that `write_rows` wrote; `start` may be a narrower integer.

    Raises:
      UserError: when they are missing or damaged.
    """
    paths = [pathlib.Path(directory, f"{name}.npy") for name in Rows._fields]
    try:
        return Rows(*(np.load(path, mmap_mode="r") for path in paths))
    except (OSError, EOFError, ValueError) as error:  # the latter two for a file cut short
        raise UserError(f"{directory} holds no whole packed rows: {error}") from None


def _write(
    folder: pathlib.Path,
    conversations: Iterable[TokenizedDialogue],
    length: int,
    pad: int,
    masks: bool,
) -> dict[str, int]:
    """Write the arrays; return the numbers of rows, conversations, tokens and answer tokens."""
    names = ("rows", "conversations", "longer_than_a_row", "tokens", "answer_tokens")
    counts = dict.fromkeys(names, 0)

    def counted() -> Iterator[TokenizedDialogue]:
        for conversation in tqdm(conversations, "pack", unit="conversation"):
            size = sum(map(len, conversation.segments))
            counts["conversations"] += 1
            counts["longer_than_a_row"] += size > length
            yield conversation

    narrow = np.uint16 if length <= 1 << 16 else np.int32
    dtypes = Rows(np.int32, narrow, bool, bool)
    files = Rows(*((folder / f"{name}.npy").open("wb") for name in Rows._fields))
    try:
        for file, dtype in zip(files, dtypes, strict=True):
            _header(file, dtype, 0, length)
        for row in pack(counted(), length, pad, document_masks=masks):
            for file, part, dtype in zip(files, row, dtypes, strict=True):
                file.write(part.astype(dtype, copy=False).tobytes())
            counts["rows"] += 1
            counts["tokens"] += int(row.used.sum())
            counts["answer_tokens"] += int(row.answer.sum())
        if not counts["rows"]:
            raise UserError("there is no conversation to pack: see what was skipped, and why")
        for file, dtype in zip(files, dtypes, strict=True):
            file.seek(0)
            _header(file, dtype, counts["rows"], length)
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
    return counts


def _header(file: BinaryIO, dtype: Any, rows: int, length: int) -> None:
    """Write the .npy header; numpy pads it, so the number of rows can be filled in later."""
    shape = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, length)}
    np.lib.format.write_array_header_1_0(file, shape)


class Loader:
    """Endless batches, each epoch in its own order; an incomplete last batch is dropped.

    The contents of batch n depend on the rows, the global batch size and the seed. Each process
    gets its slice of every batch, so a saved state is valid for any number of processes.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Prepare the order of `rows`.

        Args:
          rows: arrays [rows, length], in memory or mapped.
          batch_size: of the global batch.
          seed: of the order.
          process_index, process_count: select this process's slice of each batch.

        Raises:
          UserError: when the rows fill no batch, or a batch does not divide among processes.
        """
        import grain  # late: it takes a second, and few users of this module need it

        count = len(rows.tokens)
        if count < batch_size:
            raise UserError(f"{count} rows do not fill one batch of {batch_size}")
        if batch_size % process_count:
            raise UserError(f"a batch of {batch_size} rows does not divide by {process_count}")
        self._order = {"rows": count, "batch_size": batch_size, "seed": seed}
        local = batch_size // process_count
        # grain adds the epoch's number to the seed: unhashed, seed 1 would be seed 0 one epoch on.
        spread = np.random.SeedSequence(seed).generate_state(1)[0]
        own = slice(process_index * local, (process_index + 1) * local)
        batches = (
            grain.MapDataset.range(count)
            .shuffle(seed=int(spread))[: count - count % batch_size]
            .repeat(EPOCHS)
            .batch(batch_size)
            .map(lambda index: _take(rows, index[own]))
        )
        # Few threads and few prefetched batches suffice: a batch is a copy of some megabytes.
        prefetch = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        self._batches = iter(batches.to_iter_dataset(prefetch))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Rows:
        return next(self._batches)

    def state(self) -> dict[str, int]:
        """The position in JSON values, after the returned batches, not the prefetched ones."""
        return {**self._batches.get_state(), **self._order}

    def continues(self, state: Mapping[str, int]) -> bool:
        """Whether a saved position is of these rows, batches and seed."""
        return all(state.get(name) == value for name, value in self._order.items())

    def restore(self, state: Mapping[str, int]) -> None:
        """Return to a saved position: the next batch is the one that was next when it was saved.

        Raises:
          UserError: for the state of a loader of other rows, batch size or seed.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise UserError(
                    f"the saved position in the data is for {name}={state.get(name)}, not {value}"
                )
        self._batches.set_state({k: v for k, v in state.items() if k not in self._order})


def _take(rows: Rows, index: np.ndarray) -> Rows:
    batch = Rows(*(np.asarray(part[index]) for part in rows))
    return batch._replace(start=batch.start.astype(np.int32, copy=False))
