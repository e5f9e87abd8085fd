"""Command-line options of decoding, dtype, devices and the compilation cache, for all commands."""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax

from orthrus_jax import sharding
from orthrus_jax.config import DTYPES
from orthrus_jax.decoding.sampling import Rule
from orthrus_jax.engine import BLOCKS, CYCLES, Completion, Plan, SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM, Pieces
from orthrus_jax.runtime import enable_compilation_cache


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of decoding that generate and chat share."""
    defaults = dataclasses.asdict(SamplingParams())
    number = lambda flag, kind, text: parser.add_argument(
        flag,
        type=kind,
        default=defaults[flag[2:].replace("-", "_")],
        metavar="N" if kind is int else "X",
        help=f"{text}; default: %(default)s",
    )
    number("--max-new-tokens", int, "tokens an answer may have")
    number("--min-new-tokens", int, "no end token before so many")
    number("--temperature", float, "0 is greedy")
    number("--top-k", int, "keep the k likeliest tokens, 0 is off")
    number("--top-p", float, "keep the likeliest tokens of this probability, 1 is off")
    number("--min-p", float, "keep tokens of this share of the likeliest one's, 0 is off")
    number("--seed", int, "with the prompt, it fixes a sampled text")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    parser.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID", help="end there too"
    )
    parser.add_argument(
        "--accept",
        choices=[rule.value for rule in Rule],
        default=Rule.REJECTION.value,
        help="sampled drafts: most often (rejection) or only AR's own text (coupled); "
        "default: %(default)s",
    )
    parser.add_argument(
        "--draft-length",
        type=int,
        metavar="K",
        help="rows of a draft block, from 2; default: what tune measured here, or the trained K",
    )
    add_cycle(parser)
    add_rows(parser)


def add_cycle(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a cycle is, which all commands that decode share."""
    parser.add_argument(
        "--cycle",
        choices=CYCLES,
        default=Plan.cycle,
        help="draft and verify in turn, the same with a draft pass that emits too, or draft while "
        "verifying; default: %(default)s",
    )
    add_blocks(parser)


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add --rows, which `spend_rows` then turns into the options of `add_cycle`."""
    parser.add_argument(
        "--rows",
        type=int,
        metavar="R",
        help="let the planner choose the cycle and the next four, for at most R rows a forward, by "
        "what eval.calibrate measured of this model and device",
    )


def add_blocks(parser: argparse.ArgumentParser) -> None:
    """Add what the rows of a forward are spent on."""
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number(
        "--early-blocks",
        default=Plan.early_blocks,
        help="with --cycle one-forward: blocks that a forward drafts ahead, each for one number of "
        "drafts that may stand; default: %(default)s",
    )
    number(
        "--fresh-blocks",
        default=Plan.fresh_blocks,
        help="likewise, each for one token besides that may come next; default: %(default)s",
    )
    number(
        "--tree-nodes",
        default=Plan.tree_nodes,
        help="with --cycle two-forward or one-forward: drafts of a tree that a forward verifies; "
        "default: %(default)s, a chain",
    )


def spend_rows(args: argparse.Namespace, model: LLM, batch: int) -> None:
    """Where --rows was given, set the options of `add_cycle` as the planner has them; say why."""
    if args.rows is None:
        return
    choice = model.plan(args.rows, batch)
    spent = {name: value for name, value in choice.split.options.items() if value}
    said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in spent.items())
    print(f"--rows {args.rows}: {said}\n  {choice.why}", file=sys.stderr)
    for name, value in choice.split.options.items():
        if name != "mode" or (value, args.mode) == ("ar", "orthrus"):
            setattr(args, name, value)


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling` and --mode parsed, as arguments of LLM.stream."""
    plan = ("mode", "accept", "draft_length", "cycle", *BLOCKS)
    sampling = (
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
    )
    options = {name: getattr(args, name) for name in plan + sampling}
    return options | {"stop": tuple(args.stop), "stop_token_ids": tuple(args.stop_token_id)}


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """Read a file of one {"prompt": TEXT} a line, as --prompts takes it.

    Raises:
      UserError: naming the file and the line.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f'{path}:{number} is not a JSON object with a "prompt", like {{"prompt": "Hi"}}'
            ) from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, --mesh and --compile-cache."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="decode on several devices: data=N,tensor=M shares out rows over N and heads over M; "
        "one of them may be -1, what is left; default: one device",
    )
    add_compile_cache(parser)


def add_compile_cache(parser: argparse.ArgumentParser) -> None:
    """Add --compile-cache."""
    parser.add_argument(
        "--compile-cache",
        metavar="DIR",
        help="where compiled programs are kept, or off; "
        "default: JAX_COMPILATION_CACHE_DIR, or a directory of yours",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """Turn the cache on as told; return dtype and mesh as `llm.load` takes them."""
    enable_compilation_cache(args.compile_cache)
    return {"dtype": args.dtype, "mesh": parse_mesh(args.mesh)}


def parse_mesh(text: str | None) -> jax.sharding.Mesh | None:
    """The mesh that --mesh asks for; None for none.

    Raises:
      UserError: for an unknown axis, a size that is no number, or one that does not fit.
    """
    if text is None:
        return None
    sizes = {sharding.DATA: 1, sharding.TENSOR: 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh {text!r}: expected something like data=2,tensor=4")
        sizes[axis] = int(size)
    return sharding.make_mesh(data=sizes[sharding.DATA], tensor=sizes[sharding.TENSOR])


def print_pieces(pieces: Pieces) -> Completion:
    """Print text as it grows; return the completion."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value
