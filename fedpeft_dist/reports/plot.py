"""The pictures in report.md: accuracy against bytes and simulated hours, and accuracy against epsilon."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft_dist.reports.groups import Group
from fedpeft_dist.reports.lines import Line
from fedpeft_dist.reports.privacy import EpsilonLine, EpsilonPicture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED = 20
"""The legend names so many lines. If there are more, each method has one colour and one name."""
MAX_LENGTH = 80
"""Characters of a name in the legend."""


def accuracy_figure(lines: Sequence[Line]) -> "Figure":
    """Mean accuracy over seeds after each round, against the MiB that all clients together have sent by then.

    Beside it stands the same against simulated hours, for runs that have them.
    """
    from matplotlib.figure import Figure

    across = [("mib_sent", {"xscale": "log", "xlabel": "MiB sent by all clients (uplink)"})]
    if any(point.hours is not None for line in lines for point, _ in line.curve):
        across.append(("hours", {"xlabel": "simulated hours"}))
    each = len(lines) <= MAX_NAMED
    names = [_legend_name(line, each) for line in lines]
    room = 0.09 * max(map(len, names), default=0)  # the legend stands beside the lines
    figure = Figure(figsize=(1 + 6 * len(across) + room, 5), layout="constrained")
    for axes, (place, settings) in zip(figure.subplots(1, len(across), squeeze=False)[0], across):
        for line, name, colour in zip(lines, names, _colours(lines, each)):
            _draw_line(axes, line, place, colour, name, with_band=each)
        axes.set(**settings, ylabel="accuracy of the global model")
        axes.grid(alpha=0.3)
    _add_legend(figure)
    return figure


def _draw_line(axes: "Axes", line: Line, place: str, colour: str, name: str, with_band: bool) -> None:
    curve = [(getattr(point, place), found) for point, found in line.curve if getattr(point, place) is not None]
    if not curve:
        return
    where, mean = [x for x, _ in curve], [found.mean for _, found in curve]
    style = {"marker": "." if with_band else ""} if line.is_complete else {"linestyle": ":"}
    axes.plot(where, mean, color=colour, label=name, **style)
    if with_band and line.seeds > 1:
        low = [found.mean - (found.std or 0.0) for _, found in curve]
        high = [found.mean + (found.std or 0.0) for _, found in curve]
        axes.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)


def _colours(lines: Sequence[Line], each: bool) -> list[str]:
    """A colour for each line, or for each method; gray for unfinished runs."""
    from matplotlib import colormaps

    kinds = list(dict.fromkeys(line.label if each else line.method for line in lines if line.is_complete))
    palette = colormaps["tab20" if each and len(kinds) > 10 else "tab10"].colors
    places = {kind: palette[number % len(palette)] for number, kind in enumerate(kinds)}
    return [places[line.label if each else line.method] if line.is_complete else "gray" for line in lines]


def _legend_name(line: Line, each: bool) -> str:
    name = line.label if each else line.method if line.is_complete else "unfinished"
    return _shortened(name)


def _add_legend(figure: "Figure") -> None:
    """A legend beside the lines, in which every name stands once."""
    handles = {line.get_label(): line for axes in reversed(figure.axes) for line in reversed(axes.lines)}
    if handles:
        figure.legend(handles=list(reversed(handles.values())), loc="outside right upper")


def epsilon_figure(pictures: Sequence[EpsilonPicture]) -> "Figure":
    """Mean final accuracy over seeds against epsilon, a line for each method and mechanism, with standard deviations.

    A dotted line is the method without privacy. Groups without a guarantee have no epsilon; a field beside shows them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2 * len(pictures)), layout="constrained")
    for picture, part in zip(pictures, figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]):
        part.suptitle(picture.title)
        axes, beside = part.subplots(1, 2, sharey=True, width_ratios=[5, 1])
        mechanisms = sorted({name for line in picture.lines for name in line.guaranteed})
        for number, line in enumerate(picture.lines):
            colour = f"C{number % 10}"
            for mechanism, groups in line.guaranteed.items():
                _errorbar(axes, [group.epsilon for group in groups], groups, colour, **_style(mechanism, mechanisms))
            for group in line.public:
                axes.axhline(group.accuracy.mean, color=colour, linestyle=":")
            place = (number + 1) / (len(picture.lines) + 1)
            _errorbar(beside, [place] * len(line.unguaranteed), line.unguaranteed, colour, marker="x", linestyle="")
        _set_epsilon_axes(axes, beside, picture.lines)
        part.legend(handles=_epsilon_keys(picture.lines, mechanisms), loc="outside right upper")
    return figure


def _set_epsilon_axes(axes: "Axes", beside: "Axes", lines: Sequence[EpsilonLine]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    spent = {f"{g.epsilon:.3g}": g.epsilon for line in lines for found in line.guaranteed.values() for g in found}
    axes.set(xscale="log", xlabel="epsilon", ylabel="final accuracy")
    axes.xaxis.set_major_locator(FixedLocator(list(spent.values())))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    beside.set(xlim=(0, 1), xticks=[], xlabel="no guarantee")
    beside.set_facecolor("0.95")
    for one in (axes, beside):
        one.grid(alpha=0.3)


def _epsilon_keys(lines: Sequence[EpsilonLine], mechanisms: Sequence[str]) -> list:
    """The legend's entries: mechanisms by their style, then methods by their colour."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color="gray", label=name, **_style(name, mechanisms)) for name in mechanisms]
    keys.append(Line2D([], [], color="gray", linestyle=":", label="no privacy"))
    for name in sorted({group.mechanism for line in lines for group in line.unguaranteed}):
        keys.append(Line2D([], [], color="gray", linestyle="", marker="x", label=f"{name}, no guarantee"))
    for number, line in enumerate(lines):
        keys.append(Line2D([], [], color=f"C{number % 10}", linewidth=4, label=_shortened(line.label)))
    return keys


def _errorbar(axes: "Axes", where: Sequence[float], groups: Sequence[Group], colour: str, **style: str) -> None:
    if groups:
        means, spread = [group.accuracy.mean for group in groups], [group.accuracy.std or 0.0 for group in groups]
        axes.errorbar(where, means, spread, color=colour, capsize=2, **style)


def _style(mechanism: str, mechanisms: Sequence[str]) -> dict[str, str]:
    """A look for each mechanism, because epsilons of different mechanisms protect different things."""
    place = mechanisms.index(mechanism)
    return {"linestyle": ("-", "--", "-.")[place % 3], "marker": ("o", "s", "^")[place % 3]}


def save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run's name may be in any script
        figure.savefig(path, dpi=120)


def _shortened(name: str) -> str:
    """A name for a legend, in which matplotlib reads no formula and no private label."""
    short = name if len(name) <= MAX_LENGTH else f"{name[: MAX_LENGTH - 3]}..."
    return short.replace("$", r"\$").lstrip("_")
