"""The pictures in report.md: accuracy against bytes and simulated hours, and accuracy against epsilon."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft_dist.reports.groups import Group
from fedpeft_dist.tracking.run_directory import COMPLETE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED = 20
"""The legend names so many lines. If there are more, each method has one colour and one name."""
MAX_LENGTH = 80
"""Characters of a name in the legend."""


def accuracy_figure(lines: Sequence[Mapping[str, Any]]) -> "Figure":
    """Mean accuracy over seeds after each round, against the MiB that all clients together have sent by then.

    Beside it stands the same against simulated hours, for runs that have them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    across = [("mib", {"xscale": "log", "xlabel": "MiB sent by all clients (uplink)"})]
    if any(line["hours"] for line in lines):
        across.append(("hours", {"xlabel": "simulated hours"}))
    each = len(lines) <= MAX_NAMED
    kinds = [line["label" if each else "method"] for line in lines]
    complete = [line["state"] == COMPLETE for line in lines]
    shown = list(dict.fromkeys(kind for kind, done in zip(kinds, complete) if done))
    palette = colormaps["tab20" if each and len(shown) > 10 else "tab10"].colors
    names = [_shortened(kind if each or done else "unfinished") for kind, done in zip(kinds, complete)]
    room = 0.09 * max(map(len, names), default=0)  # the legend stands beside the lines
    figure = Figure(figsize=(1 + 6 * len(across) + room, 5), layout="constrained")
    for axes, (place, settings) in zip(figure.subplots(1, len(across), squeeze=False)[0], across):
        for line, kind, name, done in zip(lines, kinds, names, complete):
            colour = palette[shown.index(kind) % len(palette)] if done else "gray"
            style = {"marker": "." if each else ""} if done else {"linestyle": ":"}
            if line[place]:
                axes.plot(line[place], line["mean"], color=colour, label=name, **style)
            if line[place] and each and line["seeds"] > 1:
                mean, std = np.array(line["mean"]), np.array(line["std"])
                axes.fill_between(line[place], mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        axes.set(**settings, ylabel="accuracy of the global model")
        axes.grid(alpha=0.3)
    # Every name stands once in the legend.
    handles = {line.get_label(): line for axes in reversed(figure.axes) for line in reversed(axes.lines)}
    if handles:
        figure.legend(handles=list(reversed(handles.values())), loc="outside right upper")
    return figure


def epsilon_figure(pictures: Sequence[Mapping[str, Any]]) -> "Figure":
    """Mean final accuracy over seeds against epsilon, a line for each method and mechanism, with standard deviations.

    A dotted line is the method without privacy. Groups without a guarantee have no epsilon; a field beside shows them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2 * len(pictures)), layout="constrained")
    for picture, part in zip(pictures, figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]):
        lines = picture["lines"]
        part.suptitle(picture["title"])
        axes, beside = part.subplots(1, 2, sharey=True, width_ratios=[5, 1])
        # A look for each mechanism, because epsilons of different mechanisms protect different things.
        mechanisms = sorted({name for line in lines for name in line["guaranteed"]})
        styles = {
            name: {"linestyle": ("-", "--", "-.")[place % 3], "marker": ("o", "s", "^")[place % 3]}
            for place, name in enumerate(mechanisms)
        }
        for number, line in enumerate(lines):
            colour = f"C{number % 10}"
            for mechanism, groups in line["guaranteed"].items():
                _errorbar(axes, [group.epsilon for group in groups], groups, colour, **styles[mechanism])
            for group in line["public"]:
                axes.axhline(group.accuracy.mean, color=colour, linestyle=":")
            place, groups = (number + 1) / (len(lines) + 1), line["unguaranteed"]
            _errorbar(beside, [place] * len(groups), groups, colour, marker="x", linestyle="")
        _set_epsilon_axes(axes, beside, lines)
        part.legend(handles=_epsilon_keys(lines, styles), loc="outside right upper")
    return figure


def _errorbar(axes: "Axes", where: Sequence[float], groups: Sequence[Group], colour: str, **style: str) -> None:
    if groups:
        means, spread = [group.accuracy.mean for group in groups], [group.accuracy.std or 0.0 for group in groups]
        axes.errorbar(where, means, spread, color=colour, capsize=2, **style)


def _set_epsilon_axes(axes: "Axes", beside: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    groups = [group for line in lines for found in line["guaranteed"].values() for group in found]
    axes.set(xscale="log", xlabel="epsilon", ylabel="final accuracy")
    axes.xaxis.set_major_locator(FixedLocator(list({f"{g.epsilon:.3g}": g.epsilon for g in groups}.values())))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    beside.set(xlim=(0, 1), xticks=[], xlabel="no guarantee", facecolor="0.95")
    beside.grid(alpha=0.3)


def _epsilon_keys(lines: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, str]]) -> list:
    """The legend's entries: mechanisms by their style, then methods by their colour."""
    from matplotlib.lines import Line2D

    without = sorted({group.mechanism for line in lines for group in line["unguaranteed"]})
    return [
        *(Line2D([], [], color="gray", label=name, **style) for name, style in styles.items()),
        Line2D([], [], color="gray", linestyle=":", label="no privacy"),
        *(Line2D([], [], color="gray", linestyle="", marker="x", label=f"{name}, no guarantee") for name in without),
        *(
            Line2D([], [], color=f"C{number % 10}", linewidth=4, label=_shortened(line["label"]))
            for number, line in enumerate(lines)
        ),
    ]


def save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run's name may be in any script
        figure.savefig(path, dpi=120)


def _shortened(name: str) -> str:
    """A name for a legend, in which matplotlib reads no formula and no private label."""
    short = name if len(name) <= MAX_LENGTH else f"{name[: MAX_LENGTH - 3]}..."
    return short.replace("$", r"\$").lstrip("_")
