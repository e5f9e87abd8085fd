"""Command-line options of decoding, dtype, devices and the compilation cache, for all commands."""

import argparse
import dataclasses
import functools
import sys
from typing import Any

import jax

from orthrus_jax import sharding
from orthrus_jax.attention import kv_config
from orthrus_jax.config import DTYPES
from orthrus_jax.decoding import CYCLES, AcceptRule, Strategy
from orthrus_jax.decoding.strategy import LENGTH_BLOCKS, SPENT_BY
from orthrus_jax.engine import Auto, Completion, SamplingParams, planner
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM, MODES, Pieces
from orthrus_jax.runtime import check_devices, enable_compilation_cache
from orthrus_jax.values import check_whole

FIXING = ("cycle", "draft_length", "rows", *SPENT_BY)  # flags that say how to draft


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
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"most tokens per answer; default: {SamplingParams.max_new_tokens}, or what the "
        "model's positions leave",
    )
    number("--min-new-tokens", int, "fewest tokens before an end token")
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
    add_strategy(parser)


def add_strategy(parser: argparse.ArgumentParser) -> None:
    """Add the options of drafting that generate, chat and serve share."""
    rules = [rule.value for rule in AcceptRule]
    parser.add_argument(
        "--accept",
        choices=rules,
        help="of sampled drafts: as many as possible (rejection), or only those that are AR's own "
        "text for the seed (coupled); default: rejection, and coupled with --mode auto",
    )
    parser.add_argument(
        "--draft-length",
        type=int,
        metavar="K",
        help="rows of a draft block, from 2; default: the best that eval.calibrate measured here, "
        "or the trained K",
    )
    add_cycle(parser)
    add_rows(parser)


def add_mode(parser: argparse.ArgumentParser) -> None:
    """Add --mode: whatever earns most, with drafts, or the baseline."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="choose while decoding what is fastest here (auto), draft and verify (orthrus), or "
        "one token per forward (ar); default: auto, and orthrus beside a flag that says how to "
        "draft",
    )


def add_cycle(parser: argparse.ArgumentParser) -> None:
    """Add --cycle, --no-pairwise and `add_blocks`, which all commands that decode share."""
    parser.add_argument(
        "--cycle",
        choices=tuple(CYCLES),
        help="draft and verify in turn (paper), the same with a draft forward that emits too "
        "(two-forward), or draft while verifying (one-forward); default: paper",
    )
    parser.add_argument(
        "--no-pairwise",
        dest="pairwise",
        action="store_false",
        default=None,
        help="draft each position by itself, as the paper does, though the model has a pairwise "
        "head",
    )
    add_blocks(parser)


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add --rows, the token budget of a forward: see `chosen_strategy`."""
    parser.add_argument(
        "--rows",
        type=int,
        metavar="R",
        help="let the planner choose the cycle and the row counts, for at most R rows per forward, "
        "from what eval.calibrate measured for this model and device",
    )


def add_blocks(parser: argparse.ArgumentParser, selector: str = "--cycle") -> None:
    """Add the options that spend the rows of a forward; `selector` is the flag of the cycle."""
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number(
        "--early-blocks",
        help=f"with {selector} one-forward: blocks per forward that draft ahead, each for one "
        f"number of accepted drafts; default: {LENGTH_BLOCKS}",
    )
    number(
        "--fresh-blocks",
        help=f"with {selector} one-forward: blocks per forward that draft ahead, each for one "
        "number of accepted drafts and one next token; default: 0",
    )
    number(
        "--tree-nodes",
        help=f"with {selector} two-forward or one-forward: drafts of a tree that a forward "
        "verifies; default: 0, a chain",
    )


def strategy_of(
    args: argparse.Namespace, method: str | None = None, selector: str = "--cycle"
) -> Strategy:
    """The strategy given by --mode, --cycle, --draft-length, --accept, --no-pairwise, `add_blocks`.

    Args:
      args: parsed; an option that the command lacks counts as not given.
      method: chosen by another flag, `selector`; None follows --mode and --cycle.
      selector: the flag that chooses.

    Raises:
      UserError: for a flag that the others leave without effect.
    """
    get = functools.partial(getattr, args)
    if method is None:
        method = "ar" if get("mode", "") == "ar" else CYCLES[get("cycle", None) or "paper"]
    names = ("cycle", "draft_length", *SPENT_BY)
    given = {name: value for name in names if (value := get(name, None)) is not None}
    rows = get("rows", None)
    if rows is not None:
        check_whole("rows", rows, 1)
    if rows is not None and method == "ar":
        raise UserError(f"--rows {rows}: decoding one token per forward (ar) spends one row")
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')} {value}"
        if rows is not None:
            raise UserError(f"{flag} beside --rows {rows}: the planner chooses it")
        if method == "ar":
            raise UserError(f"{flag}: decoding one token per forward (ar) drafts nothing")
        if name in SPENT_BY and method not in SPENT_BY[name]:
            cycles = [cycle for cycle, method in CYCLES.items() if method in SPENT_BY[name]]
            raise UserError(f"{flag} needs {selector} {' or '.join(cycles)}")
    pairwise = get("pairwise", None)
    if pairwise is False and method == "ar":
        raise UserError("--no-pairwise: decoding one token per forward (ar) drafts nothing")
    counts: dict[str, Any] = {name: given[name] for name in SPENT_BY if name in given}
    return Strategy(
        method,
        given.get("draft_length"),
        accept=get("accept", None) or AcceptRule.REJECTION,
        pairwise=pairwise,
        **counts,
    )


def decoding_of(args: argparse.Namespace) -> Strategy | Auto:
    """How generate, chat and serve are to decode: `strategy_of`, or Auto.

    Raises:
      UserError: likewise, and for --mode auto beside a flag that fixes a strategy.
    """
    fixing = [name for name in FIXING if vars(args)[name] is not None]
    if args.mode == "auto" and fixing:
        flag = f"--{fixing[0].replace('_', '-')} {vars(args)[fixing[0]]}"
        raise UserError(f"{flag} beside --mode auto, which chooses it: leave one of them out")
    if args.mode in ("orthrus", "ar") or fixing:
        return strategy_of(args)
    return Auto(args.accept or AcceptRule.COUPLED, args.pairwise)


def chosen_decoding(args: argparse.Namespace, model: LLM, batch: int) -> Strategy | Auto:
    """`decoding_of`, with --rows the planner's strategy; warns of drafts that cannot pay."""
    how = decoding_of(args)
    if isinstance(how, Auto):
        return how
    if how.method != "ar" and not model.trained:
        print(
            "note: this model's diffusion view is untrained: texts are exact, but --mode ar is "
            "faster until train.main has trained it",
            file=sys.stderr,
        )
    return chosen_strategy(args, model, batch)


def chosen_strategy(args: argparse.Namespace, model: LLM, batch: int) -> Strategy:
    """`strategy_of`, or with --rows the planner's, which is then printed with its reason."""
    strategy = strategy_of(args)
    if args.rows is None:
        return strategy
    choice = planner.choose(model.calibration, args.rows, batch, model.config.block_size)
    flags = choice.strategy.given().items()
    spelled = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags)
    print(f"--rows {args.rows}: {spelled}\n  {choice.why}", file=sys.stderr)
    return dataclasses.replace(choice.strategy, accept=strategy.accept, pairwise=strategy.pairwise)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that `add_sampling` parsed.

    Raises:
      UserError: for a value that no model could follow.
    """
    names = ["min_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed"]
    options = {name: getattr(args, name) for name in names}
    options |= {"stop": tuple(args.stop), "stop_token_ids": tuple(args.stop_token_id)}
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    SamplingParams(**options)
    return options


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Add --view, --dtype, --mesh and --compile-cache."""
    parser.add_argument(
        "--view",
        metavar="FILE_OR_DIR_OR_ID",
        help="a diffusion view that was saved without its base, to draft for --model",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="decode on several devices: data=N,tensor=M divides rows over N and heads over M; "
        "one of them may be -1, the remaining devices; default: one device",
    )
    add_compile_cache(parser)


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    """Add --kv-cache."""
    parser.add_argument(
        "--kv-cache",
        choices=kv_config.NAMES,
        default=kv_config.UNQUANTISED,
        help="bits of the cache's keys and values; bf16 is the model's own type; the others hold "
        "longer contexts and change texts a little; default: %(default)s",
    )


def add_compile_cache(parser: argparse.ArgumentParser) -> None:
    """Add --compile-cache."""
    parser.add_argument(
        "--compile-cache",
        "--compile_cache",  # as the configured commands of train/ spell it
        metavar="DIR",
        help="where compiled programs are kept, or off; "
        "default: JAX_COMPILATION_CACHE_DIR, or a directory of yours",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """Set up devices and compilation cache; return view, dtype, mesh as `llm.load` takes them.

    With kv_cache, where the command has --kv-cache.

    Raises:
      UserError: for a device or a directory that is not there.
    """
    check_devices()
    enable_compilation_cache(args.compile_cache)
    options = {"view": args.view, "dtype": args.dtype, "mesh": parse_mesh(args.mesh)}
    quantised = {"kv_cache": args.kv_cache} if "kv_cache" in args else {}
    return options | quantised


def parse_mesh(text: str | None) -> jax.sharding.Mesh | None:
    """The mesh that --mesh names; None without the flag.

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


def read_stdin() -> str:
    """All of standard input, UTF-8 whatever the locale.

    Raises:
      UserError: when it is closed or is not UTF-8.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed: give the prompt as --prompt TEXT")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error})") from None


def print_pieces(pieces: Pieces) -> Completion:
    """Print text as it grows; return the completion."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value
