"""What goes into the engine and what comes out of it: requests, plans, events, answers."""

import dataclasses
import math
import zlib
from collections.abc import Sequence

import numpy as np

from orthrus_jax.decoding.strategy import Strategy
from orthrus_jax.errors import UserError

SEED_LIMIT = 1 << 32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What a user asks of one generation; the defaults are greedy decoding.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens (and those equal to the last of them); 0 is off.
      top_p: keep the likeliest tokens that together hold this probability; 1 is off.
      min_p: keep tokens at least this share of the likeliest one's probability; 0 is off.
      seed: with the prompt and the number of the sample, it fixes the text.
      max_new_tokens: tokens an answer may have, an end token included.
      min_new_tokens: no end token is chosen before this many tokens.
      stop: strings that end an answer; they are not part of it.
      stop_token_ids: ids that end an answer, beside the model's own.
      logprobs: also return log p of each token under the base model, temperature and filters aside.
      n: samples a prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        checks = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "from 0 (off) to below 1"),
            "seed": (0 <= self.seed < SEED_LIMIT, f"from 0 to {SEED_LIMIT - 1}"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"from 0 to max_new_tokens={self.max_new_tokens}",
            ),
            "stop": (
                not isinstance(self.stop, str) and all(self.stop),
                "a sequence of strings, none empty",
            ),
            "stop_token_ids": (all(i >= 0 for i in self.stop_token_ids), "ids of 0 or more"),
            "n": (self.n >= 1, "at least 1"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise UserError(f"{name}={getattr(self, name)!r} must be {expected}")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"n={self.n} with temperature=0 would give {self.n} equal answers")

    @property
    def filtered(self) -> bool:
        """Whether any of top_k, top_p and min_p is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to make: prompt ids, how to sample, which of the prompt's samples this is."""

    prompt: Sequence[int]
    sampling: SamplingParams
    sample: int = 0

    @property
    def stream(self) -> int:
        """What keys the noise beside the seed: prompt and sample, not the place in a list."""
        return zlib.crc32(np.array([*self.prompt, self.sample], "<i4").tobytes())


@dataclasses.dataclass(frozen=True)
class Plan:
    """How requests are decoded together; none of it changes a greedy or coupled text.

    Attributes:
      strategy: how each sequence is decoded.
      batch_size: sequences decoded together.
      refill: put the next request in a finished row's place at once; else wait for the whole batch.
      stream: report text as it grows.
      time_first: wait for each prefill, so as to time the first token; one stop of the host more.
      slots: cache slots per sequence, where the requests need no more. Calls that name the same
        number share their programs, whatever the lengths of their prompts.
    """

    strategy: Strategy = dataclasses.field(default_factory=Strategy)
    batch_size: int = 1
    refill: bool = True
    stream: bool = False
    time_first: bool = False
    slots: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request's tokens and what they took; see generate.Completion for the fields."""

    tokens: list[int]
    text: str | None  # None where no stream followed the text
    finish_reason: str
    logprobs: list[float] | None
    cycles: int
    accepted: list[int]
    seconds: float
    compile_seconds: float
    first_seconds: float | None = None  # until the first token was there, with Plan.time_first


@dataclasses.dataclass(frozen=True)
class Event:
    """Text that has become certain for request `index`, and its answer once it is finished."""

    index: int
    text: str = ""
    answer: Answer | None = None
