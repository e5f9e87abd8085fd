"""Metrics of a benchmark run: accuracy, acceptance, speed, equal texts.

Every number is computed from RUN/recipe.json and RUN/answers.jsonl alone, with the definitions of
docs/metrics.md. records.py reads those files, report.py shows the figures. Knows no model and no
clock.
"""

import collections
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.records import LOOPS, Row
from orthrus_jax.metrics import acceptance_length, tokens_per_forward

Z95 = 1.959964  # of the normal distribution, two-sided 95 %


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `count`; (0, 1) if `count` is 0."""
    if not count:
        return 0.0, 1.0
    z = Z95**2 / count
    middle = share + z / 2
    spread = Z95 * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(0.0, (middle - spread) / (1 + z)), min(1.0, (middle + spread) / (1 + z))


def pass_at(k: int, right: int, count: int) -> float:
    """The chance that one of k of `count` samples is right: 1 - C(n - c, k) / C(n, k), unbiased.

    Source: arXiv 2107.03374.
    """
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def numbers(recipe: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of a run, as results.json holds them; see NOTES."""
    settings = recipe["asked"]
    loops = [loop for loop in LOOPS if settings["mode"] in (loop, "both")]
    alone = settings["batch_size"] == 1
    result: dict[str, Any] = {
        **recipe,
        "answered": len(rows),
        "loops": {loop: _loop(recipe, rows, loop) for loop in loops},
    }
    for loop, figures in result["loops"].items():
        figures |= _rate(figures["tokens"], sum(row["seconds"][loop] for row in rows))
    if len(loops) == 2 and rows:
        pairs = [(row["seconds"]["ar"], row["seconds"]["orthrus"]) for row in rows]
        ratios = [ar / orthrus for ar, orthrus in pairs if orthrus]
        if ratios:
            ar, orthrus = (sum(times) for times in zip(*pairs, strict=True))
            result["speedup"] = ar / orthrus
            result["speedup_range"] = [min(ratios), max(ratios)]
        if settings["temperature"] == 0 or settings["accept"] == "coupled":
            result |= _same(rows)
    result["groups"] = {
        kind: {
            name: _group(recipe, [row for row in rows if row["groups"][kind] == name], loops, alone)
            for name in _in_order(row["groups"][kind] for row in rows)
        }
        for kind in (rows[0]["groups"] if rows else {})
    }
    return result


def _group(recipe: Row, rows: Sequence[Row], loops: Sequence[str], alone: bool) -> dict[str, Any]:
    """A group's figures; its own times exist where answers were decoded one at a time."""
    result: dict[str, Any] = {"loops": {loop: _loop(recipe, rows, loop) for loop in loops}}
    if not alone:
        return result
    seconds = {
        loop: sum(a["seconds"] for row in rows for a in _answers(row, loop)) for loop in loops
    }
    for loop, figures in result["loops"].items():
        figures |= _rate(figures["tokens"], seconds[loop])
    if len(loops) == 2 and seconds["orthrus"]:
        result["speedup"] = seconds["ar"] / seconds["orthrus"]
    return result


def _in_order(names: Iterable[str]) -> list[str]:
    """Each name once: numbers by size, else in the order of the file."""
    once = list(dict.fromkeys(names))
    return sorted(once, key=int) if all(name.isdecimal() for name in once) else once


def _answers(row: Row, loop: str) -> list[dict[str, Any]]:
    """A problem's decoded answers: all samples and turns, without those that did not fit."""
    return [a for a in row["answers"] if a["loop"] == loop and "skipped" not in a]


def _rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds if seconds else 0.0}


def _loop(recipe: Row, rows: Sequence[Row], loop: str) -> dict[str, Any]:
    """One loop's figures over these problems."""
    decoded = [answers for row in rows if (answers := _answers(row, loop))]
    every = list(itertools.chain.from_iterable(decoded))
    whole = [a for row in rows for a in row["answers"] if a["loop"] == loop]
    sums = lambda answers: [sum(a[name] for a in answers) for name in ("tokens", "forwards")]
    tokens, forwards = sums(every)
    rates = [tokens_per_forward(*sums(answers)) for answers in decoded]
    result: dict[str, Any] = {
        "problems": len(rows),
        "answers": len(every),
        "skipped": len(whole) - len(every),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": statistics.mean(rates) if rates else 0.0,
        "tokens_per_forward_pooled": tokens_per_forward(tokens, forwards),
        "first_token_ms": statistics.median(a["first_seconds"] * 1e3 for a in every)
        if every
        else 0.0,
        "ended": statistics.mean(a["finish_reason"] == "stop" for a in every) if every else 0.0,
    }
    if loop == "orthrus":
        result |= _acceptance(decoded, recipe["loaded"]["draft_length"])
    if recipe["graded"]:
        result |= _accuracy(rows, loop, recipe["asked"]["n"])
    return result


def _acceptance(decoded: Sequence[Sequence[Row]], block_size: int) -> dict[str, Any]:
    """Accepted drafts: the mean per cycle, pooled and by problem; shares by position, by count.

    counts of 3 cycles, K = 4: 2 0 3  ->  by position .67 .67 .33, distribution .33 0 .33 .33

    A tree, or blocks drafted ahead, may have more than K - 1 drafts accepted in a cycle: the lists
    then end with the most that were.
    """
    cycles = [[n for a in answers for n in a["accepted"]] for answers in decoded]
    counts = collections.Counter(itertools.chain.from_iterable(cycles))
    total, most = counts.total(), max(block_size - 1, *counts, 0)
    share = lambda numbers: sum(counts[n] for n in numbers) / total if total else 0.0
    means = [acceptance_length([of_problem]) for of_problem in cycles if of_problem]
    return {
        "cycles": total,
        "acceptance_length": acceptance_length(cycles),
        "acceptance_length_of_problems": statistics.mean(means) if means else 0.0,
        "acceptance_by_position": [share(range(i, most + 1)) for i in range(1, most + 1)],
        "accepted_distribution": [share([n]) for n in range(most + 1)],
    }


def _accuracy(rows: Sequence[Row], loop: str, n: int) -> dict[str, Any]:
    """mean@n with its interval, pass@k, and why answers were not graded as mathematics or code."""
    verdicts = [[a for a in row["answers"] if a["loop"] == loop] for row in rows]
    right = [sum(bool(a.get("correct")) for a in answers) for answers in verdicts]
    mean = statistics.mean(c / n for c in right) if right else 0.0
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, n) if k <= n})
    notes = collections.Counter(
        note.partition(":")[0] for answers in verdicts for a in answers if (note := a.get("note"))
    )
    return {
        "accuracy": mean,
        "accuracy_interval": list(wilson(mean, len(rows))),
        "pass_at": {
            str(k): statistics.mean(pass_at(k, c, n) for c in right) if right else 0.0 for k in ks
        },
        "notes": dict(notes.most_common()),
    }


def _digests(rows: Sequence[Row], loop: str) -> dict[tuple[str, int, int], str]:
    """A checksum of the tokens of each answer, by problem, sample and turn."""
    return {
        (row["id"], a["sample"], a["turn"]): a["digest"]
        for row in rows
        for a in _answers(row, loop)
    }


def _same(rows: Sequence[Row]) -> dict[str, Any]:
    """The share of answers with the same tokens in both loops, and the problems that differ."""
    ar, orthrus = (_digests(rows, loop) for loop in LOOPS)
    unlike = [key for key in ar if ar[key] != orthrus.get(key)]
    return {
        "same_text": 1 - len(unlike) / len(ar) if ar else 1.0,
        "unlike": list(dict.fromkeys(key[0] for key in unlike)),
    }


def across(runs: Mapping[str, tuple[Row, Sequence[Row]]]) -> list[str]:
    """The share of each run's answers that equal the first run's, where exactness promises it.

    AR of the first run, if it has it, is compared with Orthrus of the other, if it has it.
    """
    (first, (recipe, rows)), *others = runs.items()
    sampling = ("temperature", "top_p", "top_k", "seed", "n")
    alike = lambda one, two: (
        all(one[name] == two[name] for name in ("data", "thinking", "max_new_tokens", *sampling))
        and (not one["temperature"] or one["accept"] == two["accept"] == "coupled")
    )
    lines = []
    for run, (other, its_rows) in others:
        if not alike(recipe["asked"], other["asked"]):
            continue
        left = _digests(rows, "orthrus" if recipe["asked"]["mode"] == "orthrus" else "ar")
        right = _digests(its_rows, "ar" if other["asked"]["mode"] == "ar" else "orthrus")
        if both := left.keys() & right.keys():
            share = 100 * sum(left[key] == right[key] for key in both) / len(both)
            lines.append(f"same text in {first} and {run}: {share:.1f} % of {len(both)} answers")
    return lines
