"""Figures without a display, and the panels that several reports share.

Decides colours, names and axes. Knows matplotlib and the figures of metrics.numbers, and not where
reports go.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LONGEST = 28  # characters of a name in a figure
COLORS = {"ar": "tab:gray", "orthrus": "tab:blue"}  # of the loops of one run


@contextlib.contextmanager
def figure(target: Any, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """A row of axes, saved to `target` at the end unless the body raises.

    Args:
      target: a path or a file.
      columns: number of axes.
      size: width and height in inches.
      options: of matplotlib's savefig.
    """
    import matplotlib  # late: it takes a second, and most commands draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield axes[0]
        whole.savefig(target, **{"dpi": 120} | options)
    finally:
        pyplot.close(whole)


def short(name: str) -> str:
    """A name as a figure shows it: a long one is cut in its middle, a dollar begins no formula."""
    half = (LONGEST - 1) // 2
    if len(name) > LONGEST:
        name = f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
    return name.replace("$", r"\$")


def color(place: int, strength: float = 1.0) -> Any:
    """The colour of the run at this place of a comparison, the same in all its panels."""
    from matplotlib.colors import to_rgba

    return to_rgba(f"C{place % 10}", strength)


def mark_values(axis: Any, values: Sequence[float]) -> None:
    """Put the ticks of x at the values that were measured, on a logarithmic axis if several."""
    places = sorted(set(values))
    if len(places) > 1:
        axis.set(xscale="log")
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()


def fit_height(axis: Any) -> None:
    """Begin y at 0; where the lines span a factor of ten, make it logarithmic."""
    values = [y for line in axis.lines for y in line.get_ydata()]
    if max(values) > 10 * min(values) > 0:
        axis.set(yscale="log")
    else:
        axis.set(ylim=(0, 1.1 * max(values) or 1))


def draw_acceptance(axis: Any, runs: Sequence[tuple[str, Mapping[str, Any], Any]]) -> None:
    """Plot the share of cycles that accept each draft position: a name, figures and colour each."""
    for name, figures, line_color in runs:
        shares = figures["acceptance_by_position"]
        axis.plot(range(1, len(shares) + 1), shares, "o-", color=line_color, label=short(name))
    axis.set(xlabel="draft position", ylabel="accepted (share of cycles)", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_rates(axis: Any, rates: Sequence[tuple[str, float, Any]]) -> None:
    """Plot tokens per second as bars of a name, a rate and a colour, the first on top."""
    bars = axis.barh(
        range(len(rates)), [rate for _, rate, _ in rates], color=[color for *_, color in rates]
    )
    axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.margins(x=0.15)  # room for the labels
    axis.set_yticks(range(len(rates)), [name for name, *_ in rates], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="tokens/s")
