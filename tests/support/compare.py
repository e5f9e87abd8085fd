"""Ways to compare arrays and trees. Nothing here asserts."""

import jax
import numpy as np
from flax import traverse_util


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
