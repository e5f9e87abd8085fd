"""What a run's answers come to: numbers, a table, a page. `python -m eval.report RUN [RUN ...]`.

Every number is made from RUN/recipe.json and RUN/answers.jsonl alone, by the definitions of
docs/design.md. Writes results.json and report.html for each run; for several, compares them.
"""

import argparse
import collections
import html
import io
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orthrus_jax.engine import BLOCKS
from orthrus_jax.errors import UserError, run_command

RECIPE, ANSWERS, RESULTS, PAGE = "recipe.json", "answers.jsonl", "results.json", "report.html"
LOOPS = ("ar", "orthrus")  # in the order they take turns
Z95 = 1.959964  # of the normal distribution, two-sided 95 %
Row = Mapping[str, Any]

NOTES = """accuracy: 95 % Wilson interval over problems; of several samples, their mean a problem.
acceptance length: accepted drafts a cycle, the AR view's own token not counted.
tokens per forward: tokens / (1 prefill + 2 a cycle; AR: 1 a token), mean over problems / pooled; \
not a speedup.
tokens/s: of all answers over the wall-clock of decoding, prefill included; tokenising, grading \
and compiling are not. Every program is compiled ahead of time, outside the clock, and both loops \
ran before it started.
speedup: wall-clock AR / Orthrus over the same problems, the loops taking turns chunk by chunk; in \
brackets the chunks' range.
first token: median milliseconds from a request's admission to its first token, without compiling; \
in a batch, its whole prefill.
same text: answers whose tokens are equal in both loops, greedy or coupled."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `count`; (0, 1) where there is none."""
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


def read_answers(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of answers.jsonl, and how many bytes they take.

    What stands behind them, the torn end of a killed run, is left out.

    Raises:
      UserError: for a damaged line that is not the last, or a problem that comes twice.
    """
    if not path.exists():
        return [], 0
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        lines.append(torn)
    rows: dict[str, dict[str, Any]] = {}
    size = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key = row["id"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is damaged: delete the line, then --resume") from None
        if number == len(lines) and torn:  # whole, but for its newline
            break
        if key in rows:
            raise UserError(f"{path}:{number} answers {key} once more: delete one of the lines")
        rows[key] = row
        size += len(line) + 1
    return list(rows.values()), size


def read_run(directory: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe and the answered problems of a run.

    Raises:
      UserError: naming a directory that holds no run.
    """
    directory = pathlib.Path(directory)
    try:
        recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
        recipe["asked"], recipe["problems"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory} holds no run: expected the --out directory of an eval command, with "
            f"{RECIPE} and {ANSWERS} in it"
        ) from None
    return recipe, read_answers(directory / ANSWERS)[0]


def numbers(recipe: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of a run, as results.json holds them; see NOTES."""
    asked = recipe["asked"]
    loops = [loop for loop in LOOPS if asked["mode"] in (loop, "both")]
    alone = asked["batch_size"] == 1
    result: dict[str, Any] = {
        **recipe,
        "answered": len(rows),
        "loops": {loop: _loop(recipe, rows, loop) for loop in loops},
    }
    for loop, found in result["loops"].items():
        found |= _rate(found["tokens"], sum(row["seconds"][loop] for row in rows))
    if len(loops) == 2 and rows:
        pairs = [(row["seconds"]["ar"], row["seconds"]["orthrus"]) for row in rows]
        ratios = [ar / orthrus for ar, orthrus in pairs if orthrus]
        if ratios:
            ar, orthrus = (sum(times) for times in zip(*pairs, strict=True))
            result["speedup"] = ar / orthrus
            result["speedup_range"] = [min(ratios), max(ratios)]
        if asked["temperature"] == 0 or asked["accept"] == "coupled":
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
    for loop, found in result["loops"].items():
        found |= _rate(found["tokens"], seconds[loop])
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
    """What one loop did with these problems."""
    decoded = [answers for row in rows if (answers := _answers(row, loop))]
    every = list(itertools.chain.from_iterable(decoded))
    whole = [a for row in rows for a in row["answers"] if a["loop"] == loop]
    tokens, forwards = (sum(a[name] for a in every) for name in ("tokens", "forwards"))
    of_each = [
        sum(a["tokens"] for a in answers) / sum(a["forwards"] for a in answers)
        for answers in decoded
    ]
    result: dict[str, Any] = {
        "problems": len(rows),
        "answers": len(every),
        "skipped": len(whole) - len(every),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": statistics.mean(of_each) if of_each else 0.0,
        "tokens_per_forward_pooled": tokens / forwards if forwards else 0.0,
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
    """Accepted drafts: the mean a cycle, pooled and of each problem; shares by position, by count.

    counts of 3 cycles, K = 4: 2 0 3  ->  by position .67 .67 .33, distribution .33 0 .33 .33
    """
    cycles = [[n for a in answers for n in a["accepted"]] for answers in decoded]
    counts = collections.Counter(itertools.chain.from_iterable(cycles))
    total = counts.total()
    share = lambda wanted: sum(counts[n] for n in wanted) / total if total else 0.0
    means = [statistics.mean(each) for each in cycles if each]
    return {
        "cycles": total,
        "acceptance_length": sum(n * c for n, c in counts.items()) / total if total else 0.0,
        "acceptance_length_of_problems": statistics.mean(means) if means else 0.0,
        "acceptance_by_position": [share(range(i, block_size)) for i in range(1, block_size)],
        "accepted_distribution": [share([n]) for n in range(block_size)],
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
    """How many answers are the same tokens in both loops, and which problems are not."""
    ar, orthrus = (_digests(rows, loop) for loop in LOOPS)
    unlike = [key for key in ar if ar[key] != orthrus.get(key)]
    return {
        "same_text": 1 - len(unlike) / len(ar) if ar else 1.0,
        "unlike": list(dict.fromkeys(key[0] for key in unlike)),
    }


def across(runs: Mapping[str, tuple[Row, Sequence[Row]]]) -> list[str]:
    """How many answers of each run are the first run's, where both were to say the same.

    AR of the first run, if it has it, against Orthrus of the other, if it has it.
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
            share = sum(left[key] == right[key] for key in both) / len(both)
            lines.append(f"same text in {first} and {run}: {_share(share)} of {len(both)} answers")
    return lines


# What a table shows: a heading, and how a loop's figures (and the whole's) give the cell.
def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _accuracy_cell(loop: Row, whole: Row) -> str:
    if "accuracy" not in loop:
        return ""
    low, high = loop["accuracy_interval"]
    return f"{100 * loop['accuracy']:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def _speedup_cell(loop: Row, whole: Row) -> str:
    if "acceptance_length" not in loop or "speedup" not in whole:
        return ""
    low, high = whole.get("speedup_range", (0, 0))  # of one chunk there is no range
    return f"{whole['speedup']:.2f}" + (f" ({low:.2f}-{high:.2f})" if low < high else "")


Cell = Callable[[Row, Row], str]
COLUMNS: Mapping[str, Cell] = {
    "problems": lambda loop, whole: str(loop["problems"]),
    "accuracy (95 %)": _accuracy_cell,
    "acceptance length": lambda loop, whole: (
        f"{loop['acceptance_length']:.2f}" if "acceptance_length" in loop else ""
    ),
    "tokens per forward": lambda loop, whole: (
        f"{loop['tokens_per_forward']:.2f} / {loop['tokens_per_forward_pooled']:.2f}"
    ),
    "tokens": lambda loop, whole: str(loop["tokens"]),
    "tokens/s": lambda loop, whole: (
        f"{loop['tokens_per_second']:.1f}" if "tokens_per_second" in loop else ""
    ),
    "first token (ms)": lambda loop, whole: f"{loop['first_token_ms']:.1f}",
    "speedup": _speedup_cell,
    "same text": lambda loop, whole: (
        _share(whole["same_text"]) if "same_text" in whole and "acceptance_length" in loop else ""
    ),
}
Table = list[list[str]]  # the first row is the heading


def _table(named: Iterable[tuple[Sequence[str], Row]], heading: Sequence[str]) -> Table:
    """A line for each loop of each of these figures; columns without any entry are left out."""
    lines = [
        [*names, loop, *(cell(found, whole) for cell in COLUMNS.values())]
        for names, whole in named
        for loop, found in whole["loops"].items()
    ]
    whole_table = [[*heading, "loop", *COLUMNS], *lines]
    kept = [i for i, column in enumerate(zip(*lines, strict=True)) if any(column)]
    return [[line[i] for i in kept] for line in whole_table]


def runs_table(results: Mapping[str, Row]) -> Table:
    """A line for each loop of each run."""
    return _table(
        (((run, r["title"], r["model"]), r) for run, r in results.items()),
        ("run", "benchmark", "model"),
    )


def group_tables(result: Row) -> dict[str, Table]:
    """A table for each way the problems are grouped."""
    return {
        kind: _table((((name,), figures) for name, figures in groups.items()), (kind,))
        for kind, groups in result["groups"].items()
    }


def details(result: Row) -> list[str]:
    """Lines that say how a run went, beside its tables."""
    asked, loaded = result["asked"], result["loaded"]
    lines = []
    if not result["trained"]:
        lines.append(
            "the diffusion view is untrained: acceptance and speed say nothing of the method"
        )
    if result["answered"] < result["problems"]:
        lines.append(f"unfinished: {result['answered']} of {result['problems']} problems")
    chosen = "greedy"
    if asked["temperature"]:
        names = ("temperature", "top_p", "top_k", "seed", "n", "accept")
        chosen = ", ".join(f"{name} {asked[name]}" for name in names)
    ahead = ""
    if loaded.get("cycle", "paper") != "paper":
        spent = [f"{loaded[kind]} {kind.replace('_', ' ')}" for kind in BLOCKS if loaded[kind]]
        ahead = ", ".join(["", f"{loaded['cycle']} cycle", *spent])
    lines.append(
        f"{chosen}; {'thinking' if asked['thinking'] else 'not thinking'}; at most "
        f"{asked['max_new_tokens']} new tokens; batch {asked['batch_size']}; "
        f"K = {loaded['draft_length']}{ahead}; {loaded['dtype']}; {result['hardware']}"
    )
    for loop, found in result["loops"].items():
        told = [f"{_share(found['ended'])} of the answers ended by themselves"]
        if found["skipped"]:
            told.append(f"{found['skipped']} did not fit the model's positions")
        if len(found.get("pass_at", {})) > 1:
            told += [f"pass@{k} {_share(v)}" for k, v in found["pass_at"].items()]
        told += [f"{note}: {count}" for note, count in found.get("notes", {}).items()]
        lines.append(f"{loop}: {'; '.join(told)}")
    if unlike := result.get("unlike"):
        more = f" and {len(unlike) - 10} more" if len(unlike) > 10 else ""
        lines.append(f"not the same text in both loops: {', '.join(unlike[:10])}{more}")
    if shares := result["loops"].get("orthrus", {}).get("acceptance_by_position"):
        lines.append(f"accepted by position: {' '.join(f'{share:.2f}' for share in shares)}")
    return lines


def _markdown(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    line = lambda cells: f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"
    ruler = "|".join(["", *("-" * (width + 2) for width in widths), ""])
    return "\n".join([line(table[0]), ruler, *map(line, table[1:])])


def text(results: Mapping[str, Row]) -> str:
    """The tables for a terminal, in Markdown."""
    parts = [_markdown(runs_table(results))]
    for run, result in results.items():
        head = [run] if len(results) > 1 else []
        parts.append("\n".join([*head, *details(result)]))
        if len(results) == 1:
            parts += [_markdown(table) for table in group_tables(result).values()]
    return "\n\n".join(parts)


def page(results: Mapping[str, Row], lines: Sequence[str] = ()) -> str:
    """The same as one HTML page, with plots and further lines; it needs nothing from anywhere."""
    body = [_html_table(runs_table(results)), _html_list(lines), *_plots(results)]
    for run, result in results.items():
        body.append(f"<h2>{html.escape(run)}: {html.escape(result['title'])}</h2>")
        body.append(_html_list(details(result)))
        body += [_html_table(table) for table in group_tables(result).values()]
    body.append("".join(f"<p>{html.escape(line)}</p>" for line in NOTES.splitlines()))
    title = html.escape(", ".join(f"{r['title']}, {r['model']}" for r in results.values()))
    return PAGE_FRAME.format(title=title, body="\n".join(body))


PAGE_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
div {{ overflow-x: auto }}
th, td {{ padding: .25em .7em; border-bottom: 1px solid #ccc; text-align: left }}
td {{ white-space: nowrap }}
svg {{ max-width: 100%; height: auto }}
p {{ color: #555; margin: .3em 0 }}
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def _html_list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _html_table(table: Table) -> str:
    row = lambda tag, cells: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    lines = [f"<tr>{row('td', line)}</tr>" for line in table[1:]]
    return f"<div><table><tr>{row('th', table[0])}</tr>{''.join(lines)}</table></div>"


def _plots(results: Mapping[str, Row]) -> list[str]:
    """Inline SVG: acceptance by position and by count, tokens/s, and the groups of a single run."""
    drafted = {run: r["loops"]["orthrus"] for run, r in results.items() if "orthrus" in r["loops"]}
    drafted = {run: found for run, found in drafted.items() if found["cycles"]}

    def acceptance(left: Any, middle: Any, right: Any) -> None:
        for run, found in drafted.items():
            shares = found["acceptance_by_position"]
            left.plot(range(1, len(shares) + 1), shares, "o-", label=run)
            shares = found["accepted_distribution"]
            middle.plot(range(len(shares)), shares, "o-", label=run)
        left.set(xlabel="draft position", ylabel="accepted (share of cycles)", ylim=(0, 1.02))
        middle.set(xlabel="drafts accepted in a cycle", ylabel="share of cycles", ylim=(0, None))
        for axis in (left, middle):
            axis.xaxis.get_major_locator().set_params(integer=True)
        if len(drafted) > 1:
            left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        rates = [
            (loop if len(results) == 1 else f"{run}\n{loop}", found["tokens_per_second"])
            for run, r in results.items()
            for loop, found in r["loops"].items()
        ]
        bars = right.bar(range(len(rates)), [rate for _, rate in rates], color="tab:gray")
        right.bar_label(bars, fmt="%.0f")
        right.margins(y=0.12)  # room for the labels
        right.set_xticks(range(len(rates)), [name for name, _ in rates], fontsize=8)
        right.set(ylabel="tokens/s")

    plots = [_svg("acceptance", 3, acceptance)]
    if len(results) == 1:
        (result,) = results.values()
        plots += [_group_plot(kind, groups) for kind, groups in result["groups"].items()]
    return plots


def _group_plot(kind: str, groups: Mapping[str, Row]) -> str:
    """Each group's accuracy with its interval (where graded) and tokens per forward."""
    graded = any("accuracy" in f for g in groups.values() for f in g["loops"].values())

    def draw(*axes: Any) -> None:
        loops = next(iter(groups.values()))["loops"]
        for i, loop in enumerate(loops):
            figures = [group["loops"][loop] for group in groups.values()]
            at = [place + (i - (len(loops) - 1) / 2) * 0.35 for place in range(len(figures))]
            axes[-1].barh(at, [f["tokens_per_forward"] for f in figures], 0.33, label=loop)
            if graded:
                shares = [f["accuracy"] for f in figures]
                ends = [f["accuracy_interval"] for f in figures]
                errors = [
                    [max(0.0, s - low) for s, (low, _) in zip(shares, ends, strict=True)],
                    [max(0.0, high - s) for s, (_, high) in zip(shares, ends, strict=True)],
                ]
                axes[0].errorbar(shares, at, xerr=errors, fmt="o", capsize=2, label=loop)
        for axis in axes:
            axis.set_yticks(range(len(groups)), list(groups), fontsize=8)
            axis.invert_yaxis()
            axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        axes[-1].set(xlabel="tokens per forward")
        if graded:
            axes[0].set(xlabel="accuracy, 95 % interval", xlim=(0, 1))

    return _svg(kind, 1 + graded, draw, height=1.6 + 0.35 * len(groups))


def _svg(name: str, columns: int, draw: Callable[..., None], height: float = 3.4) -> str:
    """A figure of so many axes as an <svg> element; its ids are of its own name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure, axes = pyplot.subplots(
            1, columns, figsize=(4.2 * columns, height), layout="constrained", squeeze=False
        )
        draw(*axes[0])
        out = io.StringIO()
        figure.savefig(
            out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format"))
        )
        pyplot.close(figure)
    whole = out.getvalue()
    return whole[whole.index("<svg") :]


def write(path: pathlib.Path, content: str) -> None:
    """Write a whole file or none: under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


def finish(directory: pathlib.Path) -> dict[str, Any]:
    """Make a run's numbers and write its results.json and report.html."""
    result = numbers(*read_run(directory))
    write(directory / RESULTS, json.dumps(result, indent=2) + "\n")
    write(directory / PAGE, page({directory.name: result}))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Numbers of one benchmark run, or of several side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out directory of an eval command")
    parser.add_argument(
        "--html", metavar="FILE", help="default: RUN/report.html, of several compare.html"
    )
    args = parser.parse_args(argv)
    results = {run: finish(pathlib.Path(run)) for run in dict.fromkeys(args.runs)}
    lines = across({run: read_run(run) for run in results})
    print("\n".join([text(results), *lines]))
    usual = pathlib.Path(args.runs[0], PAGE) if len(results) == 1 else "compare.html"
    out = pathlib.Path(args.html or usual)
    write(out, page(results, lines))
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    run_command(main)
