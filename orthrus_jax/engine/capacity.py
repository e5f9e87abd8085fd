"""Capacities: the shapes that the programs of a queue are compiled for, and the requests that fit.

Every field is static: another value is another set of programs. Knows no model.
"""

import dataclasses
from collections.abc import Sequence

from orthrus_jax.engine.programs import bucket
from orthrus_jax.engine.request import Request
from orthrus_jax.errors import UserError
from orthrus_jax.values import check_switch, check_whole

ANNOUNCED_WIDTHS = (64, 128, 256, 512)  # of prefills, where all programs are compiled beforehand


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The most that a request of one queue may ask for. The batch size is the plan's.

    Attributes:
      slots: cache slots per row.
      max_new_tokens: N, the width of the output.
      ends: end ids per row, the model's own included.
      sampled: a temperature above 0.
      filtered: with it, top_k, top_p or min_p.
      min_tokens: min_new_tokens above 0.
      logprobs: log p of each token.
      grammar: requests with a grammar.
      widths: to which prompts are padded, ascending; () pads to `bucket`, without a limit.
    """

    slots: int
    max_new_tokens: int
    ends: int = 4
    sampled: bool = False
    filtered: bool = False
    min_tokens: bool = False
    logprobs: bool = False
    grammar: bool = False
    widths: tuple[int, ...] = ()

    @classmethod
    def announced(
        cls, context: int, lookahead: int, *, ends: int = 4, grammar: bool = False
    ) -> "Capacity":
        """The capacity for prompts that have, with their answers, up to `context` tokens.

        Its prefills have few widths, so that all programs can be compiled beforehand.
        """
        slots = bucket(context + lookahead)
        return cls(
            slots=slots,
            max_new_tokens=context,
            ends=ends,
            sampled=True,
            filtered=True,
            logprobs=True,
            grammar=grammar,
            widths=tuple(width for width in ANNOUNCED_WIDTHS if width <= slots),
        )

    def width(self, length: int) -> int:
        """The rows to which a prompt of `length` tokens, at most the last width, is padded."""
        if not self.widths:
            return bucket(length)
        return next(width for width in self.widths if width >= length)

    def __post_init__(self) -> None:
        for name in ("slots", "max_new_tokens", "ends"):
            check_whole(name, getattr(self, name), 1)
        for name in ("sampled", "filtered", "min_tokens", "logprobs"):
            check_switch(name, getattr(self, name))

    @classmethod
    def of(cls, requests: Sequence[Request], slots: int, eos: int) -> "Capacity":
        """Return the capacity that fits `requests`, at least one, rounded up to buckets.

        Args:
          requests: checked by `Engine.check`.
          slots: cache slots per row.
          eos: how many end ids the model has.
        """
        samplings = [request.sampling for request in requests]
        ends = eos + max(len(s.stop_token_ids) for s in samplings)
        return cls(
            slots=slots,
            max_new_tokens=bucket(max(s.max_new_tokens for s in samplings)),
            ends=1 << max(ends - 1, 0).bit_length(),
            sampled=any(s.temperature > 0 for s in samplings),
            filtered=any(s.temperature > 0 and s.filtered for s in samplings),
            min_tokens=any(s.min_new_tokens for s in samplings),
            logprobs=any(s.logprobs for s in samplings),
        )

    def check(self, request: Request, number: int, eos: int, lookahead: int) -> None:
        """Refuse request `number` if it does not fit.

        Args:
          request: checked by `Engine.check`.
          number: its name in the message.
          eos: how many end ids the model has.
          lookahead: slots that a cycle writes after its anchor.

        Raises:
          UserError: naming the value and its limit.
        """
        sampling, length = request.sampling, len(request.prompt)
        new, ends = sampling.max_new_tokens, eos + len(sampling.stop_token_ids)
        if new > self.max_new_tokens:
            raise UserError(
                f"request {number}: max_new_tokens={new} is over this queue's {self.max_new_tokens}"
            )
        # Prefill pads a prompt to its bucket; the last anchor still writes `lookahead` slots.
        padded = length if self.widths else bucket(length)
        if (needed := max(padded, length + new + lookahead)) > self.slots:
            raise UserError(
                f"request {number} has {length} tokens; with max_new_tokens={new} it needs "
                f"{needed} cache slots, over this queue's {self.slots}"
            )
        if ends > self.ends:
            raise UserError(
                f"request {number}: {len(sampling.stop_token_ids)} stop_token_ids and the model's "
                f"{eos} end tokens are over this queue's {self.ends}"
            )
        sampled = sampling.temperature > 0
        options = {
            "sampled": (sampled, f"temperature={sampling.temperature}"),
            "filtered": (
                sampled and sampling.filtered,
                f"top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p}",
            ),
            "min_tokens": (
                sampling.min_new_tokens > 0,
                f"min_new_tokens={sampling.min_new_tokens}",
            ),
            "logprobs": (sampling.logprobs, "logprobs=True"),
        }
        for name, (needed_here, value) in options.items():
            if needed_here and not getattr(self, name):
                raise UserError(f"request {number}: {value} needs a queue opened with {name}=True")
