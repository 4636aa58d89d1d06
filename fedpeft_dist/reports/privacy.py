"""What a report says of privacy: who is protected how well, accuracy against epsilon, what no guarantee covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft_dist.reports.groups import Group, Grouping, count, refining, tell
from fedpeft_dist.reports.labels import DATA_SET, NO_GUARANTEE, PRIVACY, short_names
from fedpeft_dist.reports.runs import is_number
from fedpeft_dist.reports.tables import (
    EMPTY,
    Cell,
    Column,
    Part,
    Table,
    accuracy_cell,
    epsilon_cell,
    label_cell,
    parts,
    row_label,
    title_of,
    varying_along,
)

PROTECTS = {"none": "nothing (no privacy)", "sample": "a sample", "user": "a client", NO_GUARANTEE: "nothing"}
"""By mechanism, in a word; the table's note has the whole guarantee."""


@dataclass(frozen=True)
class EpsilonLine:
    """A method's groups, by what protects them."""

    label: str
    guaranteed: dict[str, list[Group]]
    """By mechanism, the groups that have an epsilon, the smallest first."""
    public: list[Group]
    """Without privacy, to compare with: one, or none."""
    unguaranteed: list[Group]
    """They add noise and have no epsilon."""


@dataclass(frozen=True)
class EpsilonPicture:
    """Accuracy against epsilon for groups that can be compared."""

    title: str
    lines: list[EpsilonLine]


def epsilon_pictures(grouping: Grouping) -> list[EpsilonPicture]:
    """One for each data set and each other setting that differs, where there is an epsilon."""
    pictures = []
    for part in private_parts(grouping):
        lines = [_line(row, part) for row in part.rows]
        lines = [line for line in lines if line.guaranteed or line.unguaranteed]
        if any(line.guaranteed for line in lines):
            pictures.append(
                EpsilonPicture(title_of("Accuracy against epsilon", grouping, part.groups, {PRIVACY}), lines)
            )
    return pictures


def private_parts(grouping: Grouping) -> list[Part]:
    return [part for part in parts(grouping.groups, grouping, PRIVACY) if any(group.privacy for group in part.groups)]


def _line(row: list[Group], part: Part) -> EpsilonLine:
    guaranteed: dict[str, list[Group]] = {}
    for group in sorted((group for group in row if group.epsilon is not None), key=lambda group: group.epsilon):
        guaranteed.setdefault(group.mechanism, []).append(group)
    public = [group for group in row if not group.privacy]
    unguaranteed = [group for group in row if group.privacy and group.epsilon is None]
    return EpsilonLine(row_label(row, part.options, part.groups).text, guaranteed, public, unguaranteed)


def privacy_table(grouping: Grouping) -> Table:
    """One row a private group, and those without privacy that compare with it."""
    found = private_parts(grouping)
    shown = [group for part in found for row in part.rows for group in sorted(row, key=_by_mechanism)]
    data_sets = [DATA_SET] if count(shown, [DATA_SET]) > 1 else []
    told = [*data_sets, PRIVACY]
    candidates = [axis for axis in (*grouping.settings, *grouping.options) if axis not in told]
    further = [*data_sets, *refining(shown, candidates, lambda group: tell(group, told))]
    names = short_names(further)
    columns = [Column("method", True), *(Column(names[axis], True) for axis in further), Column("mechanism", True)]
    columns += [Column("epsilon"), Column("dp_delta"), Column("noise multiplier", drop=2), Column("protects", True)]
    columns += [Column("final accuracy"), Column("seeds", drop=1)]
    rows = []
    for group in shown:
        row = [Cell(group.method, group.method), *(label_cell(group, axis) for axis in further)]
        row += [Cell(group.mechanism, group.mechanism), epsilon_cell(group)]
        row += [_figure(group, "dp_delta"), _figure(group, "noise_multiplier")]
        protects = PROTECTS.get(group.mechanism, "")
        row += [Cell(protects, protects), accuracy_cell(group), Cell(str(group.accuracy.seeds), group.accuracy.seeds)]
        rows.append(tuple(row))
    notes = [privacy_note(grouping.groups), varying_along(grouping, shown, (DATA_SET, PRIVACY, *further))]
    return Table("guarantees", "Privacy guarantees", tuple(columns), tuple(rows), " ".join(filter(None, notes)))


def privacy_note(groups: Sequence[Group]) -> str:
    """What is promised to whom, and what no promise covers; nothing where no group is private."""
    private = [(group.mechanism, found) for group in groups for found in group.privacy]
    if not private:
        return ""
    said = {
        f"{mechanism} protects {found['guarantee']}."
        for mechanism, found in private
        if found.get("guarantee") not in (None, "none")
    }
    sentences = ["Epsilon is the largest of a group's runs and their clients.", *sorted(said)]
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
    """What `--json` gives of a group's privacy; None without."""
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
    """A number that its runs and their clients agree on, or their least and largest."""
    values = sorted({value for found in group.privacy for value in _said(found, key) if is_number(value)})
    if not values:
        return EMPTY
    texts = list(dict.fromkeys(f"{value:.4g}" for value in (values[0], values[-1])))
    return Cell("-".join(texts), values[0] if len(texts) == 1 else [values[0], values[-1]])


def _said(privacy: Mapping[str, Any], key: str) -> list[Any]:
    """A run's values of a key: the ends of its range over the clients, where these differ. Earlier runs have no ranges
    but the range's ends among their quantiles."""
    found = (privacy.get("ranges") or {}).get(key)
    return found or [figures.get(key) for figures in (privacy, *(privacy.get("clients") or {}).values())]


def _by_mechanism(group: Group) -> tuple:
    """Without privacy first, without a guarantee last."""
    return (group.mechanism != "none", group.epsilon is None, group.mechanism, group.epsilon or 0.0)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
