"""A model that is two tables: so small that every text it can say is known, with its probability.

It is sampled from, where scripted.py's model is followed. It reads its cache as the real one does:
an AR row's logits depend on its position, its token and the sum of the tokens in all slots up to
its own, so one stale slot gives another distribution. The parameters are

  ar[p, s, t]        float32[VOCAB], for the row at position p with token t; s is the sum with t
  block[j, p, s, t]  the same for row j of a diffusion block whose anchor t is at position p

and hidden states are the logits. Sums are modulo SUMS; the mask is never said.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Segment, pairwise
from orthrus_jax.model.pairwise import HEAD
from tests.support.configs import tiny_config
from tests.support.fake_models.lockstep import in_lockstep
from tests.support.fake_models.token_cache import TokenCache, seen_tokens

VOCAB, MASK, EOS, SUMS, POSITIONS = 5, 4, 3, 2, 16
TEXT = np.arange(VOCAB) != MASK
SMALL = tiny_config(vocab_size=VOCAB, mask_token_id=MASK, block_size=4)
# For each of `block`'s rows, the position of the AR row that says the same position's token.
_SAME = np.minimum(np.arange(POSITIONS) + np.arange(SMALL.block_size)[:, None], POSITIONS - 1)


@dataclasses.dataclass(frozen=True)
class TabularModel:
    """`decode.DecodingModel` by table. Another `name` is another program: for planted faults."""

    config: ModelConfig = SMALL
    name: str = ""

    def init_cache(self, batch: int, slots: int) -> TokenCache:
        return TokenCache.empty(batch, slots)

    def forward(self, params, segments: list[Segment], cache: TokenCache):
        own = functools.partial
        return in_lockstep(segments, own(self._rows, params), own(self._block, params), cache)

    def _rows(self, params, segment: Segment, cache: TokenCache):
        at, write = segment.positions, jax.vmap(jax.lax.dynamic_update_slice)
        cache = TokenCache(write(cache.tokens, segment.tokens, at[:, :1]))
        sums = _sum(cache, at + 1, segment)
        return params["ar"][at, sums % SUMS, segment.tokens], cache

    def _block(self, params, segment: Segment, cache: TokenCache):
        at = segment.positions
        anchor, first, row = segment.tokens[:, :1], at[:, :1], jnp.arange(at.shape[1])
        sums = _sum(cache, first, segment) + anchor
        logits = params["block"][row, first, sums % SUMS, anchor]
        masked = (segment.tokens[:, 1:] == MASK).all(1)
        return jnp.where(masked[:, None, None], logits, 0.0)

    def logits(self, params, hidden):
        return hidden

    def pair_vectors(self, params, tokens, positions):
        return pairwise.vectors(params[HEAD], None, tokens)


def _sum(cache: TokenCache, ends: jax.Array, segment: Segment) -> jax.Array:
    """int32[B, T]: the sum of the tokens that each row or block sees."""
    tokens, count = seen_tokens(cache, ends, segment.tree_mask)
    return jnp.where(jnp.arange(tokens.shape[2]) < count[..., None], tokens, 0).sum(axis=2)


def tables(seed: int) -> dict[str, np.ndarray]:
    """Parameters with every relation of q to p: equal, near, unlike, and of disjoint support.

    At every third position the AR view looks at its position alone, so that a draft further on
    than the first can also have q = p. Some contexts forbid one or two tokens.
    """
    rng = np.random.default_rng(seed)
    ar = rng.normal(0, 1.2, (POSITIONS, SUMS, VOCAB, VOCAB))
    ar[..., EOS] -= 1
    forbids = rng.integers(0, 4, ar.shape[:-1])  # 0: nothing; 1 and 2: that token; 3: both
    ar[..., 1][forbids & 1 > 0] = -np.inf
    ar[..., 2][forbids & 2 > 0] = -np.inf
    ar[..., MASK] = -np.inf
    ar[::3] = ar[::3, :1, :1]

    same = ar[_SAME]
    unlike = np.where(TEXT, rng.normal(0, 1.5, same.shape), -np.inf)
    near = same + rng.normal(0, 0.4, same.shape)
    forbidden = np.isinf(same) & TEXT
    disjoint = np.where(forbidden, unlike, -np.inf)
    disjoint = np.where(forbidden.any(-1, keepdims=True), disjoint, unlike)
    kind = rng.choice(4, same.shape[:-1], p=[0.3, 0.25, 0.35, 0.1])[..., None]
    block = np.select([kind == 0, kind == 1, kind == 2], [same, near, unlike], disjoint)
    return {"ar": ar.astype(np.float32), "block": block.astype(np.float32)}


def agreeing(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same parameters with a context-free AR view and q = p everywhere."""
    ar = np.broadcast_to(params["ar"][:, :1, :1], params["ar"].shape)
    return {"ar": ar, "block": ar[_SAME]}


def contrary(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same AR view, with a q that is all but certain of its second likeliest token.

    Few drafts are accepted, and what the verdict accepts in excess shows most.
    """
    same = params["ar"][_SAME]
    order = same.argsort(-1)[..., ::-1]
    second = np.arange(VOCAB) == order[..., 1:2]
    return {"ar": params["ar"], "block": np.where(second, same.max(-1, keepdims=True) + 2.5, same)}


class Setting(NamedTuple):
    """How one row is decoded: what sampling.Sampler and decode.prefill are told of it."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    prompt: tuple[int, ...] = (1, 2)
    min_tokens: int = 0


def processed(logits, setting: Setting) -> np.ndarray:
    """The distribution one row of logits [V] is sampled from, in float64, as HF `generate` has it.

    Each filter keeps what equals the last value it keeps.
    """
    logits = np.asarray(logits, np.float64)
    if setting.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    probs = softmax(logits / setting.temperature)
    if setting.top_k:
        probs = np.where(probs >= np.sort(probs)[::-1][: setting.top_k][-1], probs, 0)
    if setting.top_p < 1:
        likeliest = np.sort(probs)[::-1]
        mass = likeliest.cumsum() / likeliest.sum()
        probs = np.where(probs >= likeliest[(mass < setting.top_p).sum()], probs, 0)
    probs = np.where(probs >= setting.min_p * probs.max(), probs, 0)
    return probs / probs.sum()


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def law(params: dict[str, np.ndarray], setting: Setting, tokens: int) -> np.ndarray:
    """float64[VOCAB ** tokens]: the probability of every text of so many tokens, by its `code`."""

    @functools.cache
    def step(position: int, total: int, last: int, early: bool) -> np.ndarray:
        logits = params["ar"][position, total, last].copy()
        if early:
            logits[EOS] = -np.inf
        return processed(logits, setting)

    whole = np.zeros(VOCAB**tokens)

    def walk(text: tuple[int, ...], probability: float) -> None:
        if len(text) == tokens or text[-1:] == (EOS,):
            padded = np.array([*text, *[MASK] * (tokens - len(text))])
            whole[code(padded)] = probability
            return
        seen = setting.prompt + text
        chances = step(len(seen) - 1, sum(seen) % SUMS, seen[-1], len(text) < setting.min_tokens)
        for token in np.flatnonzero(chances):
            walk((*text, int(token)), probability * chances[token])

    walk((), 1.0)
    return whole


def code(texts: np.ndarray) -> np.ndarray:
    """Number the texts [..., N], which are padded with MASK behind their end."""
    return (texts * VOCAB ** np.arange(texts.shape[-1])).sum(-1)
