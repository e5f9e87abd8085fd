"""The dual-view transformer: one forward pass that carries segments in lockstep.

In every layer each segment attends with its own view's weights; norms, MLP and LM head are one. AR
segments write their keys and values first, then every segment reads the cache: an AR row up to and
including itself, a diffusion block strictly below its anchor, plus itself. Prefill, AR decoding,
draft, verify and the training step are this one function with different segments.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention.attend import attend, attend_blocks
from orthrus_jax.attention.cache import KVCache, LayerCache
from orthrus_jax.attention.rotary import rope_cos_sin
from orthrus_jax.config import ModelConfig
from orthrus_jax.model.layers import AttentionProjections, RMSNorm, SwiGLU, linear
from orthrus_jax.model.segment import Segment, View
from orthrus_jax.sharding import BATCH, TENSOR

Array = jax.Array
STACKED = "layers"  # where training keeps its layers' weights, stacked along a first axis
REMAT: dict[str, Any] = {  # what the backward pass finds kept of a layer; "none" keeps everything
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
Params = dict  # a Linen parameter tree; see params.py for its frozen and diffusion parts


class Layer(nn.Module):
    """One decoder layer: two attention views over one set of keys and values, and a shared MLP."""

    config: ModelConfig
    mesh: Mesh | None = None

    def setup(self) -> None:
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = AttentionProjections(self.config)
        self.self_attn_diff = AttentionProjections(self.config)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = SwiGLU(self.config)

    def __call__(
        self,
        rows: list[Array],
        segments: Sequence[Segment],
        rotary: list[tuple[Array, Array]],
        kv: LayerCache | None,
        cached: bool,
    ) -> tuple[list[Array], LayerCache | None]:
        """Move the rows [B, T, E] of all segments through the layer; return them and the new kv."""
        normed = _together(self.input_layernorm, rows, cached)
        mixed: list[Array] = [None] * len(rows)  # type: ignore[list-item]
        order = sorted(range(len(rows)), key=lambda i: segments[i].view is View.DIFFUSION)
        for i in order:  # AR first: what it writes, the blocks of this pass may read
            args = normed[i], segments[i], rotary[i], kv, cached
            if segments[i].view is View.AR:
                mixed[i], kv = self._attend_ar(*args)
            else:
                mixed[i] = self._attend_blocks(*args)
        rows = [x + y for x, y in zip(rows, mixed, strict=True)]
        out = _together(lambda x: self.mlp(self.post_attention_layernorm(x)), rows, cached)
        return [x + y for x, y in zip(rows, out, strict=True)], kv

    def _attend_ar(
        self,
        x: Array,
        segment: Segment,
        rotary: tuple[Array, Array],
        kv: LayerCache | None,
        cached: bool,
    ) -> tuple[Array, LayerCache]:
        q, k, v = self.self_attn.qkv(x, *rotary, cached)
        # Without a cache the segment's own rows are the slots.
        kv = LayerCache.of(k, v) if kv is None else kv.write(k, v, segment.positions[:, 0])
        end, used = _limits(segment, segment.positions + 1, cached)
        slots = kv.seen(segment.span)
        heads = attend(
            q, *slots, segment.start, end, used, self.mesh, segment.branches, turned=kv.turned
        )
        return self.self_attn.out(heads), kv

    def _attend_blocks(
        self,
        x: Array,
        segment: Segment,
        rotary: tuple[Array, Array],
        kv: LayerCache | None,
        cached: bool,
    ) -> Array:
        assert kv is not None, "a diffusion segment needs a cache or an AR segment to read"
        by_block = lambda x: x.reshape(x.shape[0], -1, segment.block, *x.shape[2:])
        projected = self.self_attn_diff.qkv(x, *rotary, cached)
        q, k, v = (by_block(x) for x in projected)
        start = None if segment.start is None else segment.start[:, :: segment.block]
        end, used = _limits(segment, segment.positions[:, :: segment.block], cached)
        slots = kv.seen(segment.span)
        heads = attend_blocks(
            q, *slots, k, v, start, end, used, self.mesh, segment.branches, turned=kv.turned
        )
        return self.self_attn_diff.out(heads.reshape(*x.shape[:2], *heads.shape[3:]))


def _limits(segment: Segment, end: Array, cached: bool) -> tuple[Array, Array | None]:
    """The slots below which each row or block sees all, and a bound on the slots seen."""
    if segment.branches is None:
        return end, end.max() if cached else None
    first, width = segment.branches.first, segment.branches.seen.shape[2]
    return jnp.broadcast_to(first[:, None], end.shape), first.max() + width


class DualViewTransformer(nn.Module):
    """Qwen3 with a diffusion attention beside each AR attention. Parameters have HF's names."""

    config: ModelConfig
    mesh: Mesh | None = None
    remat: str = "none"

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=c.dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        self.layers = [Layer(c, self.mesh) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size)

    def __call__(
        self, segments: Sequence[Segment], cache: KVCache | None
    ) -> tuple[list[Array], KVCache | None]:
        """See `Model.forward`."""
        # Decoding is bound by reading weights: the rows of all segments go through each matmul
        # together. Training is bound by arithmetic, and rows kept apart let the backward pass skip
        # the teacher's: it has no gradient to carry.
        cached = cache is not None
        rows = [self._embed(segment.tokens) for segment in segments]
        rotary = [self._rotary(segment.positions, cache) for segment in segments]
        if cache is None:
            rows = self._through_layers(rows, segments, rotary)
            return _together(self.norm, rows, cached), None
        kvs = []
        for i, kv in enumerate(cache.layers):
            rows, kv = self._layer(i)(rows, segments, rotary, kv, cached)
            kvs.append(kv)
        return _together(self.norm, rows, cached), cache.with_layers(kvs)

    def _layer(self, i: int) -> Callable[..., Any]:
        """Layer i; of stacked layers a slice, so that training decodes without a second copy."""
        if STACKED not in self.variables["params"]:
            return self.layers[i]
        weights = jax.tree.map(lambda x: x[i], self.variables["params"][STACKED])
        layer = Layer(self.config, self.mesh, parent=None)
        return lambda *args: layer.apply({"params": weights}, *args)

    def _through_layers(
        self, rows: list[Array], segments: Sequence[Segment], rotary: list[tuple[Array, Array]]
    ) -> list[Array]:
        """Without a cache: layers as functions of their weights, stacked ones scanned."""
        if self.is_initializing():
            for layer in self.layers:
                rows, _ = layer(rows, segments, rotary, None, False)
            return rows
        layer = Layer(self.config, self.mesh, parent=None)

        def through(rows: list[Array], weights: Params) -> tuple[list[Array], None]:
            rows, _ = layer.apply({"params": weights}, rows, segments, rotary, None, False)
            return rows, None

        if self.remat != "none":
            through = jax.checkpoint(through, policy=REMAT[self.remat])
        weights = self.variables["params"]
        if STACKED in weights:
            return jax.lax.scan(through, rows, weights[STACKED])[0]
        for i in range(self.config.num_hidden_layers):
            rows, _ = through(rows, weights[f"layers_{i}"])
        return rows

    def _embed(self, tokens: Array) -> Array:
        if self.mesh is None:
            return self.embed_tokens(tokens)
        # Said outright: left to itself, the compiler gathers the rows on every device.
        on = lambda x, *axes: jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, P(*axes))
        )
        table = on(self.embed_tokens.embedding.astype(self.config.dtype), TENSOR, None)
        return on(table[tokens], BATCH)

    def _rotary(self, positions: Array, cache: KVCache | None) -> tuple[Array, Array]:
        if cache is None:
            return rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        return cache.rotary[0][positions], cache.rotary[1][positions]

    def logits(self, hidden: Array) -> Array:
        """hidden [..., T, E] -> float32 logits [..., T, V]."""
        c = self.config
        if c.tie_word_embeddings:
            # Table first: with hidden @ table.T a whole cycle was 1.2-1.4x slower on CPU.
            table = self.embed_tokens.embedding.astype(c.dtype)
            columns = hidden.swapaxes(-1, -2)
            logits = jnp.matmul(table, columns, preferred_element_type=jnp.float32)
            return logits.swapaxes(-1, -2)
        kernel = self.lm_head.variables["params"]["kernel"].astype(c.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def touch(self, segments: Sequence[Segment]) -> None:
        """Visit every parameter once; `Model.init` runs it to make the tree."""
        hidden, _ = self(segments, None)
        if not self.config.tie_word_embeddings:
            self.lm_head(hidden[0])


def _together(function: Callable[[Array], Array], rows: list[Array], join: bool) -> list[Array]:
    """Apply a row-wise function to the rows of all segments: at once if `join`, else one by one."""
    if not join or len(rows) == 1:
        return [function(x) for x in rows]
    ends = list(itertools.accumulate(x.shape[1] for x in rows))[:-1]
    return jnp.split(function(jnp.concatenate(rows, axis=1)), ends, axis=1)


@dataclasses.dataclass(frozen=True)
class Model:
    """What decoding and training see of the network: pure functions of a parameter tree.

    Hashable, so it is a static argument of compiled functions. Nothing above this class knows which
    Flax API lies below; tests put a scripted model with the same four methods in its place.

    Attributes:
      config: sizes.
      mesh: the devices that parameters and batches lie on; None is one device.
      remat: what training recomputes in its backward pass, a name in REMAT.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    remat: str = "none"

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters of both views, the diffusion view unrelated: see params.init."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        positions = jnp.arange(2)[None]
        segments = [
            Segment(tokens, positions, View.AR),
            Segment(tokens, positions, View.DIFFUSION, block=2),
        ]
        module = DualViewTransformer(self.config)
        return module.init(key, segments, method=DualViewTransformer.touch)["params"]

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `batch` rows of `slots` positions."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        turned = device.platform != "tpu"
        cache = KVCache.zeros(self.config, batch, slots, turned, self.mesh)
        if self.mesh is None:
            return cache
        return jax.lax.with_sharding_constraint(cache, cache.shardings())

    def forward(
        self, params: Params, segments: Sequence[Segment], cache: KVCache | None
    ) -> tuple[list[Array], KVCache | None]:
        """One pass of all segments.

        Args:
          params: both views' parameters; without a cache the layers' may be stacked (params.stack).
          segments: at least one. Without a cache, the first is the AR segment the others read.
          cache: the shared cache, or None when training: then the slots are the AR segment's rows.

        Returns:
          The final-normed hidden states [B, T, E] of each segment, and the cache with the AR
          segments' rows written.
        """
        module = DualViewTransformer(self.config, self.mesh, self.remat)
        out: Any = module.apply({"params": params}, segments, cache)
        return out

    def logits(self, params: Params, hidden: Array) -> Array:
        """hidden [..., T, E] -> float32 logits [..., T, V]."""
        module = DualViewTransformer(self.config)
        out: Any = module.apply({"params": params}, hidden, method=DualViewTransformer.logits)
        return out
