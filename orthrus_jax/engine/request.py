"""The engine's inputs and outputs: sampling parameters, requests, plans, events, completions.

Decides which values a user may give and the figures of an answer. Knows no model and no device.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np

from orthrus_jax import metrics
from orthrus_jax.decoding.strategy import Strategy
from orthrus_jax.engine.auto import Contender
from orthrus_jax.errors import UserError
from orthrus_jax.values import check_number, check_switch, check_type, check_whole, is_whole, shown

SEED_LIMIT = 1 << 32
TOP_K_LIMIT = int(np.iinfo(np.int32).max)


def _is_list(values: Any) -> bool:
    """Whether `values` is a collection whose elements are not characters or bytes."""
    return isinstance(values, Collection) and not isinstance(values, str | bytes)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are chosen and when it ends; the defaults are greedy decoding.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens (and those equal to the last of them); 0 is off.
      top_p: keep the likeliest tokens that together hold this probability; 1 is off.
      min_p: keep tokens with at least this share of the likeliest one's probability; 0 is off.
      seed: together with the prompt and the number of the sample, it determines the text.
      max_new_tokens: most tokens per answer, an end token included.
      min_new_tokens: no end token is chosen before this many tokens.
      stop: strings that end an answer; they are not part of it.
      stop_token_ids: ids that end an answer, in addition to the model's own.
      logprobs: also return log p of each token under the base model, temperature and filters aside.
      n: samples per prompt.

    Raises:
      UserError: naming the value and its limit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        for name in ("top_k", "seed", "max_new_tokens", "min_new_tokens", "n"):
            check_whole(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p"):
            check_number(name, getattr(self, name))
        check_switch("logprobs", self.logprobs)
        for name, (holds, expected) in self._limits().items():
            if not holds:
                raise UserError(f"{name}={shown(getattr(self, name))} must be {expected}")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"n={self.n} with temperature=0 would give {self.n} equal answers")

    def _limits(self) -> dict[str, tuple[bool, str]]:
        """Whether each field keeps its limit, and the limit in words."""
        stops, ids = self.stop, self.stop_token_ids
        return {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_k": (0 <= self.top_k <= TOP_K_LIMIT, f"0 (off) or more, up to {TOP_K_LIMIT}"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "from 0 (off) to below 1"),
            "seed": (0 <= self.seed < SEED_LIMIT, f"from 0 to {SEED_LIMIT - 1}"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"from 0 to max_new_tokens={self.max_new_tokens}",
            ),
            "stop": (
                _is_list(stops) and all(isinstance(s, str) and s for s in stops),
                "a sequence of strings, none empty",
            ),
            "stop_token_ids": (
                _is_list(ids) and all(is_whole(i) and i >= 0 for i in ids),
                "ids of 0 or more",
            ),
            "n": (self.n >= 1, "at least 1"),
        }

    @property
    def filtered(self) -> bool:
        """Whether any of top_k, top_p and min_p is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Matcher(Protocol):
    """Follows one answer through a grammar."""

    def fill(self, drafts: Sequence[int], allowed: np.ndarray) -> None:
        """Write the masks of the next token and of those after each draft.

        Args:
          drafts: K - 1 ids.
          allowed: uint32[K, W], all ones; rows after a draft that breaks the grammar stay so. Each
            mask allows at least one token: the model's end tokens where nothing else may follow.
        """

    def consume(self, tokens: Sequence[int]) -> int | None:
        """Take the answer's next tokens.

        Returns:
          None while more may follow; of a complete answer, how many of `tokens` belong to it.

        Raises:
          UserError: if the grammar cannot be followed any further.
        """


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
      prompt: ids.
      sampling: how its tokens are chosen.
      sample: which of the prompt's samples it is.
      grammar: makes what holds the answer to a grammar, in a `ResidentQueue`; or None.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    sample: int = 0
    grammar: Callable[[], Matcher] | None = None

    @property
    def noise_id(self) -> int:
        """The key of the noise, with the seed: prompt and sample, not the place in a list."""
        return zlib.crc32(np.array([*self.prompt, self.sample], "<i4").tobytes())


@dataclasses.dataclass(frozen=True)
class Plan:
    """How requests are decoded together; none of it changes a greedy or coupled text.

    Attributes:
      strategy: how each of them is decoded.
      batch_size: rows decoded together.
      refill: put the next request into a finished row at once; otherwise wait for the whole batch.
      stream: report text as it grows.
      time_to_first_token: wait for each prefill in order to time the first token; that is one more
        synchronisation per prefill.
      slots: cache slots per row, unless the requests need more. Calls that name the same number
        share their programs, whatever the lengths of their prompts.
      auto: contenders among which the queue chooses while it decodes, `strategy`'s first; () keeps
        to `strategy`.

    Raises:
      UserError: naming the field and its value.
    """

    strategy: Strategy = dataclasses.field(default_factory=Strategy)
    batch_size: int = 1
    refill: bool = True
    stream: bool = False
    time_to_first_token: bool = False
    slots: int = 0
    auto: tuple[Contender, ...] = ()

    def __post_init__(self) -> None:
        check_type("strategy", self.strategy, Strategy, "a Strategy")
        check_type("auto", self.auto, tuple, "a tuple of Contender")
        check_whole("batch_size", self.batch_size, 1)
        check_whole("slots", self.slots, 0)
        for name in ("refill", "stream", "time_to_first_token"):
            check_switch(name, getattr(self, name))

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All strategies that may run."""
        return tuple(dict.fromkeys([self.strategy, *(c.strategy for c in self.auto)]))


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to one request, and its cost.

    Attributes:
      text: the answer without special tokens and stop string; "" without a tokenizer.
      tokens: its ids, up to the end token or through the last id of the stop string.
      finish_reason: "stop" at an end token or a stop string, "length" at the budget.
      cycles: draft-verify cycles after the prefill that `tokens` needed; AR steps with method "ar".
      accepted: drafts accepted per cycle, those in `tokens` only; all 0 with method "ar".
      forwards: passes through the model: 1 for the prefill, then 1 or 2 per cycle.
      seconds: wall-clock time from prefill to end, in its batch, compilation excluded.
      compile_seconds: time spent compiling meanwhile; 0 if all shapes had been seen before.
      logprobs: log p of each token under the base model, if requested.
      prompt, sample: the place of its prompt in the call, and which of the prompt's n samples.
      time_to_first_token: seconds from prefill to first token, with Plan.time_to_first_token.
      cached_tokens: tokens of the prompt that a cache held already.
      strategies: which strategies ran, in turn, and for how many of the cycles.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    cycles: int
    accepted: list[int]
    forwards: int
    seconds: float
    compile_seconds: float
    logprobs: list[float] | None = None
    prompt: int = 0
    sample: int = 0
    time_to_first_token: float | None = None
    cached_tokens: int = 0
    strategies: Sequence[tuple[Strategy, int]] = ()

    @property
    def acceptance_length(self) -> float:
        """Mean drafts accepted per cycle; the AR view's own token is not counted."""
        return metrics.acceptance_length([self.accepted])

    @property
    def tokens_per_forward(self) -> float:
        """Emitted tokens over forwards. Not a speedup: forwards differ in cost."""
        return metrics.tokens_per_forward(len(self.tokens), self.forwards)

    def summary(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        extra = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "token_ids": self.tokens,
            "finish_reason": self.finish_reason,
            "prompt": self.prompt,
            "sample": self.sample,
            "acceptance_length": self.acceptance_length,
            "tokens_per_forward": self.tokens_per_forward,
            "cycles": self.cycles,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "strategies": [strategy.given() | {"cycles": n} for strategy, n in self.strategies],
            **extra,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.tokens)} tokens | {len(self.tokens) / self.seconds:.1f} tokens/s | "
            f"acceptance length {self.acceptance_length:.2f} | "
            f"{self.tokens_per_forward:.2f} tokens per forward | "
            f"compile {self.compile_seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True)
class Event:
    """The news of request `index`.

    Attributes:
      text: what has become certain.
      completion: once it is finished.
      tokens: its new ids, those after a stop string left out; all of them are reported only if the
        plan streams.
      drafted: whether each of them was a draft that the base accepted.
      cycles: the cycle that emitted each of them; 0 is the prefill.
      logprobs: log p of each, if requested.
      error: why it ended without a completion; only from a `ResidentQueue`.
      forwards: passes through the model for its tokens so far, these included.
    """

    index: int
    text: str = ""
    completion: Completion | None = None
    tokens: Sequence[int] = ()
    drafted: Sequence[bool] = ()
    cycles: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    error: str | None = None
    forwards: int = 1
