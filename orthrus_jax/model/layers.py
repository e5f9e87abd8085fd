"""The parts of a Qwen3 layer as Flax Linen modules: norm, projections, SwiGLU.

They know nothing of caches, views or segments. Submodule names are those of the Hugging Face
checkpoint, so that a parameter's path is its name there.

Shape letters, here and everywhere: B batch, T rows of a segment, S cache slots, H query heads, G kv
heads, D head dim, K block size, A anchors (blocks), V vocabulary, E model width, F MLP width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthrus_jax.attention.rotary import apply_rope
from orthrus_jax.config import ModelConfig

Array = jax.Array


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return weight.astype(x.dtype) * x32.astype(x.dtype)


def fenced_on_tpu(x: Array) -> Array:
    """x as it is, and for the TPU's compiler the end of the product that made it.

    It would otherwise draw the split into heads into the product and want the weights transposed: a
    second copy of them all, made before each decoding loop.
    """
    fence = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, tpu=fence, default=lambda x: x)


class AttentionProjections(nn.Module):
    """One view's weights in one layer: q, k, v, o projections and the per-head q/k norms."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = linear(c, heads)
        self.k_proj = linear(c, kv_heads)
        self.v_proj = linear(c, kv_heads)
        self.o_proj = linear(c, c.hidden_size)
        self.q_norm = RMSNorm(c.rms_norm_eps)
        self.k_norm = RMSNorm(c.rms_norm_eps)

    def qkv(
        self, x: Array, cos: Array, sin: Array, cached: bool = False
    ) -> tuple[Array, Array, Array]:
        """x [B, T, E] -> normed, rotated q [B, T, H, D] and k [B, T, G, D], and v [B, T, G, D]."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if cached:
            q, k, v = (fenced_on_tpu(x) for x in (q, k, v))
        q = apply_rope(self.q_norm(q.reshape(heads)), cos, sin)
        k = apply_rope(self.k_norm(k.reshape(heads)), cos, sin)
        return q, k, v.reshape(heads)

    def out(self, attended: Array) -> Array:
        """[B, T, H, D] -> [B, T, E]."""
        return self.o_proj(attended.reshape(*attended.shape[:2], -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [B, T, E] -> [B, T, F] -> [B, T, E] (arXiv 2002.05202)."""

    config: ModelConfig

    def setup(self) -> None:
        self.gate_proj = linear(self.config, self.config.intermediate_size)
        self.up_proj = linear(self.config, self.config.intermediate_size)
        self.down_proj = linear(self.config, self.config.hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def linear(config: ModelConfig, features: int) -> nn.Dense:
    """A projection without bias in the config's dtype, kernel [in, out], Qwen3's initial scale."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=config.dtype,
        kernel_init=nn.initializers.normal(0.02),
    )
