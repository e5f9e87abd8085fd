"""Measure AR against Orthrus on one device: `python -m eval.speed --model DIR_OR_ID`.

Two parts. Forwards: the time of an AR step, a draft, a verification and a whole cycle at each batch
size and context, with the memory of both programs and the floor set by reading weights and cache.
Text: tokens/s of both loops over the same prompts, their runs interleaved. `--modes ar,orthrus,hf`
times transformers' greedy decoding of the same weights in the same turns. Everything is compiled
and warm before a clock starts, and every clock waits for the device. `--random-weights PRESET`
measures a size without its weights: forwards only, since acceptance would mean nothing there.
`--throughput` measures requests of equal length at several batch sizes instead: throughput.py.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import orthrus_jax
from eval import throughput
from eval.arguments import check_contexts, check_output, positive, positive_list
from eval.hf import HF, check_torch
from eval.speed_page import draw, table
from orthrus_jax import cli, decoding, sharding
from orthrus_jax.checkpoint import read_config, resolve
from orthrus_jax.cli import SPENT_BY, add_blocks
from orthrus_jax.config import PRESETS, ModelConfig
from orthrus_jax.decoding import CYCLES, Strategy
from orthrus_jax.drafters import DiffusionDrafter
from orthrus_jax.engine import Auto, Plan, Request, SamplingParams, bucket
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import read_prompts, write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.memory import check_memory, decoding_bytes, weight_bytes
from orthrus_jax.model import Model, params
from orthrus_jax.tokenizer import encode

TIMED_CYCLES = 16  # per timed call; the context grows by the tokens they emit
METHODS = {"ar": "ar", "orthrus": "orthrus"} | {c: m for c, m in CYCLES.items() if c != "paper"}
MODES = (*METHODS, "hf")  # orthrus: the paper's cycle


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes/s of the device's memory, from reading and writing 256 MiB: the roofline's slope."""
    x = jnp.zeros(1 << 26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no fresh pages to fault in
    best = math.inf
    for _ in range(repeats):
        x = jax.block_until_ready(x)
        begin = time.perf_counter()
        x = jax.block_until_ready(add(x))
        best = min(best, time.perf_counter() - begin)
    return 2 * x.nbytes / best


def standing_at(model: Model, batch: int, context: int, slots: int) -> decoding.DecodeState:
    """A state whose rows have `context` tokens (of zero keys) in the cache and never end."""
    full = lambda n: jnp.full(batch, n, jnp.int32)
    width = TIMED_CYCLES * model.config.block_size + 1
    make = lambda: decoding.DecodeState(
        tokens=jnp.zeros((batch, width), jnp.int32),
        count=full(0),
        budget=full(1 << 30),
        anchor=full(1),
        position=full(context),
        done=jnp.zeros(batch, bool),
        cycles=full(0),
        accepted=jnp.full((batch, width), -1, jnp.int32),
        eos=jnp.full((batch, 1), -1, jnp.int32),
        cache=model.init_cache(batch, slots),
    )
    return jax.jit(make)()


def time_forwards(
    model: Model, weights: Any, batch: int, context: int, block_size: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds per forward of each kind (medians), ranges, memory; see the module."""
    slots = bucket(context + (TIMED_CYCLES + 1) * block_size)  # as generation rounds them
    limit = jnp.int32(TIMED_CYCLES)
    alone = lambda body: jax.jit(
        lambda weights, state: jax.lax.fori_loop(
            0, TIMED_CYCLES, lambda i, s: s.replace(anchor=body(weights, s)), state
        )
    )
    drafter = DiffusionDrafter(model, block_size)
    drafting = lambda w, s: drafter.propose(w, s)[0].tokens[:, 0] % 7 + s.anchor % 2

    def verifying(w: Any, s: Any) -> Any:
        guesses = decoding.Drafts(jnp.tile(s.anchor[:, None], (1, block_size - 1)))
        logits, _, _ = decoding.verify(model, w, s, guesses)
        return decoding.choose(s, logits)[:, 0]

    loops: dict[str, tuple[Any, dict[str, Any]]] = {
        "ar_step": (decoding.ar_decode, {}),
        "cycle": (decoding.speculative_decode, {"drafter": drafter}),
    }
    make = lambda: standing_at(model, batch, context, slots)
    result: dict[str, Any] = {"batch": batch, "context": context, "block_size": block_size}
    times: dict[str, list[float]] = {}
    calls: dict[str, Callable[[Any], Any]] = {}
    for name, (loop, static) in loops.items():
        begin = time.perf_counter()
        lowered = loop.lower(model, weights, make(), max_cycles=limit, **static)
        program = lowered.compile()
        result[f"{name}_compile_seconds"] = time.perf_counter() - begin
        memory = program.memory_analysis()
        result[f"{name}_temporary_bytes"] = getattr(memory, "temp_size_in_bytes", None)
        calls[name] = functools.partial(program, weights, max_cycles=limit)
    for name, body in {"draft": drafting, "verify": verifying}.items():
        program = alone(body).lower(weights, make()).compile()
        calls[name] = functools.partial(program, weights)
    for name, call in calls.items():
        jax.block_until_ready(call(make()))
        times[name] = []
    for _ in range(repeats):  # interleaved: a slow spell of the machine hits all alike
        for name, call in calls.items():
            state = jax.block_until_ready(make())
            begin = time.perf_counter()
            jax.block_until_ready(call(state))
            times[name].append((time.perf_counter() - begin) / TIMED_CYCLES * 1e3)
    for name, runs in times.items():
        result[f"{name}_ms"] = statistics.median(runs)
        result[f"{name}_ms_range"] = [min(runs), max(runs)]
    result["cycle_in_ar_steps"] = result["cycle_ms"] / result["ar_step_ms"]
    return result


def floor_ms(model: Model, weights: Any, batch: int, context: int, bandwidth: float) -> float:
    """The least milliseconds an AR step can take: its weights and live cache, read once."""
    frozen, _ = params.split(weights)
    c = model.config
    # An untied embedding is looked up; a tied one is also the head, and read whole.
    table = 0 if c.tie_word_embeddings else frozen["embed_tokens"]["embedding"].nbytes
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    read = sum(x.nbytes for x in jax.tree.leaves(frozen)) - table + batch * context * row
    return read / bandwidth * 1e3


def time_hf(theirs: HF, batch: int, context: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of transformers' one-row forward after `context` tokens, median and range."""
    theirs.steps(batch, context, TIMED_CYCLES)()
    times = []
    for _ in range(repeats):
        run = theirs.steps(batch, context, TIMED_CYCLES)  # reads the context, outside the clock
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) / TIMED_CYCLES * 1e3)
    return {"hf_step_ms": statistics.median(times), "hf_step_ms_range": [min(times), max(times)]}


Variant = Callable[[list[list[int]]], list[list[int]]]  # prompts to answers, all of them ids


def strategy_of_mode(mode: str, args: argparse.Namespace) -> Strategy:
    """The strategy of one of --modes, with those row counts that its method has."""
    method = METHODS[mode]
    counts = {name: getattr(args, name) for name, methods in SPENT_BY.items() if method in methods}
    given: dict[str, Any] = {name: n for name, n in counts.items() if n is not None}
    return Strategy(method, None if method == "ar" else args.draft_length, **given)


def text_variants(
    model: LLM, theirs: HF | None, args: argparse.Namespace, batch: int
) -> dict[str, Variant]:
    """The functions timed at this batch size, by name."""
    budget = args.max_new_tokens

    def ours(mode: str, **options: Any) -> Variant:
        options |= {"strategy": strategy_of_mode(mode, args), "max_new_tokens": budget}
        return lambda prompts: [
            c.tokens for c in model.complete(prompts, batch_size=batch, **options)
        ]

    def reference(prompts: list[list[int]]) -> list[list[int]]:
        assert theirs is not None, "--modes names hf, hence it is loaded"
        return theirs.complete(prompts, max_new_tokens=budget, batch_size=batch)

    variants: dict[str, Variant] = {}
    for mode in args.modes:
        variants[mode] = reference if mode == "hf" else ours(mode)
        if args.refill and batch > 1 and mode != "hf":
            variants[f"{mode}, no refill"] = ours(mode, refill=False)
    return variants


def time_text(
    prompts: list[list[int]], repeats: int, variants: dict[str, Variant]
) -> dict[str, Any]:
    """Tokens/s of each variant over all prompts, interleaved; share equal to the first's."""
    runs: dict[str, list[float]] = {name: [] for name in variants}
    texts: dict[str, list[list[int]]] = {}
    for call in variants.values():
        call(prompts)
    for _ in range(repeats):
        for name, call in variants.items():
            begin = time.perf_counter()
            texts[name] = call(prompts)
            seconds = time.perf_counter() - begin
            runs[name].append(sum(map(len, texts[name])) / seconds)
    result: dict[str, Any] = {"prompts": len(prompts)}
    first = next(iter(variants))
    for name, rates in runs.items():
        result[name] = {
            "tokens_per_second": statistics.median(rates),
            "range": [min(rates), max(rates)],
            "speedup": statistics.median([a / b for a, b in zip(rates, runs[first], strict=True)]),
            "same_text": statistics.mean(
                a == b for a, b in zip(texts[name], texts[first], strict=True)
            ),
        }
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint or hub id")
    source.add_argument("--random-weights", choices=sorted(PRESETS), help="no text part")
    add(
        "--prompts",
        metavar="FILE.jsonl",
        help='one {"prompt": TEXT} per line; none: no text part',
    )
    add("--limit", type=positive, default=64, help="prompts used; default: %(default)s")
    add(
        "--modes",
        help="of ar, orthrus (the paper's cycle), two-forward and one-forward (text only), hf "
        "(transformers' generate; needs torch); default: ar,orthrus. With --throughput not hf but "
        "auto; default: ar,orthrus,one-forward,auto",
    )
    add(
        "--throughput",
        action="store_true",
        help="instead: tokens/s of requests that all read --contexts and write --max-new-tokens "
        "tokens, whatever they say, at each of --batch-sizes",
    )
    add_blocks(parser, "--modes")
    add("--batch-sizes", type=positive_list, default=[1], help="default: 1")
    add("--contexts", type=positive_list, default=[128, 1024], help="default: 128,1024")
    add("--max-new-tokens", type=positive, default=256, help="default: %(default)s")
    add("--draft-length", type=positive, metavar="K", help="default: the trained K")
    cli.add_runtime(parser)
    add("--repeats", type=positive, default=5, help="default: %(default)s")
    add("--refill", action="store_true", help="also time batches without refill")
    add("--json", metavar="OUT", help="write all figures to OUT")
    add("--plot", metavar="OUT.png", help="draw the figures to OUT.png")
    return parser


def _config(args: argparse.Namespace) -> ModelConfig:
    """The model's config, before its weights are loaded or made."""
    if args.model:
        config = read_config(resolve(args.model)).config
        return dataclasses.replace(config, dtype=args.dtype or config.dtype)
    return dataclasses.replace(PRESETS[args.random_weights], dtype=args.dtype or "bfloat16")


def _check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Refuse what this model cannot decode, or this machine not hold.

    Raises:
      UserError: naming the flag.
    """
    for mode in sorted({"orthrus", *args.modes} - {"hf", "auto"}):
        strategy_of_mode(mode, args).resolve(config)
    check_contexts("--contexts", args.contexts, config)
    mesh = cli.parse_mesh(args.mesh)
    devices = None if mesh is None else list(mesh.devices.flat)
    weights = weight_bytes(config)
    if args.random_weights:
        purpose, remedy = f"--random-weights {args.random_weights}", "choose a smaller preset"
        check_memory(weights, purpose, remedy, devices)
    batch, context = max(args.batch_sizes), max(args.contexts)
    block = args.draft_length or config.block_size
    slots = bucket(context + (TIMED_CYCLES + 1) * block)
    check_memory(
        weights + decoding_bytes(Model(config), batch, slots, block),
        f"--batch-sizes {batch} with --contexts {context}",
        "lower one of them",
        devices,
    )


def _loaded(args: argparse.Namespace, config: ModelConfig) -> LLM:
    options = cli.runtime_options(args)
    if args.model:
        return orthrus_jax.load(args.model, **options)
    if args.view:
        raise UserError(f"--view {args.view} needs --model: --random-weights has a view of its own")
    cast = lambda x: x.astype(config.dtype)
    make = lambda key: jax.tree.map(cast, params.init(Model(config), key))
    key, mesh = jax.random.key(0), options["mesh"]
    where = mesh and sharding.tree_shardings(jax.eval_shape(make, key), mesh)
    return LLM(config, jax.jit(make, out_shardings=where)(key), mesh=mesh)


def _prompt_ids(args: argparse.Namespace, model: LLM, texts: Sequence[str]) -> list[list[int]]:
    """The ids of the prompts, all of which can be answered."""
    ids = [encode(model.tokenizer, text, chat=True) for text in texts]
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    model.engine.check([Request(prompt, sampling) for prompt in ids], Plan(Strategy("ar")))
    return ids


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not fit each other, or places that cannot be written."""
    modes = (*METHODS, "auto") if args.throughput else MODES
    if unknown := sorted(set(args.modes) - set(modes)):
        raise UserError(f"--modes names {', '.join(unknown)}: expected some of {', '.join(modes)}")
    for name, methods in SPENT_BY.items():
        if getattr(args, name) is not None and not {METHODS.get(m) for m in args.modes} & {
            *methods
        }:
            cycles = [cycle for cycle, method in CYCLES.items() if method in methods]
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UserError(f"{flag} needs {' or '.join(cycles)} among --modes")
    check_output("--json", args.json)
    check_output("--plot", args.plot, picture=True)
    if args.prompts and not args.model:
        raise UserError("--prompts needs --model: the texts of random weights are not worth timing")
    if "hf" in args.modes:
        check_torch()
    if args.throughput and (args.plot or args.refill):
        raise UserError(f"{'--plot' if args.plot else '--refill'} does not go with --throughput")


def measure(model: LLM, ids: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as --json has them.

    Args:
      model: the one of args.
      ids: of the prompts; none leaves the texts out.
      args: of the command.
    """
    inner, weights = model.engine.model, model.params
    block_size = args.draft_length or model.config.block_size
    theirs = HF(model.config, weights) if "hf" in args.modes else None
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}",
        "dtype": model.config.dtype,
        "parameters": params.count(params.split(weights)[0]),
        "copy_bytes_per_second": bandwidth,
        "forwards": [],
        "text": [],
    }
    if theirs is not None:
        result["hf"] = theirs.hardware
    shapes = [(b, c) for b in args.batch_sizes for c in args.contexts]
    for batch, context in tqdm(shapes, desc="forwards", file=sys.stderr):
        times = time_forwards(inner, weights, batch, context, block_size, args.repeats)
        times["ar_step_floor_ms"] = floor_ms(inner, weights, batch, context, bandwidth)
        if theirs is not None:
            times |= time_hf(theirs, batch, context, args.repeats)
        result["forwards"].append(times)
    if ids:
        for batch in tqdm(args.batch_sizes, desc="text", file=sys.stderr):
            variants = text_variants(model, theirs, args, batch)
            result["text"].append({"batch": batch, **time_text(ids, args.repeats, variants)})
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    default = "ar,orthrus,one-forward,auto" if args.throughput else "ar,orthrus"
    args.modes = (args.modes or default).split(",")
    _check_flags(args)
    texts = read_prompts(args.prompts)[: args.limit] if args.prompts else []
    config = _config(args)
    _check(args, config)
    if args.throughput:
        _measure_throughput(args, config, texts)
        return
    model = _loaded(args, config)
    ids = _prompt_ids(args, model, texts)
    result = measure(model, ids, args)
    print(table(result))
    if args.json:
        write_atomic(args.json, json.dumps(result, indent=2) + "\n")
    if args.plot:
        draw(pathlib.Path(args.plot), result)


def _measure_throughput(
    args: argparse.Namespace, config: ModelConfig, texts: Sequence[str]
) -> None:
    longest = max(args.contexts) + args.max_new_tokens
    if longest > config.max_position_embeddings:
        raise UserError(
            f"--contexts {max(args.contexts)} with --max-new-tokens {args.max_new_tokens}: the "
            f"model has {config.max_position_embeddings} positions"
        )
    model = _loaded(args, config)
    ids = [encode(model.tokenizer, text, chat=True) for text in texts]
    strategies: dict[str, Strategy | Auto] = {
        mode: Auto() if mode == "auto" else strategy_of_mode(mode, args) for mode in args.modes
    }
    sizes = throughput.Sizes(args.batch_sizes, args.contexts, args.max_new_tokens, args.repeats)
    result = {"model": args.model or args.random_weights} | throughput.measure(
        model, ids, strategies, sizes
    )
    print(throughput.table(result))
    if args.json:
        write_atomic(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
