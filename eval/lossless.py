"""Audit exactness: `python -m eval.lossless --model DIR_OR_ID --prompts FILE.jsonl`.

Checks whether Orthrus emits the AR view's own text, with these weights, in this dtype, on this
machine. Orthrus decodes; then the AR view reads each text again (teacher-forced) and checks every
token, not only the first that differs. Three parts:

  greedy     each token is the AR view's argmax, or a near-tie
  coupled    the same with the temperature's noise added to the logits: AR's text for the seed
  rejection  the tokens are distributed as the AR view's p: four statistics

The references and near-ties are defined in reference.py, the checks in audit.py and audit_law.py.
`--near-tie` sets the gap that is allowed.
"""

import argparse
import dataclasses
import json
import math
import platform
import sys
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

import orthrus_jax
from eval.arguments import check_output
from eval.audit import PARTS, Audit, Failure, Options, audit_choices
from eval.audit_law import Z_LIMIT, audit_law, check_enough
from orthrus_jax import cli
from orthrus_jax.cli import add_cycle, strategy_of
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import read_prompts, write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.tokenizer import encode

SHOWN = 10  # failures and divergences printed; --json has all
PASSES = {"greedy": 6, "coupled": 6, "rejection": 2}  # over each text, for the progress bar


def audit(model: LLM, prompts: Sequence[Sequence[int]], options: Options) -> dict[str, Any]:
    """Audit a model on prompts of ids.

    Returns:
      Settings, one entry per part (see `audit_choices` and `audit_law`) and "failures", a list of
      Failure: an empty one is a pass.

    Raises:
      UserError: for prompts that cannot be decoded, or budgets too small for a verdict.
    """
    if not prompts:
        raise UserError("there is no prompt to audit")
    run = Audit(model, prompts, options)
    requests_by_part = {part: run.requests(part) for part in PARTS if part in options.parts}
    for part, requests in requests_by_part.items():
        model.engine.check(requests, run.plan)
        if part == "rejection":
            check_enough(requests)
    total = sum(PASSES[part] * len(requests) for part, requests in requests_by_part.items())
    parts, failures = {}, []
    with tqdm(total=total, unit="text", file=sys.stderr, disable=not options.progress) as run.bar:
        for part, requests in requests_by_part.items():
            audit_part = audit_law if part == "rejection" else audit_choices
            parts[part], its_failures = audit_part(run, part, requests)
            failures += its_failures
    return {
        "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}",
        "dtype": model.config.dtype,
        "near_tie": run.near_tie,
        "prompts": len(prompts),
        "options": _plain(options),
        "parts": parts,
        "failures": failures,
    }


def _plain(options: Options) -> dict[str, Any]:
    """The options as --json has them, the strategy in the words of the command line."""
    fields = dataclasses.asdict(options) | options.strategy.flags()
    return {name: value for name, value in fields.items() if name not in ("strategy", "mode")}


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table, the widest divergences, the failures and the verdict."""
    lines = [
        f"{result['prompts']} prompts, {result['dtype']}, {result['hardware']}; near-tie: "
        f"{result['near_tie']:.4g} standard deviations of the row's logits",
        "",
        "| part | compared with AR | texts | exact match | tokens | not AR's argmax "
        "| largest gap, logits (deviations) |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = {k: v for k, v in result["parts"].items() if k != "rejection"}
    for part, figures in chosen.items():
        for name, f in {"Orthrus": figures["orthrus"], **figures["floor"]}.items():
            tail = "| | | |"
            if "tokens" in f:
                tail = (
                    f"| {f['tokens']} | {f['flips']} | {f['largest_gap']:.3g} "
                    f"({f['largest_relative_gap']:.3g}) |"
                )
            lines.append(f"| {part} | {name} | {figures['texts']} | {f['exact_match']:.4f} {tail}")
    for part, figures in chosen.items():
        lines += _divergence_lines(part, figures["divergences"])
    if "rejection" in result["parts"]:
        lines += _law_lines(result["parts"]["rejection"])
    lines.append("")
    for part, figures in result["parts"].items():
        lines.append(f"{part}: {figures['acceptance_length']:.2f} drafts accepted per cycle")
        if not figures["acceptance_length"]:
            lines[-1] += ": only corrections were audited, no accepted draft"
    return "\n".join([*lines, "", *_verdict(result)])


def _divergence_lines(part: str, divergences: list[dict[str, Any]]) -> list[str]:
    if not divergences:
        return []
    width = lambda d: math.inf if d["gap"] is None else abs(d["gap"])
    lines = [
        "",
        f"{part}: {len(divergences)} texts leave AR's; where, and the gap between the two tokens",
    ]
    for d in sorted(divergences, key=width, reverse=True)[:SHOWN]:
        where = f"prompt {d['prompt']}, seed {d['seed']}, position {d['position']}"
        lines.append(f"  {where}: {d['token']}, AR {d['ar_token']}")
        if d["gap"] is not None:
            lines[-1] += f", gap {d['gap']:.4g} logits (near-tie: {d['limit']:.4g})"
    if len(divergences) > SHOWN:
        lines.append(f"  and {len(divergences) - SHOWN} with narrower gaps")
    return lines


def _law_lines(figures: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"| rejection: {figures['texts']} texts, {figures['tokens']} tokens "
        f"| z (within +-{Z_LIMIT:.3g}) | shift of the mean | would show |",
        "|---|---|---|---|",
    ]
    for name, z in figures["z"].items():
        shifts = [figures[key].get(name) for key in ("shift", "would_see")]
        cells = ["" if x is None else f"{x:.4f}" for x in shifts]
        lines.append(f"| {name} | {z:+.2f} | {' | '.join(cells)} |")
    return lines


def undecided(result: dict[str, Any]) -> str:
    """Why the distribution has no verdict; empty if it has one, or was not audited."""
    return result["parts"].get("rejection", {}).get("undecided", "")


def _verdict(result: dict[str, Any]) -> list[str]:
    failures: list[Failure] = result["failures"]
    if not failures:
        others = [part for part in result["parts"] if part != "rejection"]
        if undecided(result):
            return [f"PASS of {', '.join(others)}; no verdict on rejection"] if others else []
        return ["PASS"]
    shown: list[Failure] = []
    for part in PARTS:  # some of each part that fails
        shown += [failure for failure in failures if failure.part == part][:SHOWN]
    more = len(failures) - len(shown)
    tail = f", {more} more not shown" if more else ""
    return [*map(str, shown), f"FAIL: {len(failures)} failures{tail}"]


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m eval.lossless",
        description="Audit that Orthrus emits AR decoding's text: token by token, in distribution.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE.jsonl", help='one {"prompt": TEXT} per line'
    )
    number = lambda flag, kind, metavar, text: parser.add_argument(
        flag,
        type=kind,
        metavar=metavar,
        default=getattr(default, flag[2:].replace("-", "_"), None),
        help=text,
    )
    parser.add_argument("--limit", type=int, default=64, help="prompts used; default: %(default)s")
    number("--max-new-tokens", int, "N", "of each answer; default: %(default)s")
    number("--batch-size", int, "N", "texts decoded together; default: %(default)s")
    number(
        "--draft-length",
        int,
        "K",
        "default: as eval.calibrate measured here, or the trained K",
    )
    number("--temperature", float, "X", "of the sampled parts; default: %(default)s")
    number("--seeds", int, "N", "samples per prompt in the sampled parts; default: %(default)s")
    number(
        "--near-tie",
        float,
        "X",
        "the gap that is still a tie, in standard deviations of the row's logits; "
        "default: by dtype and depth",
    )
    parser.add_argument(
        "--parts",
        metavar="LIST",
        help=f"default: {','.join(PARTS)}; the last has its own rule only in the paper's cycle",
    )
    add_cycle(parser)
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wrap each prompt in the chat template",
    )
    cli.add_runtime(parser)
    parser.add_argument("--json", metavar="OUT", help="write all figures and failures to OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 1 where the audit fails, with 2 without a verdict."""
    args = _parser().parse_args(argv)
    strategy = strategy_of(args)
    names = ("max_new_tokens", "batch_size", "temperature", "seeds", "near_tie")
    chosen = {name: getattr(args, name) for name in names}
    own = [part for part in PARTS if strategy.method == "orthrus" or part != "rejection"]
    parts = args.parts.split(",") if args.parts else own
    options = Options(tuple(parts), strategy=strategy, progress=True, **chosen)
    if args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1")
    check_output("--json", args.json)
    prompts = read_prompts(args.prompts)[: args.limit]
    model = orthrus_jax.load(args.model, **cli.runtime_options(args))
    ids = [encode(model.tokenizer, text, chat=args.chat) for text in prompts]
    result = audit(model, ids, options)
    print(table(result))
    if args.json:
        plain = result | {"failures": [dataclasses.asdict(f) for f in result["failures"]]}
        write_atomic(args.json, json.dumps(plain, indent=2) + "\n")
    if result["failures"]:
        sys.exit(1)
    if why := undecided(result):
        raise UserError(why)


if __name__ == "__main__":
    run_command(main)
