"""Sessions: the cache that a dialogue keeps between its turns.

Holds only arrays that no program was given: while an answer is generated the session is empty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from orthrus_jax.values import check_whole


@dataclasses.dataclass
class Session:
    """A dialogue's cache between turns.

    Attributes:
      slots: cache slots; they grow if a turn needs more, and the dialogue is then read again.
      cache: of one row and `slots` slots, or None.
      ids: the tokens of its live slots.
    """

    slots: int
    cache: Any = None
    ids: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_whole("slots", self.slots, 1)

    def shared_prefix(self, prompt: Sequence[int]) -> int:
        """Return how many live slots begin `prompt`; its last token is always read again."""
        if self.cache is None:
            return 0
        limit = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(limit) if self.ids[i] != prompt[i]), limit)

    def grow(self, slots: int) -> int:
        """Grow to at least `slots` slots, which empties the cache; return the number of slots."""
        if slots > self.slots:
            self.slots, self.cache, self.ids = slots, None, []
        return self.slots

    def take(self) -> Any:
        """Hand the cache out and be empty, because whoever gets it will donate it."""
        cache, self.cache, self.ids = self.cache, None, []
        return cache

    def give(self, cache: Any, slots: int, ids: list[int]) -> None:
        """Take a cache of `slots` slots back, unless the session has grown since."""
        if slots == self.slots:
            self.cache, self.ids = cache, ids
