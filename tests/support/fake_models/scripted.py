"""A model whose text and drafts are a script: every accept and reject path, exact and instant.

It reads its cache as the real one does, so a stale or misplaced slot shows in the text: an AR row
predicts the script only where every token it sees is the script's. The parameters are

  text[b, p]    the token at position p of row b, prompt included, that AR decoding gives
  drafts[b, p]  what the diffusion view guesses for position p

and hidden states are [B, T, 1], the predicted ids.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Segment
from tests.support.configs import tiny_config
from tests.support.fake_models.lockstep import in_lockstep, views
from tests.support.fake_models.token_cache import TokenCache, seen_tokens

VOCAB, POISON, MASK = 64, 62, 63
forwards: list[str] = []  # the views of every forward that ran, where `counted`
traces: list[str] = []  # the views of every forward that was traced


@dataclasses.dataclass(frozen=True)
class ScriptedModel:
    """`decode.DecodingModel` by script. `counted` appends each forward that runs to `forwards`."""

    config: ModelConfig = dataclasses.field(default_factory=tiny_config)
    counted: bool = False

    def init_cache(self, batch: int, slots: int) -> TokenCache:
        return TokenCache.empty(batch, slots)

    def forward(self, params, segments: list[Segment], cache: TokenCache):
        traces.append(views(segments))
        if self.counted:
            jax.debug.callback(functools.partial(forwards.append, views(segments)))
        own = functools.partial
        return in_lockstep(segments, own(self._ar, params), own(self._block, params), cache)

    def _ar(self, params, segment: Segment, cache: TokenCache):
        """The script's next token; off the script, the draft: agreement after a miss is a trap."""
        write = jax.vmap(jax.lax.dynamic_update_slice)
        cache = TokenCache(write(cache.tokens, segment.tokens, segment.positions[:, :1]))
        after = segment.positions + 1
        faithful = self._faithful(params, cache, after, segment)
        text = jnp.take_along_axis(params["text"], after, axis=1)
        trap = jnp.take_along_axis(params["drafts"], after, axis=1)
        return jnp.where(faithful, text, trap)[..., None], cache

    def _faithful(self, params, cache: TokenCache, ends, segment: Segment):
        """Whether each row or block sees the script's tokens, `ends` of them, and nothing else."""
        tokens, count = seen_tokens(cache, ends, segment.branches)
        slots = jnp.arange(tokens.shape[2])
        right = (tokens == params["text"][:, None, : tokens.shape[2]]) | (slots >= ends[..., None])
        return right.all(axis=2) & (count == jnp.minimum(ends, tokens.shape[2]))

    def _block(self, params, segment: Segment, cache: TokenCache):
        """The scripted drafts, if the block is [anchor, MASK ...] behind a faithful cache."""
        anchor_at = segment.positions[:, :1]
        faithful = self._faithful(params, cache, anchor_at, segment)
        right_anchor = segment.tokens[:, :1] == jnp.take_along_axis(params["text"], anchor_at, 1)
        masked = (segment.tokens[:, 1:] == self.config.mask_token_id).all(1, keepdims=True)
        drafts = jnp.take_along_axis(params["drafts"], segment.positions + 1, axis=1)
        return jnp.where(faithful & right_anchor & masked, drafts, POISON)[..., None]

    def logits(self, params, hidden):
        """The id that `hidden` says; next to it the one that `drafts_agreeing` made it from."""
        said = hidden[..., 0]
        return 3 * jax.nn.one_hot(said, VOCAB) + 2 * jax.nn.one_hot((said - 17) % 51 + 10, VOCAB)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What decoding one row must give, told in plain Python."""

    tokens: list[int]
    accepted: list[int]
    position: int

    @property
    def cycles(self) -> int:
        return len(self.accepted)


def expected(text, drafts, length: int, budget: int, eos, *, room: int, block_size: int) -> Outcome:
    """The paper's loop for one row of `length` prompt tokens that may hold `room` more."""
    budget = min(budget, room)
    if budget <= 0:
        return Outcome([], [], length - 1)
    tokens, accepted = [int(text[length])], []
    while len(tokens) < budget and tokens[-1] not in eos:
        at = length + len(tokens)  # the first position not yet known
        agreeing = 0
        while agreeing < block_size - 1 and drafts[at + agreeing] == text[at + agreeing]:
            agreeing += 1
        emitted = 0
        for token in map(int, text[at : at + agreeing + 1]):
            tokens.append(token)
            emitted += 1
            if len(tokens) == budget or token in eos:
                break
        accepted.append(min(agreeing, emitted))
    return Outcome(tokens, accepted, length - 1 + len(tokens))


def expected_ahead(
    text, drafts, length: int, budget: int, eos, *, room: int, block_size: int, early: int
) -> Outcome:
    """One forward a cycle for one row, told plainly.

    Every guess of the script is trusted equally and little, so that the blocks run are those for
    0, 1, ... early - 1 drafts standing. There is no draft behind the prompt but tokens 0.
    """
    budget = min(budget, room)
    if budget <= 0:
        return Outcome([], [], length - 1)
    tokens, accepted, draft = [int(text[length])], [], [0] * (block_size - 1)
    while len(tokens) < budget and tokens[-1] not in eos:
        at = length + len(tokens)
        agreeing = 0
        while agreeing < block_size - 1 and draft[agreeing] == text[at + agreeing]:
            agreeing += 1
        emitted = 0
        for token in map(int, text[at : at + agreeing + 1]):
            tokens.append(token)
            emitted += 1
            if len(tokens) == budget or token in eos:
                break
        accepted.append(min(agreeing, emitted))
        behind = at + agreeing + 1  # the first position that the next draft is for
        spent = max(1, agreeing - (early - 1) + 1)  # rows of the deepest block on the way
        draft = [int(t) for t in drafts[behind : behind + block_size - spent]]
        draft += [0] * (block_size - 1 - len(draft))
    return Outcome(tokens, accepted, length - 1 + len(tokens))


def plain_text(rows: int, width: int, seed: int = 0, low: int = 10) -> np.ndarray:
    """int32[rows, width] of tokens low ... 60: ids below `low` are free to serve as EOS."""
    return np.random.default_rng(seed).integers(low, 61, (rows, width)).astype(np.int32)


def drafts_agreeing(text: np.ndarray, agree) -> np.ndarray:
    """Drafts equal to `text` where `agree`, and another token elsewhere."""
    return np.where(agree, text, (text - 10 + 7) % 51 + 10).astype(np.int32)
