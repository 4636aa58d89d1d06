"""The pictures in report.md: accuracy against bytes and simulated hours, and accuracy against epsilon."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.privacy import EpsilonPicture
from fedpeft_dist.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED = 20
"""Lines with an entry of their own in the legend; where there are more, a colour is a method."""
MAX_LENGTH = 80
"""Characters of an entry."""


def plot_accuracy(grouping: Grouping, unfinished: Sequence[Run], path: Path) -> None:
    """Mean accuracy over seeds after each round, against the MiB that all clients together have sent by then.

    Beside it stands the same against simulated hours, of those runs that have them.
    """
    from matplotlib import colormaps
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
    colours = colormaps["tab20" if one_each and len(lines) > len(colormaps["tab10"].colors) else "tab10"].colors
    named: set[str] = set()
    for axes, (place, settings) in zip(figure.subplots(1, len(across), squeeze=False)[0], across):
        for number, (label, method, curve) in enumerate(lines):
            curve = [(point, found) for point, found in curve if getattr(point, place) is not None]
            if not curve:
                continue
            name = label if one_each else method
            where, mean = [getattr(point, place) for point, _ in curve], [found.mean for _, found in curve]
            colour = colours[(number if one_each else methods.index(method)) % len(colours)]
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
    _save(figure, path)


def plot_epsilon(pictures: Sequence[EpsilonPicture], path: Path) -> None:
    """Mean final accuracy over seeds against epsilon, a line for each method and mechanism, with standard deviations.

    A dotted line is the method without privacy. What has no guarantee has no epsilon, and stands in a field beside.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(8, 4.2 * len(pictures)), layout="constrained")
    for picture, part in zip(pictures, figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]):
        part.suptitle(picture.title)
        axes, beside = part.subplots(1, 2, sharey=True, width_ratios=[5, 1])
        mechanisms = sorted({name for line in picture.lines for name in line.guaranteed})
        keys = [Line2D([], [], color="gray", label=name, **_style(name, mechanisms)) for name in mechanisms]
        keys.append(Line2D([], [], color="gray", linestyle=":", label="no privacy"))
        for name in sorted({group.mechanism for line in picture.lines for group in line.unguaranteed}):
            keys.append(Line2D([], [], color="gray", linestyle="", marker="x", label=f"{name}, no guarantee"))
        spent = {
            f"{group.epsilon:.3g}": group.epsilon
            for line in picture.lines
            for found in line.guaranteed.values()
            for group in found
        }
        for number, line in enumerate(picture.lines):
            colour = f"C{number % 10}"
            for mechanism, groups in line.guaranteed.items():
                _errorbar(axes, [group.epsilon for group in groups], groups, colour, **_style(mechanism, mechanisms))
            for group in line.public:
                axes.axhline(group.accuracy.mean, color=colour, linestyle=":")
            place = (number + 1) / (len(picture.lines) + 1)
            _errorbar(beside, [place] * len(line.unguaranteed), line.unguaranteed, colour, marker="x", linestyle="")
            keys.append(Line2D([], [], color=colour, linewidth=4, label=_legend(line.label, set())))
        axes.set(xscale="log", xlabel="epsilon", ylabel="final accuracy", ylim=(0, 1))
        axes.xaxis.set_major_locator(FixedLocator(list(spent.values())))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.15)
        beside.set(xlim=(0, 1), xticks=[], xlabel="no guarantee")
        beside.set_facecolor("0.95")
        for one in (axes, beside):
            one.grid(alpha=0.3)
        part.legend(handles=keys, loc="outside right upper")
    _save(figure, path)


def _errorbar(axes: Axes, where: Sequence[float], groups: Sequence[Group], colour: str, **style: str) -> None:
    if groups:
        means, spread = [group.accuracy.mean for group in groups], [group.accuracy.std or 0.0 for group in groups]
        axes.errorbar(where, means, spread, color=colour, capsize=2, **style)


def _style(mechanism: str, mechanisms: Sequence[str]) -> dict[str, str]:
    """Epsilons of different mechanisms protect different things: their lines look different."""
    place = mechanisms.index(mechanism)
    return {"linestyle": ("-", "--", "-.")[place % 3], "marker": ("o", "s", "^")[place % 3]}


def _save(figure: Figure, path: Path) -> None:
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
