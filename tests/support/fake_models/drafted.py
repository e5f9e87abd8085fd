"""The real model with drafts that a test chooses."""

import dataclasses

import jax
import jax.numpy as jnp

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Model, Segment, View


@dataclasses.dataclass(frozen=True)
class DraftedModel:
    """The real model with its diffusion view's guesses replaced by params["drafts"][b, position].

    A hidden state carries two numbers more: the guess, and 1 where it is to be used.
    """

    config: ModelConfig

    def init_cache(self, batch: int, slots: int):
        return Model(self.config).init_cache(batch, slots)

    def forward(self, params, segments: list[Segment], cache):
        hidden, cache = Model(self.config).forward(params["model"], segments, cache)
        marked = [self._mark(params, s, h) for s, h in zip(segments, hidden, strict=True)]
        return marked, cache

    def _mark(self, params, segment: Segment, hidden):
        guess = jnp.take_along_axis(params["drafts"], segment.positions + 1, axis=1)
        used = jnp.full_like(guess, segment.view is View.DIFFUSION)
        return jnp.concatenate([hidden, jnp.stack([guess, used], -1).astype(hidden.dtype)], -1)

    def logits(self, params, hidden):
        real = Model(self.config).logits(params["model"], hidden[..., :-2])
        guess = jax.nn.one_hot(hidden[..., -2].astype(jnp.int32), self.config.vocab_size)
        return jnp.where(hidden[..., -1:] == 1, guess, real)
