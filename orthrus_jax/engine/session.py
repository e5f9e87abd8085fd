"""Sessions: what stays of a conversation between its turns."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class Memory:
    """A conversation's cache between turns: `ids` are the tokens of its live slots."""

    slots: int
    cache: Any = None
    ids: list[int] = dataclasses.field(default_factory=list)

    def common(self, prompt: Sequence[int]) -> int:
        """How many live slots begin `prompt`; its last token is always read anew."""
        if self.cache is None:
            return 0
        limit = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(limit) if self.ids[i] != prompt[i]), limit)
