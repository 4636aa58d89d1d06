"""The privacy part of a report: who is protected how well, accuracy against epsilon, and what no guarantee covers."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fedpeft_dist.reports import tables
from fedpeft_dist.reports.axes import NO_GUARANTEE, Axis
from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.runs import is_number
from fedpeft_dist.reports.tables import Cell, Column, Table, group_table

PROTECTS = {"none": "nothing (no privacy)", "sample": "a sample", "user": "a client", NO_GUARANTEE: "nothing"}
"""What a mechanism protects, in a word; the table's note gives the whole guarantee."""


def epsilon_pictures(grouping: Grouping) -> list[dict[str, Any]]:
    """A picture of accuracy against epsilon for each data set on which some group has an epsilon.

    A picture has a title and lines; `_epsilon_line` says what a line has.
    """
    pictures = []
    for data_set, rows in _private_rows(grouping):
        lines = [_epsilon_line(grouping, row) for row in rows if any(group.privacy for group in row)]
        if any(line["guaranteed"] for line in lines):
            title = "Accuracy against epsilon"
            pictures.append({"title": f"{title}: {data_set}" if grouping.data_axis else title, "lines": lines})
    return pictures


def _epsilon_line(grouping: Grouping, row: Sequence[Group]) -> dict[str, Any]:
    """Groups of one method: by mechanism those with an epsilon, those without privacy, those with mere noise."""
    guaranteed: dict[str, list[Group]] = {}
    for group in sorted((group for group in row if group.epsilon is not None), key=lambda group: group.epsilon):
        guaranteed.setdefault(group.mechanism, []).append(group)
    return {
        "label": grouping.label(row[0], [*_privacy_axes(grouping), grouping.data_axis]),
        "guaranteed": guaranteed,
        "public": [group for group in row if not group.privacy],
        "unguaranteed": [group for group in row if group.privacy and group.epsilon is None],
    }


def _private_rows(grouping: Grouping) -> Iterator[tuple[str, list[list[Group]]]]:
    """Data sets with a private group, and their groups in rows that differ in their privacy alone."""
    for data_set, groups in grouping.by_data_set().items():
        if any(group.privacy for group in groups):
            yield data_set, grouping.rows(groups, _privacy_axes(grouping))


def _privacy_axes(grouping: Grouping) -> list[Axis]:
    return [axis for axis in grouping.telling if axis.sets("privacy.")]


def privacy_table(grouping: Grouping) -> Table:
    """One row for each group on a data set with a private group; empty where no group is private."""

    def place(group: Group) -> tuple:
        """Groups without privacy come first, groups without a guarantee last."""
        return (group.mechanism != "none", group.epsilon is None, group.mechanism, group.epsilon or 0.0)

    axes = [axis for axis in grouping.telling if axis not in _privacy_axes(grouping)]
    columns = [
        tables.METHOD,
        *tables.axis_columns(axes, grouping),
        tables.column_of("mechanism", "mechanism", is_text=True),
        tables.EPSILON,
        (Column("dp_delta"), partial(_figure, "dp_delta")),
        (Column("noise multiplier", drop=2), partial(_figure, "noise_multiplier")),
        (Column("protects", True), lambda group: tables.make_cell(PROTECTS.get(group.mechanism, ""))),
        tables.ACCURACY,
        tables.column_of("seeds", "num_seeds", "{:,}", drop=1),
    ]
    groups = [group for _, rows in _private_rows(grouping) for row in rows for group in sorted(row, key=place)]
    return group_table("guarantees", "Privacy guarantees", columns, groups, _note(grouping.groups))


def _note(groups: Sequence[Group]) -> str:
    """The guarantees, and what no guarantee covers; empty where no group is private."""
    private = [(group.mechanism, found) for group in groups for found in group.privacy]
    if not private:
        return ""
    guarantees = {(mechanism, found.get("guarantee")) for mechanism, found in private}
    sentences = ["Epsilon is the largest of a group's runs and their clients."]
    sentences += sorted(f"{name} protects {found}." for name, found in guarantees if found not in (None, "none"))
    outside = {mechanism: found["outside"] for mechanism, found in private if found.get("outside")}
    if any(mechanism == NO_GUARANTEE for mechanism, _ in private):
        outside.pop(NO_GUARANTEE, None)
        sentences.append(
            f"{NO_GUARANTEE} carries no guarantee: it clips nothing and is not accounted for, and the epsilon in its "
            "config is but the number that its noise is computed from."
        )
    for mechanism, (*names, last) in sorted(outside.items()):
        listed = f"{', '.join(names)} and {last}" if names else last
        sentences.append(f"Outside the guarantee of {mechanism}: {listed}, for no noise is added to these.")
    return " ".join(sentences)


def privacy_row(group: Group) -> dict[str, Any] | None:
    """A group's privacy for `--json`; None for a group without privacy."""
    if not group.privacy:
        return None
    figures = {key: _figure(key, group).value for key in ("dp_delta", "noise_multiplier")}
    stated = {key: group.privacy[0].get(key) for key in ("guarantee", "outside")}
    return {"mechanism": group.mechanism, "epsilon": group.epsilon, **figures, **stated}


def _figure(key: str, group: Group) -> Cell:
    """A number that the runs and their clients agree on, or the least and the largest.

    Where clients differ, a run states the range over them. Earlier versions wrote the clients' quantiles alone.
    """
    values = []
    for found in group.privacy:
        clients = (found, *(found.get("clients") or {}).values())
        values += (found.get("ranges") or {}).get(key) or [figures.get(key) for figures in clients]
    return tables.range_cell(filter(is_number, values), "{:.4g}".format)
