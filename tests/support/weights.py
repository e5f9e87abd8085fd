"""Random weights, from numpy, so that every jax version tests the same model."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import params as params_lib
from orthrus_jax.model.pairwise import TABLE, Head, shapes


@functools.cache
def random_params(config: ModelConfig, seed: int, *, gain: float = 1.5, copy: bool = False) -> dict:
    """Weights far from their initial scale: N(0, gain / sqrt(inputs)), norms in [0.5, 1.5].

    With `copy` the diffusion view is a copy of the AR view; otherwise it has weights of its own.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in sorted(params_lib.shapes(config).items()):
        if path[-1] == "embedding":
            value = rng.normal(0, 1, shape)
        elif path[-1] == "bias":
            value = rng.normal(0, gain / shape[0] ** 0.5, shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, gain / shape[1] ** 0.5, shape[::-1]).T
        flat[path] = jnp.asarray(value, jnp.float32)
    whole = traverse_util.unflatten_dict(flat)
    if not copy:
        return whole
    return params_lib.merge(params_lib.split(whole)[0], params_lib.diffusion_from_base(whole))


@functools.cache
def random_head(config: ModelConfig, seed: int, *, kind: str = TABLE, gain: float = 1.0) -> Head:
    """A pairwise head of rank 3 that orders candidates otherwise than the block does."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in shapes(config, kind, 3).items():
        value = rng.normal(0, gain / (shape[0] ** 0.5 if kind != TABLE and shape else 1), shape)
        flat[path] = jnp.asarray(value if shape else 1.3, jnp.float32)
    return traverse_util.unflatten_dict(flat)
