"""Rotary position embedding: angles of positions, and heads rotated by them.

Knows no cache, no segment and no config.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def rope_cos_sin(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Return cos and sin, float32[..., D/2], of `positions` int32[...] (arXiv 2104.09864)."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each head's halves, as Qwen pairs them: x [B, T, H, D] by cos, sin [B, T, D/2]."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)
