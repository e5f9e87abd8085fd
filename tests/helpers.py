"""What several test files share: tiny configurations, random weights, and ways to compare.

Weights come from numpy so that every jax version tests the same model. Nothing here asserts.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import View
from orthrus_jax.model import params as params_lib

DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
NO_EOS = jnp.array([-1, -1, -1], jnp.int32)


def slow(*values) -> list:
    """Parameters of a test that only the slow suite tries."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def tiny_config(**changes) -> ModelConfig:
    """Two layers, 64 tokens, float32; K = 4."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "eos_token_ids": (),
        "block_size": 4,
        "mask_token_id": 63,
        "dtype": "float32",
    }
    return ModelConfig(**(sizes | changes))


@functools.cache
def random_params(config: ModelConfig, seed: int, *, gain: float = 1.5, copy: bool = False) -> dict:
    """Weights far from their initial scale: N(0, gain / sqrt(inputs)), norms in [0.5, 1.5].

    With `copy` the diffusion view is a copy of the AR view; otherwise it has weights of its own.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in sorted(params_lib.shapes(config).items()):
        if path[-1] == "weight":
            value = rng.uniform(0.5, 1.5, shape)
        elif path[-1] == "embedding":
            value = rng.normal(0, 1, shape)
        else:
            value = rng.normal(0, gain / shape[0] ** 0.5, shape)
        flat[path] = jnp.asarray(value, jnp.float32)
    whole = traverse_util.unflatten_dict(flat)
    if not copy:
        return whole
    return params_lib.merge(params_lib.split(whole)[0], params_lib.diffusion_from_base(whole))


def in_lockstep(segments, rows, block, cache):
    """Run a mock model's segments as the real layers do: what AR rows write, blocks may read.

    `rows(segment, cache)` gives hidden states and the new cache of an AR segment, `block` the
    hidden states of a segment that is one block.
    """
    hidden = [None] * len(segments)
    for i, segment in enumerate(segments):
        if segment.view is View.AR:
            hidden[i], cache = rows(segment, cache)
    for i, segment in enumerate(segments):
        if segment.view is View.DIFFUSION:
            hidden[i] = jnp.concatenate([block(part, cache) for part in blocks(segment)], axis=1)
    return hidden, cache


def blocks(segment):
    """A segment of several blocks as one segment per block."""
    for i in range(segment.tokens.shape[1] // segment.block):
        at = slice(i * segment.block, (i + 1) * segment.block)
        tree_mask = segment.tree_mask
        if tree_mask is not None:
            tree_mask = tree_mask.replace(mask=tree_mask.mask[:, i : i + 1])
        tokens, positions = segment.tokens[:, at], segment.positions[:, at]
        yield segment.replace(tokens=tokens, positions=positions, tree_mask=tree_mask)


def views(segments) -> str:
    """The views of a forward's segments, as in "ar+diffusion"."""
    return "+".join(segment.view.value for segment in segments)


def flat(tree: dict) -> dict[str, jax.Array]:
    """A nested tree as {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def relative_error(value, reference) -> float:
    """max |value - reference| / max |reference|; 0 where they are equal, both 0 included."""
    value, reference = np.asarray(value), np.asarray(reference)
    error = np.abs(value - reference).max()
    return float(error and error / np.abs(reference).max())


def same_bits(a, b) -> bool:
    """Whether two arrays are equal in every bit."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
