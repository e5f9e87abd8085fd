"""The figures of eval.speed as tables and as a plot. Knows nothing of how they are measured."""

import collections
import pathlib
from typing import Any

from eval import plots


def draw(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Plot time per cycle by context and, where texts were timed, tokens/s by batch size."""
    rates = collections.defaultdict(list)
    for text in result["text"]:
        for name, timed in text.items():
            if isinstance(timed, dict):
                rates[name].append((text["batch"], timed["tokens_per_second"]))
    panels = 2 if rates else 1
    with plots.figure(path, panels, (5 * panels, 3.8)) as axes:
        left = axes[0]
        for batch in sorted({f["batch"] for f in result["forwards"]}):
            forwards = [f for f in result["forwards"] if f["batch"] == batch]
            contexts = [f["context"] for f in forwards]
            for name, style in {"ar_step": "o--", "cycle": "s-", "hf_step": "x:"}.items():
                if f"{name}_ms" not in forwards[0]:
                    continue
                label = f"{name.replace('_', ' ')}, batch {batch}"
                left.plot(contexts, [f[f"{name}_ms"] for f in forwards], style, label=label)
        left.set(xlabel="context (tokens)", ylabel="ms", title="Time")
        plots.mark_values(left, [f["context"] for f in result["forwards"]])
        plots.fit_height(left)
        left.legend(fontsize=8)
        for name, points in rates.items():
            axes[1].plot(*zip(*points, strict=True), "o-", label=name)
        if rates:
            axes[1].set(xlabel="batch", ylabel="tokens/s", title="Text")
            plots.mark_values(axes[1], [text["batch"] for text in result["text"]])
            plots.fit_height(axes[1])
            axes[1].legend(fontsize=8)


def table(result: dict[str, Any]) -> str:
    """The figures as two Markdown tables."""
    hf = "hf" in result
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['dtype']}, {result['hardware']}; "
        f"copies at {result['copy_bytes_per_second'] / 1e9:.0f} GB/s",
        *([f"hf: {result['hf']}"] if hf else []),
        "",
        "| batch | context | AR step ms (floor) | draft | verify | cycle | cycle in AR steps "
        f"{'| hf step ms ' if hf else ''}| temporaries AR / Orthrus, MiB |",
        f"|---|---|---|---|---|---|---|{'---|' if hf else ''}---|",
    ]
    for f in result["forwards"]:
        memory = [f[f"{name}_temporary_bytes"] for name in ("ar_step", "cycle")]
        mib = " / ".join("?" if m is None else f"{m / 2**20:.2f}" for m in memory)
        theirs = f" | {f['hf_step_ms']:.3f}" if hf else ""
        lines.append(
            f"| {f['batch']} | {f['context']} | {f['ar_step_ms']:.3f} ({f['ar_step_floor_ms']:.3f})"
            f" | {f['draft_ms']:.3f} | {f['verify_ms']:.3f} | {f['cycle_ms']:.3f}"
            f" | {f['cycle_in_ar_steps']:.2f}{theirs} | {mib} |"
        )
    if result["text"]:
        lines += ["", "| batch | loop | tokens/s | range | speedup | same text |"]
        lines += ["|---|---|---|---|---|---|"]
    for t in result["text"]:
        for name in [name for name in t if isinstance(t[name], dict)]:
            f = t[name]
            low, high = f["range"]
            lines.append(
                f"| {t['batch']} | {name} | {f['tokens_per_second']:.0f} | {low:.0f}-{high:.0f}"
                f" | {f['speedup']:.2f} | {f['same_text']:.3f} |"
            )
    return "\n".join(lines)
