"""The recipe of distilled responses: `config.distill`, its values checked.

Knows no model and no files but the names of sources.
"""

import dataclasses
from typing import Any

from orthrus_jax.config import DTYPES, INT32, ModelConfig
from orthrus_jax.engine import SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.values import check_switch, check_whole, shown
from train import settings
from train.prompts import parse_source, shares

MODES = ("ar", "orthrus")  # by which the base answers; the text is the same
COUNTS = ("prompts", "max_prompt_tokens", "batch_size", "tensor", "shard_size")  # at least 1
LONGEST = 2048  # new tokens: the paper's budget, and the length of its rows


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The prompts and how to answer them: `config.distill`.

    Attributes:
      sources: pairs of a source, see prompts.parse_source, and its weight in the mix.
      prompts: total number.
      seed: of the choice and order of the prompts, and of sampling.
      max_new_tokens: per answer; a longer answer is cut off and marked truncated.
      max_prompt_tokens: longer prompts are skipped.
      thinking: let the chat template open a thinking part.
      mode: "ar" or "orthrus"; greedy text is the same in both.
      temperature, top_k, top_p: 0, 0 and 1 are greedy.
      dtype: of the weights; None is the checkpoint's.
      batch_size: answers decoded together, over all devices of this host. A resumed run may change
        it and `tensor`.
      tensor: devices per copy of the model.
      shard_size: prompts per file, and the most that a killed run loses.
    """

    sources: tuple[tuple[str, float], ...]
    prompts: int
    seed: int
    max_new_tokens: int = LONGEST
    max_prompt_tokens: int = 1024
    thinking: bool = False
    mode: str = "ar"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    dtype: str | None = None
    batch_size: int = 64
    tensor: int = 1
    shard_size: int = 4096

    def __post_init__(self) -> None:
        """Refuse values of a wrong type or out of their range.

        Raises:
          UserError: naming the value as the command line does.
        """
        object.__setattr__(self, "sources", settings.sources(self.sources, "distill.sources"))
        for name, _ in self.sources:
            parse_source(name)
        shares([weight for _, weight in self.sources], 1)
        for name in COUNTS:
            check_whole(f"distill.{name}", getattr(self, name), 1, INT32)
        check_whole("distill.max_new_tokens", self.max_new_tokens)
        if not 1 <= self.max_new_tokens <= LONGEST:
            raise UserError(
                f"distill.max_new_tokens={self.max_new_tokens} must be from 1 to {LONGEST}"
            )
        check_switch("distill.thinking", self.thinking)
        for name, choices in (("mode", MODES), ("dtype", (None, *DTYPES))):
            if (value := getattr(self, name)) not in choices:
                expected = ", ".join(map(str, choices))
                raise UserError(f"distill.{name}={shown(value)} is not one of {expected}")
        _ = self.sampling  # raises for a bad value

    @classmethod
    def of(cls, config: Any) -> "DistillConfig":
        """Read `config.distill` and `config.seed`.

        Raises:
          UserError: for a value that is missing, unknown or refused.
        """
        settings.check(config, "run", "base", "seed")
        values = dict(settings.group(config, "distill"))
        known = {field.name for field in dataclasses.fields(cls)} - {"seed"}
        if unknown := sorted(set(values) - known):
            raise UserError(f"the configuration's distill has no {', '.join(unknown)}")
        if missing := sorted({"sources", "prompts"} - set(values)):
            raise UserError(f"the configuration's distill lacks {', '.join(missing)}")
        return cls(**values, seed=config.seed + 2)  # the base was pretrained with seed and seed + 1

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters of every request."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
        )

    def room(self, model: ModelConfig) -> int:
        """The most tokens of a prompt that leave positions for an answer.

        Raises:
          UserError: when there is none.
        """
        room = model.max_position_embeddings - self.max_new_tokens
        if room < 1:
            raise UserError(
                f"distill.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the "
                f"model's {model.max_position_embeddings} positions"
            )
        return min(room, self.max_prompt_tokens)

    def shard_names(self) -> list[str]:
        """Name the files of responses, in order."""
        count = -(-self.prompts // self.shard_size)
        return [f"responses-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
