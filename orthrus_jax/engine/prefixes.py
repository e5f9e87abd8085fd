"""Which row a request takes, and whose cache it begins with: the longest shared beginning.

Pure Python on ids; knows no device.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Placement(NamedTuple):
    """A request's row, the row whose cache it continues, and how many of its slots it keeps."""

    target: int
    source: int
    kept: int


def shared_length(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many ids of `held` begin `prompt`; the prompt's last id is always read again.

    By bisection, because slices of lists are compared quickly.
    """
    low, high = 0, min(len(held), len(prompt) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if held[low:middle] == prompt[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def place(
    prompt: Sequence[int],
    held: Sequence[Sequence[int]],
    last_used: Sequence[int],
    idle: Sequence[int],
) -> Placement:
    """Choose a row for `prompt`.

    An idle row all of whose ids begin the prompt is continued: nothing is lost. Otherwise the
    prompt gets the idle row that was used least recently, and a copy of the longest beginning.

    Args:
      prompt: ids, at least one.
      held: per row, the ids of its live slots, running rows included.
      last_used: per row, when; rows that hold nothing have the smallest number.
      idle: rows that no request runs in, at least one.
    """
    kept = [shared_length(ids, prompt) for ids in held]
    best = max(kept)
    sources = [i for i, length in enumerate(kept) if length == best]
    for i in sources:
        if best and i in idle and len(held[i]) == best:
            return Placement(i, i, best)
    return Placement(min(idle, key=lambda i: last_used[i]), sources[0], best)
