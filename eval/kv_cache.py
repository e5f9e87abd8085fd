"""Which quantised cache suits a model: `python -m eval.kv_cache --model DIR --prompts FILE.jsonl`.

The prompts are read as one text, and every kind of cache is measured on the model's own keys and
values against the exact ones, by context length:

  scores, outputs  mean absolute error of attention's scaled scores over quantised slots, and of
                   its outputs, relative to the mean absolute output; of exact keys and values
  KL               of the next token's distribution, with accumulation: the text is read over the
                   quantised cache, as decoding does, so that later keys and values are computed
                   from quantised ones; and without: each pass finds tiles of exact ones

"plain" kinds round the same axes without rotation and normalisation (per-channel keys).
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import orthrus_jax
from eval import plots
from eval.arguments import positive
from orthrus_jax import cli
from orthrus_jax.attention import KVCacheConfig, QuantisedCache, kvarn
from orthrus_jax.attention.kv_config import PRESETS
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import read_prompts, write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, ar_segment
from orthrus_jax.model.layers import AttentionProjections
from orthrus_jax.tokenizer import encode

Array = jax.Array
TOKENS = 2048
ROWS = 128  # query positions at which scores and outputs are compared, evenly spread
EXACT = "exact"


def kinds_of(tile: int = 128) -> dict[str, KVCacheConfig | None]:
    """What is compared, by name; None is no quantisation: rounding alone."""
    kinds = {name: dataclasses.replace(kind, tile=tile) for name, kind in PRESETS.items()}
    plain = {
        f"plain {name}": dataclasses.replace(kind, rotate=False, iterations=0)
        for name, kind in kinds.items()
    }
    clipped = {"k2v2 clipped": dataclasses.replace(kinds["k2v2"], clip=True)}
    return {EXACT: None, **kinds, **clipped, **plain}


@functools.partial(jax.jit, static_argnames="model")
def exact_run(model: Model, params: Any, ids: Array) -> tuple[Array, list[tuple[Array, ...]]]:
    """Final hidden states [1, T, E], and each layer's q [1, T, H, D], k and v [1, T, G, D]."""
    projected: list[tuple[Array, ...]] = []

    def keep(function: Any, args: Any, options: Any, context: Any) -> Any:
        out = function(*args, **options)
        if isinstance(context.module, AttentionProjections) and context.method_name == "qkv":
            projected.append(out)
        return out

    with nn.intercept_methods(keep):
        (hidden,), _ = model.forward(params, [ar_segment(ids, jnp.zeros(1, jnp.int32))], None)
    return hidden, projected


@functools.partial(jax.jit, static_argnames="kind")
def attention_errors(q: Array, k: Array, v: Array, *, kind: KVCacheConfig) -> tuple[Array, Array]:
    """Errors of one layer at ROWS positions, each over what it reads quantised: float32[R] each.

    Mean absolute error of the scores, and of the outputs over the mean absolute output.
    """
    (_, t, heads, d), groups = q.shape, k.shape[2]
    at = positions_of(kind, t)
    by_head = lambda x: x[0].swapaxes(0, 1).astype(jnp.float32)
    tiles = lambda x: by_head(x)[:, : t // kind.tile * kind.tile].reshape(groups, -1, kind.tile, d)
    flat = lambda x: x.reshape(groups, -1, d)
    q_rows = by_head(q[:, at]).reshape(groups, heads // groups, len(at), d)
    stored_k = flat(kvarn.decode_keys(kvarn.encode_keys(tiles(k), kind), kind))
    stored_v = flat(kvarn.decode_values(kvarn.encode_values(tiles(v), kind), kind))
    slots = jnp.arange(t)
    quantised = (slots >= kind.sink) & (slots < kind.quantised_end(at)[:, None])  # [R, T]
    whole = lambda stored: jnp.pad(stored, ((0, 0), (0, t - stored.shape[1]), (0, 0)))
    scores = lambda k: jnp.einsum("ghrd,gsd->ghrs", q_rows, k) * d**-0.5
    exact, rough = scores(by_head(k)), scores(whole(stored_k))
    error = jnp.where(quantised, jnp.abs(rough - exact), 0).sum(-1) / quantised.sum(-1)
    seen = slots <= at[:, None]
    weigh = lambda scores: jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    of = lambda weights, where, v: jnp.einsum("ghrs,gsd->ghrd", jnp.where(where, weights, 0), v)
    right = of(weigh(exact), seen, by_head(v))
    weights = weigh(jnp.where(quantised, rough, exact))
    out = of(weights, quantised, whole(stored_v)) + of(weights, ~quantised, by_head(v))
    return error.mean((0, 1)), jnp.abs(out - right).mean((0, 1, 3)) / jnp.abs(right).mean()


def positions_of(kind: KVCacheConfig, tokens: int) -> np.ndarray:
    """ROWS positions, evenly spread over those that read tiles."""
    first = kind.sink + kind.tile + kind.wait
    return np.unique(np.linspace(first, tokens - 1, ROWS).astype(int))


@functools.partial(jax.jit, static_argnames="model")
def divergence(
    model: Model,
    params: Any,
    ids: Array,
    hidden: Array,
    exact: list[tuple[Array, ...]] | None,
) -> tuple[Array, Array]:
    """Read ids [1, T] over the model's cache, a tile per pass.

    Args:
      model: static, with the kind of cache.
      params: of both views.
      ids: T is a multiple of the tile.
      hidden: of `exact_run`.
      exact: each layer's k and v, put in the place of those that a pass has written; or None.

    Returns:
      At each position the KL of the exact next token to this one, in nats, and whether both have
      the same likeliest token: float32[T], bool[T].
    """
    width = model.kv_cache.tile if model.kv_cache else min(128, ids.shape[1])

    def read(cache: Any, i: Array) -> tuple[Any, tuple[Array, Array]]:
        cache = cache.settle(width) if isinstance(cache, QuantisedCache) else cache
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1)
        first = jnp.full(1, i * width, jnp.int32)
        (rows,), cache = model.forward(params, [ar_segment(part(ids), first)], cache)
        if exact is not None:
            pairs = zip(cache.layers, exact, strict=True)
            layers = [layer.write(part(k), part(v), first) for layer, (k, v) in pairs]
            cache = cache.with_layers(layers)
        p, q = (jax.nn.log_softmax(model.logits(params, x)[0]) for x in (part(hidden), rows))
        kl = (jnp.exp(p) * (p - q)).sum(-1)
        return cache.commit(first + width), (kl, p.argmax(-1) == q.argmax(-1))

    cache = model.init_cache(*ids.shape)
    _, (kl, same) = jax.lax.scan(read, cache, jnp.arange(ids.shape[1] // width))
    return kl.reshape(-1), same.reshape(-1)


def measure(
    model: LLM, ids: Sequence[int], kinds: Mapping[str, KVCacheConfig | None]
) -> dict[str, Any]:
    """All figures by kind, and by context for those after it: "contexts" are their upper ends."""
    inner, params, text = model.engine.model, model.params, jnp.asarray([ids], jnp.int32)
    hidden, layers = exact_run(inner, params, text)
    kv = [(k, v) for _, k, v in layers]
    some = next(kind for kind in kinds.values() if kind is not None)
    first = some.sink + some.tile + some.wait
    ends = [first * 2**i for i in range(1, 20) if first * 2**i < len(ids)] + [len(ids)]
    result: dict[str, Any] = {"tokens": len(ids), "contexts": ends, "kinds": {}}

    def by_context(at: np.ndarray, values: Any) -> list[float]:
        which = np.searchsorted(ends, at, side="right")
        return [float(np.asarray(values)[which == i].mean()) for i in range(len(ends))]

    for name, kind in kinds.items():
        cached = dataclasses.replace(inner, kv_cache=kind)
        every = np.arange(first, len(ids))
        kl, same = (np.asarray(x)[first:] for x in divergence(cached, params, text, hidden, None))
        figures: dict[str, Any] = {
            "kl": by_context(every, kl),
            "same_token": by_context(every, same),
        }
        if kind is not None:
            static, _ = divergence(cached, params, text, hidden, kv)
            figures["kl_without_accumulation"] = by_context(every, np.asarray(static)[first:])
            errors = [attention_errors(*layer, kind=kind) for layer in layers]
            scores, outputs = (np.mean([np.asarray(e[i]) for e in errors], axis=0) for i in (0, 1))
            at = positions_of(kind, len(ids))
            figures |= {"scores": by_context(at, scores), "outputs": by_context(at, outputs)}
            heads = inner.config.num_hidden_layers * inner.config.num_key_value_heads
            figures["bytes_per_token"] = heads * kind.bytes_per_slot(inner.config.head_dim)
        result["kinds"][name] = figures
    return result


def table(result: Mapping[str, Any]) -> str:
    """The last contexts' figures, a line per kind, as Markdown."""
    names = ("kl", "kl_without_accumulation", "same_token", "scores", "outputs")
    lines = [
        f"After up to {result['tokens']} tokens:",
        "",
        "| cache | KL | without accumulation | same token | scores | outputs | bytes per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in result["kinds"].items():
        shown = [f"{figures[key][-1]:.3g}" if key in figures else "" for key in names]
        size = f"{figures['bytes_per_token']:.0f}" if "bytes_per_token" in figures else ""
        lines.append(f"| {name} | {' | '.join(shown)} | {size} |")
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], target: pathlib.Path) -> None:
    """KL and error of attention's outputs by context."""
    contexts = result["contexts"]
    with plots.figure(target, 2, (11, 4)) as axes:
        for place, (name, figures) in enumerate(result["kinds"].items()):
            color = plots.color(place)
            axes[0].plot(contexts, figures["kl"], "o-", color=color, label=name)
            if "outputs" in figures:
                static = figures["kl_without_accumulation"]
                axes[0].plot(contexts, static, ":", color=color)
                axes[1].plot(contexts, figures["outputs"], "o-", color=color, label=name)
        axes[0].set(yscale="log", xlabel="context", ylabel="KL, nats (dotted: not accumulated)")
        axes[1].set(yscale="log", xlabel="context", ylabel="error of attention's outputs")
        for axis in axes:
            plots.mark_values(axis, contexts)
            axis.legend(fontsize="small")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.kv_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    add("--prompts", required=True, metavar="FILE.jsonl", help='one {"prompt": TEXT} per line')
    add("--tokens", type=positive, default=TOKENS, metavar="N",
        help="of the text that is read; default: %(default)s, or what there is")  # fmt: skip
    add("--out", default="runs/kv_cache", metavar="DIR", help="default: %(default)s")
    cli.add_runtime(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    prompts, kinds = read_prompts(args.prompts), kinds_of()
    model = orthrus_jax.load(args.model, **cli.runtime_options(args))
    ids = [i for text in prompts for i in encode(model.tokenizer, text, chat=False)]
    ids = ids[: min(args.tokens, model.config.max_position_embeddings)]
    ids = ids[: len(ids) // 128 * 128]
    if len(ids) <= 512:
        raise UserError(
            f"--prompts {args.prompts} and --tokens {args.tokens} give {len(ids)} tokens: "
            "the first 384 are read exactly; give more than 639"
        )
    result = {"model": args.model, "device": jax.devices()[0].device_kind}
    result |= measure(model, ids, kinds)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "kv_cache.json", json.dumps(result, indent=1) + "\n")
    write_atomic(out / "kv_cache.md", table(result))
    draw(result, out / "kv_cache.png")
    print(table(result))


if __name__ == "__main__":
    run_command(main)
