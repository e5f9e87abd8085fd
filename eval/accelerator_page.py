"""The page of `eval.accelerator`: its measurements as tables. Measures nothing."""

from typing import Any


def page(result: dict[str, Any]) -> str:
    """Markdown of what there is so far."""
    about = result["about"]
    spent = f", {about['seconds']:.0f} s" if "seconds" in about else ""
    lines = [f"# {about['device']}, jax {about['jax']}{spent}", ""]
    lines.append("Random weights unless a line says otherwise; medians of 5.")
    for entry in result.get("bandwidth", []):
        lines += ["", f"Copy bandwidth: {entry['bytes_per_second'] / 1e9:.0f} GB/s."]
    lines += _cycles(result.get("cycles", []))
    by_name = {
        "rows": ("size", "rows", "context", "ms", "least_ms", "most_ms"),
        "drafts": ("size", "rows", "context", "ms", "least_ms", "most_ms"),
        "programs": (
            *("size", "batch", "cycle", "kernels", "inner_loops", "large_copies"),
            "compile_seconds",
        ),
        "graphs": ("program", "loops", "command_buffers"),
        "exact": ("cycle", "prompts", "same_text_as_ar"),
        "training": ("size", "tokens", "ms", "tflops", "mfu"),
        "failed": ("part", "what", "why"),
    }
    for name, columns in by_name.items():
        if entries := result.get(name):
            rows = [[entry[column] for column in columns] for entry in entries]
            lines += ["", f"## {name.capitalize()}", "", *_table(columns, rows)]
    return "\n".join(lines) + "\n"


def _cycles(entries: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of each cycle, beside the AR step of the same size, batch and context."""
    if not entries:
        return []
    where = lambda entry: (entry["size"], entry["batch"], entry["context"])
    steps = {where(entry): entry["ms"] for entry in entries if entry["cycle"] == "ar"}
    columns = ("size", "batch", "context", "cycle", "ms", "in AR steps", "AR step's floor, ms")
    rows = []
    for entry in entries:
        step = steps.get(where(entry))
        ratio = entry["ms"] / step if step else None
        rows.append([*where(entry), entry["cycle"], entry["ms"], ratio, entry["ar_floor_ms"]])
    return ["", "## Cycles", "", *_table(columns, rows)]


def _table(columns: Any, rows: list[list[Any]]) -> list[str]:
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(map(text, row))} |" for row in rows]
