"""Rows for training: conversations as ids, packed to a fixed length. Knows no model and no loss.

A packed row holds whole conversations one after another. `start` says where each token's own
conversation begins, so that attention and anchors never reach into a neighbour.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy on the host, jax inside a step


class Conversation(NamedTuple):
    """One prompt and one answer as ids; the answer ends with the end-of-turn token."""

    prompt: list[int]
    answer: list[int]


class Rows(NamedTuple):
    """Packed rows, each array [rows, length].

    Attributes:
      tokens: int32, padded with `pad` behind the last conversation.
      start: int32, index of the first token of the token's own conversation; padding starts itself.
      answer: bool, the token belongs to an assistant's answer.
      used: bool, the token is not padding.
    """

    tokens: Array
    start: Array
    answer: Array
    used: Array


def pack(conversations: Iterable[Conversation], length: int, pad: int) -> Iterator[Rows]:
    """Yield packed rows [1, length] in order; a conversation longer than a row is cut at its end.

    [p p a a a p a a . .]   tokens of two conversations (prompt, answer) and padding
    [0 0 0 0 0 5 5 5 8 9]   start
    """
    row: list[Conversation] = []
    room = length
    for conversation in conversations:
        size = len(conversation.prompt) + len(conversation.answer)
        if row and size > room:
            yield _row(row, length, pad)
            row, room = [], length
        row.append(conversation)
        room -= size
    if row:
        yield _row(row, length, pad)


def stack(rows: Iterable[Rows]) -> Rows:
    """Join rows [1, length] to one set of arrays [n, length]."""
    return Rows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def batches(rows: Rows, size: int, seed: int) -> Iterator[Rows]:
    """Yield batches of `size` rows for ever, each epoch in its own order; a short rest is dropped.

    Raises:
      ValueError: when there are fewer rows than one batch.
    """
    count = len(rows.tokens)
    if count < size:
        raise ValueError(f"{count} rows do not fill one batch of {size}")
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        for i in range(0, count - size + 1, size):
            yield Rows(*(part[order[i : i + size]] for part in rows))
        epoch += 1


def _row(row: list[Conversation], length: int, pad: int) -> Rows:
    tokens = np.full(length, pad, np.int32)
    start = np.arange(length, dtype=np.int32)
    answer, used = np.zeros(length, bool), np.zeros(length, bool)
    at = 0
    for prompt, reply in row:
        ids = (prompt + reply)[: length - at]
        end = at + len(ids)
        tokens[at:end], start[at:end], used[at:end] = ids, at, True
        answer[at + len(prompt) : end] = True
        at = end
    return Rows(tokens[None], start[None], answer[None], used[None])
