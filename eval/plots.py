"""Figures without a display, and the panels that several reports share.

Knows matplotlib and the figures of metrics.numbers; decides nothing about where reports go.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


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


def draw_acceptance(axis: Any, loops: Mapping[str, Mapping[str, Any]]) -> None:
    """Plot the share of cycles that accept each draft position, one line per run."""
    for run, figures in loops.items():
        shares = figures["acceptance_by_position"]
        axis.plot(range(1, len(shares) + 1), shares, "o-", label=run)
    axis.set(xlabel="draft position", ylabel="accepted (share of cycles)", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_rates(axis: Any, rates: Sequence[tuple[str, float]]) -> None:
    """Plot tokens per second as labelled bars."""
    bars = axis.bar(range(len(rates)), [rate for _, rate in rates], color="tab:gray")
    axis.bar_label(bars, fmt="%.0f")
    axis.margins(y=0.12)  # room for the labels
    axis.set_xticks(range(len(rates)), [name for name, _ in rates], fontsize=8)
    axis.set(ylabel="tokens/s")
