"""The programs that are compiled ahead of time, lowered from shapes alone: prefill, the loops.

Also what each must read at the least. Loads no weights, runs nothing, knows no chips.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from orthrus_jax import decoding, sharding
from orthrus_jax.attention import KVCacheConfig
from orthrus_jax.attention.cache import KV_CHUNK
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import Strategy
from orthrus_jax.decoding.prefill import PREFILL_CHUNK
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.model import Model

METHODS = {
    "ar": "ar",
    "orthrus": "orthrus",
    "two-forward": "orthrus-2f",
    "one-forward": "orthrus-1f",
}
PROGRAMS = ("prefill", "forward", *METHODS)
PROMPT, ANSWER = 1024, 2048  # prompt tokens that prefill reads, tokens that a loop may emit
# Whose attention weights each forward of a method reads.
VIEWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ar": (("self_attn",),),
    "orthrus": (("self_attn_diff",), ("self_attn",)),
    "orthrus-2f": (("self_attn", "self_attn_diff"), ("self_attn",)),
    "orthrus-1f": (("self_attn", "self_attn_diff"),),
}


class Program(NamedTuple):
    """A program ready to compile.

    Attributes:
      lowered: the program, traced and lowered by jax.
      parts: its inputs by name; shapes with their shardings.
      layers: of the transformer; 0 where they are not told apart.
      forwards: of one turn of the loop, or of the whole program; 0 where time is not estimated.
      loops: whether it is a decoding loop, of which one turn is looked at.
      read_bytes: weights and live cache that its forwards read, per device.
      flops: of their products, per device.
      trips: of a loop inside whose count is known at run time only: a live context in chunks.
    """

    lowered: Any
    parts: dict[str, Any]
    layers: int = 0
    forwards: int = 0
    loops: bool = False
    read_bytes: float = 0.0
    flops: float = 0.0
    trips: int = 1


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a parameter tree or training state, each with its sharding."""
    return jax.tree.map(_with_sharding, tree, sharding.tree_shardings(tree, mesh))


def _with_sharding(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes of a tree, each with its sharding."""
    return jax.tree.map(_with_sharding, tree, shardings)


def weights(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes of both views' parameters in the config's dtype."""
    shape = jax.eval_shape(Model(config).init, jax.random.key(0))
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype)
    return on_mesh(jax.tree.map(cast, shape), mesh)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device, before the device's own padding."""
    local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(local, jax.tree.leaves(tree)))


def lower_decoding(
    program: str,
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    context: int,
    strategy: Strategy | None = None,
    rows: int = 1,
    kv_cache: KVCacheConfig | None = None,
) -> Program:
    """Prefill, a loop, or a loop of forwards of `rows` rows each.

    Args:
      program: one of PROGRAMS.
      config: sizes.
      mesh: of described devices.
      batch: sequences.
      context: cache slots per sequence; so many are taken as live.
      strategy: of a loop; None is the program's method alone.
      rows: of "forward", rows per sequence that the AR view verifies.
      kv_cache: how the cache is quantised, if it is.
    """
    model, tree = Model(config, mesh, kv_cache=kv_cache), weights(config, mesh)
    place = lambda x: _with_sharding(x, sharding.batch_sharding(x.shape, mesh))
    prompt = min(context, PROMPT)
    sizes = {"slots": context, "max_new_tokens": min(context, ANSWER)}
    ids, vector = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, prompt), (batch,)))
    read = partial(decoding.prefill, model, **sizes)
    inputs = jax.tree.map(place, (ids, vector, vector, jax.ShapeDtypeStruct((batch, 2), jnp.int32)))
    least = partial(_least, tree, config, batch, kv_cache)
    layers, trips = config.num_hidden_layers, -(-context // KV_CHUNK)
    if program == "prefill":
        lowered = decoding.prefill.lower(model, tree, *inputs, **sizes)
        pieces = -(-prompt // PREFILL_CHUNK)
        forwards = [(VIEWS["ar"][0], min(prompt, PREFILL_CHUNK), prompt)] * pieces
        return Program(lowered, {"weights": tree}, layers, pieces, False, *least(forwards))
    state = jax.eval_shape(read, tree, *inputs)
    state = jax.tree.map(_with_sharding, state, decoding.shardings(state, mesh))
    parts = {"weights": tree, "cache": state.cache}
    if program == "forward":
        lowered = _forwards.lower(model, tree, state, jnp.int32(1), rows=rows)
        sums = least([(("self_attn",), rows, context)])
        return Program(lowered, parts, layers, 1, True, *sums, trips)
    strategy = (strategy or Strategy(METHODS[program])).resolve(config)
    carry = jax.eval_shape(lambda: first_carry(strategy, model, batch, context))
    state = state.replace(drafter=jax.tree.map(place, carry))
    loop, static = loop_of(strategy, model)
    lowered = loop.lower(model, tree, state, **static)
    views = VIEWS[strategy.method]
    forwards = [(v, n, context) for v, n in zip(views, strategy.forward_rows, strict=True)]
    return Program(lowered, parts, layers, len(views), True, *least(forwards), trips)


@partial(jax.jit, static_argnames=("model", "rows"), donate_argnames=("state",))
def _forwards(model: Any, params: Any, state: Any, count: jax.Array, *, rows: int) -> Any:
    """Verify the same rows `count` times over."""

    def step(_: jax.Array, state: Any) -> Any:
        same = jnp.tile(state.anchor[:, None], (1, rows - 1))
        logits, cache, _taps = decoding.verify(model, params, state, decoding.Drafts(same))
        tokens = decoding.choose(state, logits)
        return state.replace(cache=cache, anchor=tokens.max(axis=1))

    return jax.lax.fori_loop(0, count, step, state)


def _least(
    tree: Any,
    config: ModelConfig,
    batch: int,
    kv_cache: KVCacheConfig | None,
    forwards: Sequence[tuple[tuple[str, ...], int, int]],
) -> tuple[float, float]:
    """Bytes that forwards of (views, rows per sequence, live slots) read, FLOP of their products.

    An untied embedding is looked up, a tied one is also the head and read whole.
    """
    views = ("self_attn", "self_attn_diff")
    parts = [part for name, part in tree.items() if name != "embed_tokens"]
    head = tree["embed_tokens"] if config.tie_word_embeddings else {}
    layer = tree["layers_0"]
    item = jnp.dtype(config.dtype).itemsize
    heads = config.num_hidden_layers * config.num_key_value_heads
    slot: float = 2 * heads * config.head_dim * item
    if kv_cache is not None:  # of the tiles; the exact slots are few
        slot = heads * kv_cache.bytes_per_slot(config.head_dim)
    ways = local_bytes(layer["mlp"]) / sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(layer["mlp"])
    )
    read = flops = 0.0
    for used, rows, live in forwards:
        unused = [v for v in views if v not in used]
        skip = sum(local_bytes(layer[v]) for v in unused) * config.num_hidden_layers
        of_weights = local_bytes([parts, head]) - skip
        read += of_weights + batch * live * slot * ways
        flops += 2 * of_weights / item * batch * rows
        per_slot = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        flops += per_slot * batch * rows * live * ways
    return read, flops


def shallow(config: ModelConfig, layers: int) -> ModelConfig:
    """The same sizes with fewer layers."""
    return dataclasses.replace(config, num_hidden_layers=layers)
