"""Rotary position embedding: angles of positions, and heads rotated by them.

Knows no cache and no segment.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax.config import Llama3Rope

Array = jax.Array


def rope_cos_sin(
    positions: Array, head_dim: int, theta: float, scaling: Llama3Rope | None = None
) -> tuple[Array, Array]:
    """Return cos and sin, float32[..., D/2], of `positions` int32[...] (arXiv 2104.09864)."""
    frequencies = rope_frequencies(head_dim, theta, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Rope | None) -> np.ndarray:
    """Radians per position, float32[D/2].

    On the host, and rounded where transformers rounds: a last bit of a frequency is 1e-4 radians
    at position 1,000.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / (float(theta) ** exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return frequencies
    s = scaling
    waves = np.float32(2 * math.pi) / frequencies  # positions per turn
    kept = np.float32(s.original_max_position_embeddings) / waves - np.float32(s.low_freq_factor)
    kept = np.clip(kept / np.float32(s.high_freq_factor - s.low_freq_factor), 0, 1)
    return (1 - kept) * frequencies / np.float32(s.factor) + kept * frequencies


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the halves of each head, x [B, T, H, D], as Hugging Face pairs them.

    cos and sin are [B, T, D/2].
    """
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)
