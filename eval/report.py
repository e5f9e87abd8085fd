"""Tables and an HTML page of benchmark runs: `python -m eval.report RUN [RUN ...]`.

The numbers are those of metrics.py. Writes results.json and report.html for each run; several runs
are compared. Knows no model.
"""

import argparse
import html
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eval import plots
from eval.arguments import check_output
from eval.metrics import across, numbers
from eval.records import Row, read_run
from orthrus_jax.decoding.strategy import SPENT_BY
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import first_line, write_atomic

RESULTS, PAGE = "results.json", "report.html"

NOTES = """accuracy: 95 % Wilson interval over problems; of several samples, their mean per problem.
acceptance length: accepted drafts per cycle, the AR view's own token not counted.
tokens per forward: tokens / (1 prefill + 2 per cycle; AR: 1 per token), mean over problems / \
pooled; not a speedup.
tokens/s: of all answers over the wall-clock of decoding, prefill included; tokenising, grading \
and compiling are not. Every program is compiled ahead of time, outside the clock, and both loops \
ran before it started.
speedup: wall-clock AR / Orthrus over the same problems, the loops taking turns chunk by chunk; in \
brackets the chunks' range.
first token: median milliseconds from a request's admission to its first token, without compiling; \
in a batch, its whole prefill.
same text: answers whose tokens are equal in both loops, greedy or coupled."""


# Columns: a heading, and the cell as a function of a loop's figures and the whole run's.
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
    low, high = whole.get("speedup_range", (0, 0))  # one chunk has no range
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
    """A line for each loop of these figures; columns without any entry are left out."""
    lines = [
        [*names, loop, *(cell(figures, whole) for cell in COLUMNS.values())]
        for names, whole in named
        for loop, figures in whole["loops"].items()
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
    """A table for each grouping of the problems."""
    return {
        kind: _table((((name,), figures) for name, figures in groups.items()), (kind,))
        for kind, groups in result["groups"].items()
    }


def details(result: Row) -> list[str]:
    """Lines that complete a run's tables: settings, endings, notes, differing texts."""
    settings, loaded = result["asked"], result["loaded"]
    lines = []
    if not result["trained"]:
        lines.append(
            "the diffusion view is untrained: acceptance and speed are not those of the method"
        )
    if result["answered"] < result["problems"]:
        lines.append(f"unfinished: {result['answered']} of {result['problems']} problems")
    chosen = "greedy"
    if settings["temperature"]:
        names = ("temperature", "top_p", "top_k", "seed", "n", "accept")
        chosen = ", ".join(f"{name} {settings[name]}" for name in names)
    ahead = ""
    if loaded.get("cycle", "paper") != "paper":
        spent = [f"{loaded[kind]} {kind.replace('_', ' ')}" for kind in SPENT_BY if loaded[kind]]
        ahead = ", ".join(["", f"{loaded['cycle']} cycle", *spent])
    lines.append(
        f"{chosen}; {'thinking' if settings['thinking'] else 'not thinking'}; at most "
        f"{settings['max_new_tokens']} new tokens; batch {settings['batch_size']}; "
        f"K = {loaded['draft_length']}{ahead}; {loaded['dtype']}; {result['hardware']}"
    )
    if layers := result.get("sandbox"):
        lines.append(f"programs ran in these layers: {', '.join(layers)}")
    for loop, figures in result["loops"].items():
        parts = [f"{_share(figures['ended'])} of the answers ended by themselves"]
        if figures["skipped"]:
            parts.append(f"{figures['skipped']} did not fit the model's positions")
        if len(figures.get("pass_at", {})) > 1:
            parts += [f"pass@{k} {_share(v)}" for k, v in figures["pass_at"].items()]
        parts += [f"{note}: {count}" for note, count in figures.get("notes", {}).items()]
        lines.append(f"{loop}: {'; '.join(parts)}")
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
    """The tables as one HTML page, with plots and further lines; it loads nothing else."""
    body = [_html_table(runs_table(results)), _html_list(lines), *_plots(results)]
    for run, result in results.items():
        body.append(f"<h2>{html.escape(run)}: {html.escape(result['title'])}</h2>")
        body.append(_html_list(details(result)))
        body += [_html_table(table) for table in group_tables(result).values()]
    body.append("".join(f"<p>{html.escape(line)}</p>" for line in NOTES.split("\n")))
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
    drafted = [
        (run, r["loops"]["orthrus"], plots.color(place))
        for place, (run, r) in enumerate(results.items())
        if r["loops"].get("orthrus", {}).get("cycles")
    ]
    bars: list[tuple[str, float, Any]] = []
    for place, (run, r) in enumerate(results.items()):
        for loop, figures in r["loops"].items():
            name = loop if len(results) == 1 else f"{plots.short(run)}, {loop}"
            color = plots.COLORS[loop]
            if len(results) > 1:
                color = plots.color(place, 0.45 if loop == "ar" else 1.0)
            bars.append((name, figures["tokens_per_second"], color))

    def acceptance(left: Any, middle: Any, right: Any) -> None:
        plots.draw_acceptance(left, drafted)
        for _, figures, color in drafted:
            shares = figures["accepted_distribution"]
            middle.plot(range(len(shares)), shares, "o-", color=color)
        middle.set(xlabel="drafts accepted in a cycle", ylabel="share of cycles", ylim=(0, None))
        middle.xaxis.get_major_locator().set_params(integer=True)
        if len(drafted) > 1:
            left.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))
        plots.draw_rates(right, bars)

    images = [_svg("acceptance", 3, acceptance, height=3.4 + 0.2 * len(results))]
    if len(results) == 1:
        (result,) = results.values()
        images += [_group_plot(kind, groups) for kind, groups in result["groups"].items()]
    return images


def _group_plot(kind: str, groups: Mapping[str, Row]) -> str:
    """Each group's accuracy with its interval (where graded) and tokens per forward."""
    graded = any("accuracy" in f for g in groups.values() for f in g["loops"].values())

    def draw(*axes: Any) -> None:
        loops = next(iter(groups.values()))["loops"]
        for i, loop in enumerate(loops):
            figures = [group["loops"][loop] for group in groups.values()]
            at = [place + (i - (len(loops) - 1) / 2) * 0.35 for place in range(len(figures))]
            color = plots.COLORS[loop]
            rates = [f["tokens_per_forward"] for f in figures]
            axes[-1].barh(at, rates, 0.33, label=loop, color=color)
            if graded:
                shares = [f["accuracy"] for f in figures]
                ends = [f["accuracy_interval"] for f in figures]
                errors = [
                    [max(0.0, s - low) for s, (low, _) in zip(shares, ends, strict=True)],
                    [max(0.0, high - s) for s, (_, high) in zip(shares, ends, strict=True)],
                ]
                axes[0].errorbar(
                    shares, at, xerr=errors, fmt="o", capsize=2, label=loop, color=color
                )
        for axis in axes:
            axis.set_yticks(range(len(groups)), map(plots.short, groups), fontsize=8)
            axis.invert_yaxis()
            axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        axes[-1].set(xlabel="tokens per forward")
        if graded:
            axes[0].set(xlabel="accuracy, 95 % interval", xlim=(0, 1))

    return _svg(kind, 1 + graded, draw, height=1.6 + 0.35 * len(groups))


def _svg(name: str, columns: int, draw: Callable[..., None], height: float = 3.4) -> str:
    """A row of axes as an <svg> element whose ids depend on `name` alone."""
    import matplotlib

    out = io.StringIO()
    anonymous = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}),
        plots.figure(
            out, columns, (4.2 * columns, height), format="svg", metadata=anonymous
        ) as axes,
    ):
        draw(*axes)
    whole = out.getvalue()
    return whole[whole.index("<svg") :]


def finish(directory: pathlib.Path) -> dict[str, Any]:
    """Compute a run's numbers and write its results.json and report.html.

    Raises:
      UserError: for a directory that holds no answers, or cannot be written.
    """
    result = numbers(*read_run(directory))
    try:
        write_atomic(directory / RESULTS, json.dumps(result, indent=2) + "\n")
        write_atomic(directory / PAGE, page({directory.name: result}))
    except OSError as error:
        raise UserError(
            f"{directory}: {RESULTS} and {PAGE} cannot be written ({first_line(error)})"
        ) from None
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Numbers of one benchmark run, or of several side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out directory of an eval command")
    parser.add_argument(
        "--html", metavar="FILE", help="default: RUN/report.html, for several runs compare.html"
    )
    args = parser.parse_args(argv)
    usual = pathlib.Path(args.runs[0], PAGE) if len(set(args.runs)) == 1 else "compare.html"
    out = pathlib.Path(args.html or usual)
    if args.html or len(set(args.runs)) > 1:
        check_output("--html", str(out))
    results = {run: finish(pathlib.Path(run)) for run in dict.fromkeys(args.runs)}
    lines = across({run: read_run(run) for run in results})
    print("\n".join([text(results), *lines]))
    write_atomic(out, page(results, lines))
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    run_command(main)
