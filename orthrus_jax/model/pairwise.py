"""The pairwise head: how likely a drafted token is, given the token before it.

A block guesses its positions apart. The head scores each candidate c of a position again,

    t log q(c) + <previous[p], current[c]>        p: the token before; q: the block's own guess

and "none of the candidates" by t log(1 - sum of q) + b. Two vectors of R numbers per token come
from tables over the vocabulary, or are maps of its frozen embedding. Decides nothing about text: it
only orders proposals. Knows no decoding loop and no training.
"""

from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.config import ModelConfig

Array = jax.Array
Head = dict[str, Any]  # of float32 leaves, see `shapes`
HEAD = "pairwise_head"  # its place in the tree of parameters, and the name of its file
TABLE, MAP = "table", "map"
KINDS = (TABLE, MAP)
LEAST_NORM = 1e-6  # of an embedding's mean square, added
LEAST_REST = 1e-6  # probability left to all other tokens, at least


def shapes(config: ModelConfig, kind: str, rank: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every leaf by path: [V, R] of a table, [E, R] of a map."""
    inputs = config.vocab_size if kind == TABLE else config.hidden_size
    return {
        ("previous", kind): (inputs, rank),
        ("current", kind): (inputs, rank),
        ("scale",): (),
        ("none",): (),
    }


def init(config: ModelConfig, kind: str, rank: int, key: Array) -> Head:
    """A fresh head, which scores as the block does: all `current` vectors are 0.

    The `previous` ones are small and random, so that both sides have a gradient.
    """
    of = shapes(config, kind, rank)
    spread = 0.1 if kind == TABLE else config.hidden_size**-0.5
    return {
        "previous": {kind: spread * jax.random.normal(key, of["previous", kind])},
        "current": {kind: jnp.zeros(of["current", kind])},
        "scale": jnp.ones(()),
        "none": jnp.zeros(()),
    }


def vectors(head: Head, embedding: Array | None, tokens: Array) -> tuple[Array, Array]:
    """What each token says of the next, and of itself given the one before.

    Args:
      head: of either kind.
      embedding: [V, E], frozen; read by maps alone.
      tokens: int32[...].

    Returns:
      float32[..., R] each.
    """
    previous, current = head["previous"], head["current"]
    if TABLE in previous:
        return previous[TABLE][tokens], current[TABLE][tokens]
    assert embedding is not None, "maps read the embedding"
    every = tokens.size > len(embedding)  # then each row is mapped once
    rows = (embedding if every else embedding[tokens]).astype(jnp.float32)
    rows = rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + LEAST_NORM)
    mapped = rows @ previous[MAP], rows @ current[MAP]
    return (mapped[0][tokens], mapped[1][tokens]) if every else mapped


def log_probs(head: Head, log_q: Array, pair: Array) -> tuple[Array, Array]:
    """Log-probabilities of the M candidates of a position and of "none of them".

    Args:
      head: its scale and its bias.
      log_q: float32[..., M], the block's own, of all tokens.
      pair: float32[..., M], <previous, current>; leading axes broadcast against those of log_q.

    Returns:
      float32[..., M] and [...].
    """
    rest = jnp.log(jnp.maximum(1 - jnp.exp(log_q).sum(axis=-1), LEAST_REST))
    scores = head["scale"] * log_q + pair
    none = jnp.broadcast_to(head["scale"] * rest + head["none"], scores.shape[:-1])
    mass = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), none)
    return scores - mass[..., None], none - mass
