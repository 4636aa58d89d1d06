"""The picture in report.md: accuracy against bytes and simulated hours, a line for each group and unfinished run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from fedpeft_dist.tracking.report_groups import Grouping
from fedpeft_dist.tracking.report_runs import Run

MAX_NAMED = 20
"""Lines with an entry of their own in the legend; where there are more, a colour is a method."""
MAX_LENGTH = 80
"""Characters of an entry."""


def plot_accuracy(grouping: Grouping, unfinished: Sequence[Run], path: Path) -> None:
    """Mean accuracy over seeds after each round, against the MiB that all clients together have sent by then.

    Beside it stands the same against simulated hours, of those runs that have them.
    """
    from matplotlib.figure import Figure

    lines = [(group.label, group.method, group.curve()) for group in grouping.groups]
    runs = [(f"{run.name} ({run.state})", run.curve) for run in unfinished if run.curve]
    methods = list(dict.fromkeys(method for _, method, _ in lines))
    one_each = len(lines) + len(runs) <= MAX_NAMED
    names = [name for name, *_ in (*lines, *runs)] if one_each else methods
    longest = max((min(len(name), MAX_LENGTH) for name in names), default=0)
    points = [point for *_, curve in lines for point, _ in curve] + [point for _, curve in runs for point in curve]
    across = [("mib_sent", {"xscale": "log", "xlabel": "MiB sent by all clients (uplink)"})]
    if any(point.hours is not None for point in points):
        across.append(("hours", {"xlabel": "simulated hours"}))
    size = (1 + 6 * len(across) + 0.09 * longest, 5)  # room for the legend beside the lines
    figure = Figure(figsize=size, layout="constrained")
    named: set[str] = set()
    for axes, (place, settings) in zip(figure.subplots(1, len(across), squeeze=False)[0], across):
        for number, (label, method, curve) in enumerate(lines):
            curve = [(point, found) for point, found in curve if getattr(point, place) is not None]
            if not curve:
                continue
            name = label if one_each else method
            where, mean = [getattr(point, place) for point, _ in curve], [found.mean for _, found in curve]
            colour = f"C{(number if one_each else methods.index(method)) % 10}"
            axes.plot(where, mean, marker="." if one_each else "", color=colour, label=_legend(name, named))
            if one_each:
                low = [found.mean - (found.std or 0.0) for _, found in curve]
                high = [found.mean + (found.std or 0.0) for _, found in curve]
                axes.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)
        for name, curve in runs:
            shown = [point for point in curve if getattr(point, place) is not None]
            where, accuracy = [getattr(point, place) for point in shown], [point.accuracy for point in shown]
            axes.plot(where, accuracy, ":", color="gray", label=_legend(name if one_each else "unfinished", named))
        axes.set(**settings, ylabel="accuracy of the global model", ylim=(0, 1))
        axes.grid(alpha=0.3)
    if figure.axes[0].lines:
        figure.legend(loc="outside right upper")  # beside the lines, wherever they run
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run's name may be in any script
        figure.savefig(path, dpi=120)


def _legend(name: str, named: set[str]) -> str:
    """A name once, and then a label that a legend leaves out."""
    if name in named:
        return "_"
    named.add(name)
    short = name if len(name) <= MAX_LENGTH else f"{name[: MAX_LENGTH - 3]}..."
    return short.replace("$", r"\$").lstrip("_")
