"""Answers under load: `python -m eval.load --server ar=URL --server default=URL`.

An open loop: requests come by a Poisson process, whether or not earlier ones are answered, and
their waiting counts from the moment at which they were due. Decides when requests come and what is
reported; load_client.py asks. Its number and its time are bounded. Start it on the servers' own
machine or beside it, against servers of your own.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import platform
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from eval.arguments import check_output, positive, positive_list
from eval.load_client import Answer, Server, ask, memory_mib, server_of
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import read_prompts, write_atomic
from train.problems import problems

ALONE = 5  # answers one after another, whose median sets the rate of arrivals
SAMPLES = 20  # of a server's memory, over a run
SECONDS = (0.001, 86_400)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.load", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--server",
        action="append",
        required=True,
        metavar="NAME=URL",
        help="one that runs, and its name in the report; may be repeated: all get the same "
        "requests at the same times, in turns",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help='JSON lines {"prompt": TEXT}; default: word problems'
    )
    parser.add_argument(
        "--concurrency",
        type=positive_list,
        default=[1, 4, 16],
        metavar="N,...",
        help="answers in flight on average, if they took no longer together than alone: sets the "
        "rate of arrivals, from the first server's time of an answer; default: 1,4,16",
    )
    parser.add_argument("--rate", type=float, metavar="X", help="arrivals per second, in its place")
    parser.add_argument(
        "--requests", type=positive, default=100, metavar="N", help="per turn; default: 100"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="for one turn; default: %(default)g",
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="per answer; default: 128"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy"
    )
    parser.add_argument("--repeats", type=positive, default=1, metavar="N", help="turns of each")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    check_output("--json", args.json)
    for flag, value in (("--rate", args.rate), ("--seconds", args.seconds)):
        if value is not None and not SECONDS[0] <= value <= SECONDS[1]:
            raise UserError(f"{flag} {value}: expected {SECONDS[0]} to {SECONDS[1]}")
    servers = [server_of(value) for value in args.server]
    if len({server.name for server in servers}) < len(servers):
        raise UserError("--server: each needs a name of its own")
    drawn = problems("held-out", args.seed, args.requests)
    prompts = read_prompts(args.prompts) if args.prompts else [one.question for one in drawn]
    result = asyncio.run(measure(servers, prompts, args))
    print(table(result))
    if args.json:
        write_atomic(args.json, json.dumps(result, indent=2) + "\n")


def body_of(args: argparse.Namespace, server: Server, prompt: str) -> dict[str, Any]:
    """One request's body."""
    options = {"stream_options": {"include_usage": True, "include_cycles": True}}
    if args.temperature:
        options["seed"] = args.seed
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        **options,
    }


def arrivals(rate: float, count: int, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, in seconds from its begin: at most `count`, within `seconds`."""
    dice, times, now = random.Random(seed), list[float](), 0.0
    while len(times) < count and (now := now + dice.expovariate(rate)) < seconds:
        times.append(now)
    return times


# Turns


async def measure(
    servers: Sequence[Server], prompts: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """All figures, as --json has them.

    Raises:
      UserError: for a server that does not answer.
    """
    servers = [await server.described() for server in servers]
    alone = {server.name: await seconds_alone(server, prompts, args) for server in servers}
    first = alone[servers[0].name]
    levels = [(None, args.rate)] if args.rate else [(c, c / first) for c in args.concurrency]
    turns = [(level, repeat) for level in levels for repeat in range(args.repeats)]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {platform.system()}, client Python "
        f"{platform.python_version()}",
        "recipe": {name: value for name, value in vars(args).items() if name != "json"},
        "servers": {server.name: dataclasses.asdict(server) for server in servers},
        "seconds_alone": alone,
        "turns": [],
    }
    total = len(turns) * len(servers) * args.requests
    with tqdm(total=total, desc="requests", file=sys.stderr) as bar:
        for (concurrency, rate), repeat in turns:
            times = arrivals(rate, args.requests, args.seconds, args.seed + repeat)
            texts: dict[str, dict[int, str]] = {}
            for server in servers:
                bar.set_description(f"{server.name}, {rate:.3g} per second")
                bodies = [
                    body_of(args, server, prompts[i % len(prompts)]) for i in range(len(times))
                ]
                answers, memory = await turn(server, bodies, times, args.seconds, bar)
                bar.update(args.requests - len(times))  # those for which time did not last
                texts[server.name] = {a.number: a.text for a in answers if a.failure is None}
                figures = summary(answers, texts[servers[0].name])
                head = {"server": server.name, "concurrency": concurrency, "repeat": repeat}
                result["turns"].append({**head, "rate": rate, **figures, "memory_mib": memory})
    return result


async def seconds_alone(server: Server, prompts: Sequence[str], args: argparse.Namespace) -> float:
    """The median time of an answer to which the server attends alone.

    Raises:
      UserError: if it fails.
    """
    seconds = []
    for i in range(ALONE):
        answer = await ask(server, body_of(args, server, prompts[-1 - i % len(prompts)]), 0.0, i)
        if answer.failure is not None:
            raise UserError(f"--server {server.name}={server.url}: {answer.failure}")
        seconds.append(answer.end - answer.sent)
    return max(statistics.median(seconds), 1e-6)


async def turn(
    server: Server,
    bodies: Sequence[dict[str, Any]],
    times: Sequence[float],
    seconds: float,
    bar: Any,
) -> tuple[list[Answer], list[tuple[int, float | None]]]:
    """Send each body at its time; what is not answered after twice the seconds is cut.

    Returns:
      Answers in the order of arrival, and (requests answered, server's MiB), sampled over the turn.
    """
    loop = asyncio.get_running_loop()
    begin, memory, done = loop.time(), [(0, await memory_mib(server))], 0

    async def one(i: int) -> Answer:
        nonlocal done
        due = begin + times[i]
        await asyncio.sleep(due - loop.time())
        answer = await ask(server, bodies[i], due, i, begin + 2 * seconds)
        done += 1
        bar.update()
        if done % max(1, len(times) // SAMPLES) == 0:
            memory.append((done, await memory_mib(server)))
        return answer

    answers = list(await asyncio.gather(*map(one, range(len(times)))))
    return answers, memory


# Figures


def summary(answers: Sequence[Answer], expected: dict[int, str]) -> dict[str, Any]:
    """One turn's figures; seconds are of answers that came whole.

    Args:
      answers: of the turn.
      expected: another server's texts of the same requests, by number.
    """
    whole = [a for a in answers if a.failure is None]
    failures: dict[str, int] = {}
    for answer in answers:
        if answer.failure is not None:
            failures[answer.failure] = failures.get(answer.failure, 0) + 1
    compared = [a.text == expected[a.number] for a in whole if a.number in expected]
    tokens, forwards = sum(a.tokens for a in whole), sum(a.forwards for a in whole)
    span = max((a.end for a in whole), default=0.0) - min((a.due for a in answers), default=0.0)
    return {
        "requests": len(answers),
        "answered": len(whole),
        "failures": failures,
        "tokens": tokens,
        "tokens_per_second": tokens / span if whole else None,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "cached_prompt_tokens": sum(a.cached for a in whole),
        "same_text": sum(compared) / len(compared) if compared else None,
        "first_token_seconds": spread([a.first - a.due for a in whole]),
        "token_seconds": spread([t for t in map(seconds_per_token, whole) if t is not None]),
        "answer_seconds": spread([a.end - a.due for a in whole]),
        "sent_late_seconds": spread([a.sent - a.due for a in answers]),  # the client's own delay
    }


def seconds_per_token(answer: Answer) -> float | None:
    """Of the tokens after the first piece; None if there are none: a piece has several."""
    rest = answer.tokens - answer.first_tokens
    return (answer.end - answer.first) / rest if rest else None


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile, by nearest rank; None of nothing."""
    ordered = sorted(values)
    rank = lambda share: ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
    return {"p50": rank(0.5), "p99": rank(0.99)} if ordered else None


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| server | in flight aimed at | arrivals/s | answered | tokens/s | tokens per forward | "
        "first token p50 / p99, ms | per token, ms | whole answer, ms | same text "
        "| MiB first, last |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    milliseconds = lambda one: f"{one['p50'] * 1e3:.1f} / {one['p99'] * 1e3:.1f}" if one else "?"
    shown = lambda value, form: "?" if value is None else format(value, form)
    for t in result["turns"]:
        memory = [mib for _, mib in t["memory_mib"]]
        lines.append(
            f"| {t['server']} | {t['concurrency'] or ''} | {t['rate']:.3g} "
            f"| {t['answered']} of {t['requests']} | {shown(t['tokens_per_second'], '.1f')} "
            f"| {shown(t['tokens_per_forward'], '.2f')} | {milliseconds(t['first_token_seconds'])} "
            f"| {milliseconds(t['token_seconds'])} | {milliseconds(t['answer_seconds'])} "
            f"| {shown(t['same_text'], '.3f')} "
            f"| {shown(memory[0], '.0f')}, {shown(memory[-1], '.0f')} |"
        )
    failures = [f"{t['server']}: {n} times {why}" for t in result["turns"]
                for why, n in t["failures"].items()]  # fmt: skip
    return "\n".join([*lines, *failures])


if __name__ == "__main__":
    run_command(main)
