"""The privacy part of a report: who is protected how well, accuracy against epsilon, and what no guarantee covers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft_dist.reports.axes import NO_GUARANTEE, Axis
from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.runs import is_number
from fedpeft_dist.reports.table import (
    Cell,
    Column,
    Table,
    accuracy_cell,
    axis_cell,
    axis_headings,
    count_cell,
    epsilon_cell,
    range_cell,
    text_cell,
)

PROTECTS = {"none": "nothing (no privacy)", "sample": "a sample", "user": "a client", NO_GUARANTEE: "nothing"}
"""What a mechanism protects, in a word; the table's note gives the whole guarantee."""


@dataclass(frozen=True)
class EpsilonLine:
    """Groups of one method, by what protects them."""

    label: str
    guaranteed: dict[str, list[Group]]
    """The groups of each mechanism that have an epsilon; the smallest epsilon comes first."""
    public: list[Group]
    """Groups without privacy, to compare with."""
    unguaranteed: list[Group]
    """Groups with noise and without an epsilon."""


@dataclass(frozen=True)
class EpsilonPicture:
    """Accuracy against epsilon on one data set."""

    title: str
    lines: list[EpsilonLine]


def epsilon_pictures(grouping: Grouping) -> list[EpsilonPicture]:
    """A picture for each data set on which some group has an epsilon."""
    pictures = []
    for data_set, rows in _private_rows(grouping).items():
        lines = [_line(grouping, row) for row in rows if any(group.privacy for group in row)]
        if any(line.guaranteed for line in lines):
            title = "Accuracy against epsilon"
            pictures.append(EpsilonPicture(f"{title}: {data_set}" if grouping.data_axis else title, lines))
    return pictures


def _private_rows(grouping: Grouping) -> dict[str, list[list[Group]]]:
    """By data set, groups that differ in their privacy alone; only data sets with a private group."""
    return {
        data_set: grouping.rows(groups, _privacy_axes(grouping))
        for data_set, groups in grouping.by_data_set().items()
        if any(group.privacy for group in groups)
    }


def _privacy_axes(grouping: Grouping) -> list[Axis]:
    return [axis for axis in grouping.telling if axis.sets("privacy.")]


def _line(grouping: Grouping, row: list[Group]) -> EpsilonLine:
    guaranteed: dict[str, list[Group]] = {}
    for group in sorted((group for group in row if group.epsilon is not None), key=lambda group: group.epsilon):
        guaranteed.setdefault(group.mechanism, []).append(group)
    public = [group for group in row if not group.privacy]
    unguaranteed = [group for group in row if group.privacy and group.epsilon is None]
    label = grouping.label(row[0], [*_privacy_axes(grouping), grouping.data_axis])
    return EpsilonLine(label, guaranteed, public, unguaranteed)


def privacy_table(grouping: Grouping) -> Table:
    """One row for each group on a data set with a private group; empty where no group is private."""
    found = [row for rows in _private_rows(grouping).values() for row in rows]
    axes = [axis for axis in grouping.telling if axis not in _privacy_axes(grouping)]
    columns = [Column("method", True), *(Column(heading, True) for heading in axis_headings(axes))]
    columns += [Column("mechanism", True), Column("epsilon"), Column("dp_delta"), Column("noise multiplier", drop=2)]
    columns += [Column("protects", True), Column("final accuracy"), Column("seeds", drop=1)]
    rows = []
    for group in (group for row in found for group in sorted(row, key=_by_mechanism)):
        row = [text_cell(group.method), *(axis_cell(group, axis) for axis in axes), text_cell(group.mechanism)]
        row += [epsilon_cell(group), _figure(group, "dp_delta"), _figure(group, "noise_multiplier")]
        row += [text_cell(PROTECTS.get(group.mechanism, "")), accuracy_cell(group), count_cell(len(group.seeds))]
        rows.append(tuple(row))
    return Table("guarantees", "Privacy guarantees", tuple(columns), tuple(rows), privacy_note(grouping.groups))


def privacy_note(groups: Sequence[Group]) -> str:
    """The guarantees, and what no guarantee covers; empty where no group is private."""
    private = [(group.mechanism, found) for group in groups for found in group.privacy]
    if not private:
        return ""
    guarantees = {(mechanism, found.get("guarantee")) for mechanism, found in private}
    sentences = ["Epsilon is the largest of a group's runs and their clients."]
    sentences += sorted(f"{name} protects {found}." for name, found in guarantees if found not in (None, "none"))
    if any(mechanism == NO_GUARANTEE for mechanism, _ in private):
        sentences.append(
            f"{NO_GUARANTEE} carries no guarantee: it clips nothing and is not accounted for, and the epsilon in its "
            "config is but the number that its noise is computed from."
        )
    outside = {mechanism: found["outside"] for mechanism, found in private if found.get("outside")}
    sentences += [
        f"Outside the guarantee of {mechanism}: {_listed(names)}, for no noise is added to these."
        for mechanism, names in sorted(outside.items())
        if mechanism != NO_GUARANTEE
    ]
    return " ".join(sentences)


def private_row(group: Group) -> dict[str, Any] | None:
    """A group's privacy for `--json`; None for a group without privacy."""
    if not group.privacy:
        return None
    first = group.privacy[0]
    return {
        "mechanism": group.mechanism,
        "epsilon": group.epsilon,
        "dp_delta": _figure(group, "dp_delta").value,
        "noise_multiplier": _figure(group, "noise_multiplier").value,
        "guarantee": first.get("guarantee"),
        "outside": first.get("outside"),
    }


def _figure(group: Group, key: str) -> Cell:
    """A number that the runs and their clients agree on, or the least and the largest."""
    return range_cell((v for found in group.privacy for v in _stated(found, key) if is_number(v)), "{:.4g}".format)


def _stated(privacy: Mapping[str, Any], key: str) -> list[Any]:
    """A run's values of a key: the ends of its range over the clients, where clients differ.

    Earlier versions wrote no ranges; there the ends stand among the clients' quantiles.
    """
    found = (privacy.get("ranges") or {}).get(key)
    return found or [figures.get(key) for figures in (privacy, *(privacy.get("clients") or {}).values())]


def _by_mechanism(group: Group) -> tuple:
    """Groups without privacy come first, groups without a guarantee last."""
    return (group.mechanism != "none", group.epsilon is None, group.mechanism, group.epsilon or 0.0)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
