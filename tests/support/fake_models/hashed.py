"""A model whose next token is a hash of all tokens before it: exact in any batch.

Quick to compile, and every stale or misplaced cache slot shows in the text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.sampling import greedy
from orthrus_jax.model import Segment
from tests.support.configs import tiny_config
from tests.support.fake_models.lockstep import in_lockstep, views
from tests.support.fake_models.token_cache import TokenCache

VOCAB, MASK, K, LIMIT = 320, 319, 5, 512
RESULTS = 1009  # rows of the table of logits
CONFIG = tiny_config(
    vocab_size=VOCAB, mask_token_id=MASK, block_size=K, max_position_embeddings=LIMIT
)
forwards: list[str] = []  # the view of every forward that ran, where `counted`


def mixed(x):
    """A hash of uint32 to uint32, for jax and numpy alike."""
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)


def term(token, position):
    """What a token at a position adds to the hash of its text."""
    as_uint = lambda x: x.astype("uint32")
    return mixed(as_uint(token) * 0x1E3779B1 + mixed(as_uint(position) + 1))


@dataclasses.dataclass(frozen=True)
class HashModel:
    """A `decode.DecodingModel`: params["table"] float32[RESULTS, V] has the logits of each hash.

    Its diffusion view guesses the greedy text, with a mistake in about `wrong` of four rows.
    """

    config: ModelConfig = CONFIG
    counted: bool = False
    wrong: int = 1

    def init_cache(self, batch: int, slots: int) -> TokenCache:
        return TokenCache.empty(batch, slots)

    def forward(self, params, segments: list[Segment], cache: TokenCache):
        if self.counted:
            jax.debug.callback(functools.partial(forwards.append, views(segments)))
        block = functools.partial(self._block, params)
        return in_lockstep(segments, self._rows, block, cache)

    def _rows(self, segment: Segment, cache: TokenCache):
        write = jax.vmap(jax.lax.dynamic_update_slice)
        tokens = write(cache.tokens, segment.tokens, segment.positions[:, :1])
        hashes = jnp.cumsum(term(tokens, jnp.arange(tokens.shape[1])), axis=1)
        hidden = jnp.take_along_axis(hashes, segment.positions, axis=1)
        return hidden[..., None], TokenCache(tokens)

    def _block(self, params, segment: Segment, cache: TokenCache):
        at = segment.positions[:, 0]
        slots = jnp.arange(cache.tokens.shape[1])
        before = jnp.where(slots < at[:, None], term(cache.tokens, slots), 0).sum(axis=1)
        hidden = [before + term(segment.tokens[:, 0], at)]
        for j in range(1, segment.block):
            guess = greedy(self.logits(params, hidden[-1][:, None]))
            hidden.append(hidden[-1] + term(guess, at + j))
        hashes = jnp.stack(hidden, axis=1)
        masked = (segment.tokens[:, 1:] == self.config.mask_token_id).all(axis=1)
        right = (mixed(hashes + 77) % 4 >= self.wrong) & masked[:, None]
        return jnp.where(right, hashes, hashes + 5)[..., None]

    def logits(self, params, hidden):
        return params["table"][mixed(hidden[..., 0]) % RESULTS]


def greedy_text(prompt, table, budget: int, ends=(), least: int = 0) -> list[int]:
    """What greedy decoding of HashModel must give, in plain Python."""
    ids = list(prompt)
    with np.errstate(over="ignore"):
        while len(ids) < len(prompt) + budget:
            said = len(ids) - len(prompt)
            if said and ids[-1] in ends:
                break
            total = term(np.array(ids), np.arange(len(ids))).sum(dtype=np.uint32)
            row = table[mixed(total) % RESULTS].copy()
            if said < least:
                row[list(ends)] = -np.inf
            ids.append(int(row.argmax()))
    return ids[len(prompt) :]
