"""Audits of tiny models, and the faults that an audit must find.

The diffusion view of each model is untrained: a copy of the AR attention, or random. A fault is
traced into programs of its own, because each model has its own config: they differ in
`max_position_embeddings`, which nothing computes with.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from eval.audit import Options
from eval.lossless import audit
from orthrus_jax.attention import cache
from orthrus_jax.decoding import Acceptance
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.weights import random_params

EOS, K = 5, 4
NAMES = itertools.count(1000)
PROMPTS = [
    row[:length].tolist()
    for row, length in zip(
        np.random.default_rng(0).integers(0, 63, (8, 12)), [1, 2, 3, 5, 7, 9, 11, 12], strict=True
    )
]
TOKENS = {"max_new_tokens": 48, "batch_size": 8}
# More texts than rows: rows are refilled.
SAMPLED = {**TOKENS, "batch_size": 32, "seeds": 6, "temperature": 2.0}


def tiny_model(*, view: str = "copy", **changes) -> LLM:
    config = tiny_config(
        **{"num_hidden_layers": 1, "eos_token_ids": (EOS,), **changes},
        max_position_embeddings=next(NAMES),
    )
    weights = random_params(config, 0, copy=view == "copy")
    return LLM(config, jax.tree.map(lambda x: x.astype(config.dtype), weights))


def audited(*parts: str, model: LLM | None = None, **options) -> dict:
    some = SAMPLED if "rejection" in parts else TOKENS
    if model is None:
        # A tied head repeats its tokens: good drafts, but distributions that hardly differ from
        # one position to the next.
        model = tiny_model(tie_word_embeddings="rejection" not in parts)
    return audit(model, PROMPTS, Options(parts=parts, **{**some, **options}))


def always_accept_equal(drafts, predicted) -> Acceptance:
    tokens = jnp.concatenate([drafts, predicted[:, -1:]], axis=1)
    return Acceptance(tokens, jnp.full(len(drafts), drafts.shape[1]))


write = cache.LayerCache.write


def written_late(kv, k, v, start):
    """Only the rows of a block, which verify writes."""
    return write(kv, k, v, start + (k.shape[1] == K))


def accepted_drafts_not_written(kv, k, v, start):
    some = slice(0, 1) if k.shape[1] == K else slice(None)
    return write(kv, k[:, some], v[:, some], start)
