"""The dual-view transformer: one forward pass that carries segments in lockstep.

In every layer each segment attends with its own view's weights; norms, MLP and LM head are one. AR
segments write their keys and values first, then every segment reads the cache: an AR row up to and
including itself, a diffusion block strictly below its anchor, plus itself. Prefill, AR decoding,
draft, verify and the training step are this one function with different segments.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orthrus_jax.attention.attend import (
    attend,
    attend_blocks,
    default_implementation,
    implementation_of,
)
from orthrus_jax.attention.cache import KVCache, LayerCache
from orthrus_jax.attention.kv_config import KVCacheConfig
from orthrus_jax.attention.quantised import QuantisedCache, QuantisedLayer
from orthrus_jax.attention.rotary import rope_cos_sin
from orthrus_jax.config import ModelConfig
from orthrus_jax.model import pairwise
from orthrus_jax.model.layers import (
    AttentionProjections,
    RMSNorm,
    SwiGLU,
    linear,
)
from orthrus_jax.model.linear import least_rows, rows_times
from orthrus_jax.model.segment import Segment, View, padded
from orthrus_jax.sharding import BATCH, TENSOR

Array = jax.Array
STACKED = "layers"  # training keeps its layers' weights here, stacked along a first axis
REMAT: dict[str, Any] = {  # which results of a layer the backward pass keeps; "none" keeps all
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
AnyCache = KVCache | QuantisedCache
AnyLayer = LayerCache | QuantisedLayer
Params = dict  # a Linen parameter tree; see params.py for its frozen and diffusion parts


class Layer(nn.Module):
    """One decoder layer: two attention views over one set of keys and values, and a shared MLP."""

    config: ModelConfig
    mesh: Mesh | None = None
    attention: str = "xla"

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
        kv: AnyLayer | None,
        cached: bool,
    ) -> tuple[list[Array], AnyLayer | None]:
        """Move the rows [B, T, E] of all segments through the layer; return them and the new kv."""
        normed = apply_rowwise(self.input_layernorm, rows, cached)
        attended: list[Array] = [None] * len(rows)  # type: ignore[list-item]
        order = sorted(range(len(rows)), key=lambda i: segments[i].view is View.DIFFUSION)
        for i in order:  # AR first: the blocks of this pass may read the slots it writes
            args = normed[i], segments[i], rotary[i], kv, cached
            if segments[i].view is View.AR:
                attended[i], kv = self._attend_ar(*args)
            else:
                attended[i] = self._attend_blocks(*args)
        rows = [x + y for x, y in zip(rows, attended, strict=True)]
        out = apply_rowwise(lambda x: self.mlp(self.post_attention_layernorm(x)), rows, cached)
        return [x + y for x, y in zip(rows, out, strict=True)], kv

    def _attend_ar(
        self,
        x: Array,
        segment: Segment,
        rotary: tuple[Array, Array],
        kv: AnyLayer | None,
        cached: bool,
    ) -> tuple[Array, AnyLayer]:
        q, k, v = self.self_attn.qkv(x, *rotary, cached)
        # Without a cache the segment's own rows are the slots.
        new = k.shape[1] - segment.padding
        first = segment.positions[:, 0]
        kv = LayerCache.from_rows(k, v) if kv is None else kv.write(k[:, :new], v[:, :new], first)
        end, kv_len = _limits(segment, segment.positions + 1, cached)
        heads = attend(q, kv, segment.start, end, kv_len, **self._options(segment))
        return self.self_attn.out(heads), kv

    def _attend_blocks(
        self,
        x: Array,
        segment: Segment,
        rotary: tuple[Array, Array],
        kv: AnyLayer | None,
        cached: bool,
    ) -> Array:
        assert kv is not None, "a diffusion segment needs a cache or an AR segment to read"
        by_block = lambda x: x.reshape(x.shape[0], -1, segment.block, *x.shape[2:])
        projected = self.self_attn_diff.qkv(x, *rotary, cached)
        q, k, v = (by_block(x) for x in projected)
        start = None if segment.start is None else segment.start[:, :: segment.block]
        end, kv_len = _limits(segment, segment.positions[:, :: segment.block], cached)
        heads = attend_blocks(q, kv, k, v, start, end, kv_len, **self._options(segment))
        return self.self_attn_diff.out(heads.reshape(*x.shape[:2], *heads.shape[3:]))

    def _options(self, segment: Segment) -> dict[str, Any]:
        return {
            "max_kv_len": segment.max_kv_len,
            "tree_mask": segment.tree_mask,
            "mesh": self.mesh,
            "implementation": self.attention,
        }


def _limits(segment: Segment, end: Array, cached: bool) -> tuple[Array, Array | None]:
    """Each row or block sees all slots below `end`; no row sees one from `kv_len` on."""
    if segment.tree_mask is None:
        return end, end.max() if cached else None
    first, width = segment.tree_mask.first, segment.tree_mask.mask.shape[2]
    return jnp.broadcast_to(first[:, None], end.shape), first.max() + width


class DualViewTransformer(nn.Module):
    """A decoder with a diffusion attention beside each AR attention. Names are Hugging Face's."""

    config: ModelConfig
    mesh: Mesh | None = None
    remat: str = "none"
    attention: str = "xla"

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=c.dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        self.layers = [Layer(c, self.mesh, self.attention) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = linear(c, c.vocab_size)

    def __call__(
        self, segments: Sequence[Segment], cache: AnyCache | None, taps: tuple[int, ...] = ()
    ) -> tuple[Any, ...]:
        """See `Model.forward`."""
        short = segments[0]
        least = -(-least_rows(self.mesh) // short.tokens.shape[0])
        alone = len(segments) == 1 and short.view is View.AR and short.tree_mask is None
        if cache is not None and alone and short.tokens.shape[1] < least:
            (hidden,), *rest = self([padded(short, least)], cache, taps)
            # Unfenced, the compiler might narrow the products again.
            only = lambda x: jax.lax.optimization_barrier(x)[:, : short.tokens.shape[1]]
            return ([only(hidden)], rest[0], *jax.tree.map(only, rest[1:]))
        # Decoding is bound by reading weights: the rows of all segments go through each matmul
        # together. Training is bound by arithmetic: kept apart, the teacher's rows have no gradient
        # and the backward pass skips them.
        cached = cache is not None
        rows = [self._embed(segment.tokens) for segment in segments]
        rotary = [self._rotary(segment.positions, cache) for segment in segments]
        tapped: dict[int, Array] = {}
        if cache is None:
            rows, tapped = self._through_layers(rows, segments, rotary, taps)
        else:
            kvs = []
            for i, kv in enumerate(cache.layers):
                rows, kv = self._layer(i)(rows, segments, rotary, kv, cached)
                kvs.append(kv)
                if i in taps:
                    tapped[i] = _ar_rows(rows, segments)
            cache = cache.with_layers(kvs)
        hidden = apply_rowwise(self.norm, rows, cached)
        return (hidden, cache, tuple(tapped[i] for i in taps)) if taps else (hidden, cache)

    def _layer(self, i: int) -> Callable[..., Any]:
        """Layer i; of stacked layers a slice, so that training decodes without a second copy."""
        if STACKED not in self.variables["params"]:
            return self.layers[i]
        weights = jax.tree.map(lambda x: x[i], self.variables["params"][STACKED])
        layer = self._unbound_layer()
        return lambda *args: layer.apply({"params": weights}, *args)

    def _unbound_layer(self) -> Layer:
        """A layer as a function of weights passed to it."""
        return Layer(self.config, self.mesh, self.attention, parent=None)

    def _through_layers(
        self,
        rows: list[Array],
        segments: Sequence[Segment],
        rotary: list[tuple[Array, Array]],
        taps: tuple[int, ...],
    ) -> tuple[list[Array], dict[int, Array]]:
        """Without a cache: layers as functions of their weights, stacked ones scanned."""
        if self.is_initializing():
            for layer in self.layers:
                rows, _ = layer(rows, segments, rotary, None, False)
            return rows, {}
        layer = self._unbound_layer()

        def through(rows: list[Array], weights: Params) -> tuple[list[Array], None]:
            rows, _ = layer.apply({"params": weights}, rows, segments, rotary, None, False)
            return rows, None

        if self.remat != "none":
            through = jax.checkpoint(through, policy=REMAT[self.remat])
        weights = self.variables["params"]
        if STACKED in weights and taps:
            return _scan_with_taps(through, rows, weights[STACKED], segments, taps)
        if STACKED in weights:
            return jax.lax.scan(through, rows, weights[STACKED])[0], {}
        tapped: dict[int, Array] = {}
        for i in range(self.config.num_hidden_layers):
            rows, _ = through(rows, weights[f"layers_{i}"])
            if i in taps:
                tapped[i] = _ar_rows(rows, segments)
        return rows, tapped

    def _embed(self, tokens: Array) -> Array:
        if self.mesh is None:
            return self.embed_tokens(tokens)
        # Explicit constraints: without them, the compiler gathers all rows on every device.
        on = lambda x, *axes: jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, P(*axes))
        )
        table = on(self.embed_tokens.embedding.astype(self.config.dtype), TENSOR, None)
        return on(table[tokens], BATCH)

    def _rotary(self, positions: Array, cache: AnyCache | None) -> tuple[Array, Array]:
        if cache is None:
            c = self.config
            return rope_cos_sin(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        return cache.rotary[0][positions], cache.rotary[1][positions]

    def logits(self, hidden: Array) -> Array:
        """hidden [..., T, E] -> float32 logits [..., T, V]."""
        tied = self.config.tie_word_embeddings
        weight = self.embed_tokens.embedding if tied else self.lm_head.variables["params"]["weight"]
        return rows_times(hidden, weight.astype(self.config.dtype), jnp.float32)

    def init_params(self, segments: Sequence[Segment]) -> None:
        """Visit every parameter once; `Model.init` runs it to make the tree."""
        hidden, _ = self(segments, None)
        if not self.config.tie_word_embeddings:
            self.lm_head(hidden[0])


def apply_rowwise(function: Callable[[Array], Array], rows: list[Array], join: bool) -> list[Array]:
    """Apply a row-wise function to the rows of all segments: at once if `join`, else one by one."""
    if not join or len(rows) == 1:
        return [function(x) for x in rows]
    ends = list(itertools.accumulate(x.shape[1] for x in rows))[:-1]
    return jnp.split(function(jnp.concatenate(rows, axis=1)), ends, axis=1)


def _ar_rows(rows: list[Array], segments: Sequence[Segment]) -> Array:
    """The rows of the AR segments, joined along T."""
    parts = [x for x, segment in zip(rows, segments, strict=True) if segment.view is View.AR]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _scan_with_taps(
    through: Callable[[list[Array], Params], tuple[list[Array], None]],
    rows: list[Array],
    weights: Params,
    segments: Sequence[Segment],
    taps: tuple[int, ...],
) -> tuple[list[Array], dict[int, Array]]:
    """Scan over stacked layers, and keep the AR rows after those of `taps`.

    One scan: scans between the taps would each need their slice of the weights, a copy.
    """

    def step(carry: tuple[Any, Any], layer: tuple[Array, Params]) -> tuple[tuple[Any, Any], None]:
        rows, tapped = carry
        i, weights = layer
        rows, _ = through(rows, weights)
        here = _ar_rows(rows, segments)
        return (rows, {tap: jnp.where(i == tap, here, x) for tap, x in tapped.items()}), None

    tapped = {tap: jnp.zeros_like(_ar_rows(rows, segments)) for tap in taps}
    layers = jnp.arange(jax.tree.leaves(weights)[0].shape[0])
    (rows, tapped), _ = jax.lax.scan(step, (rows, tapped), (layers, weights))
    return rows, tapped


@dataclasses.dataclass(frozen=True)
class Model:
    """The network as decoding and training use it: pure functions of a parameter tree.

    Hashable, so it is a static argument of compiled functions. Nothing above this class knows which
    Flax API lies below; tests put a scripted model with the same four methods in its place.

    Attributes:
      config: sizes.
      mesh: the devices that parameters and batches lie on; None is one device.
      remat: how much training recomputes in its backward pass, a name in REMAT.
      attention: the implementation, a name in attention.attend.IMPLEMENTATIONS; None becomes the
        one that suits the devices.
      kv_cache: a quantised cache; None is one in the config's dtype.

    Raises:
      UserError: for an unknown attention, listing the known ones, or heads that a quantised cache
        cannot hold.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    remat: str = "none"
    attention: str | None = None
    kv_cache: KVCacheConfig | None = None

    def __post_init__(self) -> None:
        if self.attention is None:
            object.__setattr__(self, "attention", default_implementation(self.mesh))
        implementation_of(self.attention or "")
        if self.kv_cache is not None:
            self.kv_cache.check(self.config)

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters of both views, the diffusion view unrelated: see params.init."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        positions = jnp.arange(2)[None]
        segments = [
            Segment(tokens, positions, View.AR),
            Segment(tokens, positions, View.DIFFUSION, block=2),
        ]
        module = DualViewTransformer(self.config)
        return module.init(key, segments, method=DualViewTransformer.init_params)["params"]

    def init_cache(self, batch: int, slots: int) -> AnyCache:
        """An empty cache for `batch` rows of `slots` positions.

        With so few that none would be read quantised it is the usual one.
        """
        cache: AnyCache
        if self.kv_cache is not None and self.kv_cache.worthwhile(slots):
            of = self.config, batch, slots, self.kv_cache
            cache = QuantisedCache.zeros(*of, mesh=self.mesh)
        else:
            cache = KVCache.zeros(self.config, batch, slots, mesh=self.mesh)
        if self.mesh is None:
            return cache
        return jax.lax.with_sharding_constraint(cache, cache.shardings())

    def forward(
        self,
        params: Params,
        segments: Sequence[Segment],
        cache: AnyCache | None,
        taps: tuple[int, ...] = (),
    ) -> Any:
        """One pass of all segments.

        Args:
          params: both views' parameters; without a cache the layers' may be stacked (params.stack).
          segments: at least one. Without a cache, the first is the AR segment the others read.
          cache: the shared cache, or None when training: then the slots are the AR segment's rows.
          taps: numbers of layers from 0 on, static. A drafter that reads the base's features asks
            for them: DFlash's are numbered so, and EAGLE-3's input of layer l is tap l - 1.

        Returns:
          The final-normed hidden states [B, T, E] of each segment, and the cache with the AR
          segments' rows written. With `taps`, also a tuple with one [B, T, E] per tap, in their
          order: the residual stream of the AR segments' rows after that layer, before the final
          norm; rows of several AR segments are joined along T. Without, nothing is compiled for it.

        Raises:
          ValueError: for a tap that is no layer, or taps without an AR segment.
        """
        if not set(taps) <= set(range(self.config.num_hidden_layers)):
            raise ValueError(f"taps={taps}: the model has {self.config.num_hidden_layers} layers")
        if taps and all(segment.view is not View.AR for segment in segments):
            raise ValueError("taps read the rows of AR segments, and there is none")
        attention = self.attention or ""
        module = DualViewTransformer(self.config, self.mesh, self.remat, attention)
        with self._precision():
            out: Any = module.apply({"params": params}, segments, cache, taps)
        return out

    def logits(self, params: Params, hidden: Array) -> Array:
        """hidden [..., T, E] -> float32 logits [..., T, V]."""
        module = DualViewTransformer(self.config)
        with self._precision():
            out: Any = module.apply({"params": params}, hidden, method=DualViewTransformer.logits)
        return out

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """float32 means float32: TPUs and GPUs else multiply it in bfloat16 or TF32 passes."""
        if self.config.dtype == "float32":
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    def pair_vectors(self, params: Params, tokens: Array, positions: Array) -> tuple[Array, Array]:
        """The pairwise head's two vectors of each token, float32[..., R]; see pairwise.vectors.

        `positions` are those of the tokens. A token's vectors do not depend on them.
        """
        del positions
        embedding = params["embed_tokens"]["embedding"]
        return pairwise.vectors(params[pairwise.HEAD], embedding, tokens)
