"""The parts of a decoder layer as Flax Linen modules: norm, projections, SwiGLU.

The config's switches are honoured here. Knows no caches, views or segments. Submodules bear Hugging
Face's names, so that a parameter's path is its name in a checkpoint.

Shape letters, here and everywhere: B batch, T rows of a segment, S cache slots, H query heads, G kv
heads, D head dim, K block size, A anchors (blocks), V vocabulary, E model width, F MLP width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthrus_jax.attention.rotary import apply_rope
from orthrus_jax.config import ModelConfig
from orthrus_jax.model.linear import Linear

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


def barrier_on_tpu(x: Array) -> Array:
    """Identity; on TPU an optimisation barrier.

    XLA would otherwise fuse the split into heads with the projection and transpose the weights: a
    second copy of all of them, made before each decoding loop.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, tpu=barrier, default=lambda x: x)


class AttentionProjections(nn.Module):
    """One view's weights in one layer: q, k, v, o projections, per-head q/k norms if `qk_norm`."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = linear(c, heads, bias=c.attention_bias)
        self.k_proj = linear(c, kv_heads, bias=c.attention_bias)
        self.v_proj = linear(c, kv_heads, bias=c.attention_bias)
        self.o_proj = linear(c, c.hidden_size)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.rms_norm_eps)
            self.k_norm = RMSNorm(c.rms_norm_eps)

    def qkv(
        self, x: Array, cos: Array, sin: Array, cached: bool = False
    ) -> tuple[Array, Array, Array]:
        """x [B, T, E] -> rotated q [B, T, H, D] and k [B, T, G, D], and v [B, T, G, D].

        `cos` and `sin` are [B, T, D/2]; `cached` says that the forward decodes over a cache.
        """
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if cached:
            q, k, v = (barrier_on_tpu(x) for x in (q, k, v))
        q, k, v = (x.reshape(heads) for x in (q, k, v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

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


def linear(config: ModelConfig, features: int, *, bias: bool = False) -> Linear:
    """Make a projection to `features` in the config's dtype. The only place that creates one."""
    return Linear(features, use_bias=bias, dtype=config.dtype)
