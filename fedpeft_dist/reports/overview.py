"""The tables of all groups, of all runs, and of the runs that are not complete."""

from collections.abc import Sequence

from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.runs import Run
from fedpeft_dist.reports.table import (
    ALWAYS,
    EMPTY,
    NEVER,
    Cell,
    Column,
    Table,
    accuracy_cell,
    axis_cell,
    axis_headings,
    count_cell,
    epsilon_cell,
    text_cell,
)
from fedpeft_dist.tracking.run_directory import COMPLETE

MAX_AXES = 16
"""The table of all groups has columns for so many axes; the CSV of all runs has every key."""
_FROM_SUMMARY = (
    *("trainable_parameters", "backbone_parameters", "uplink_bytes_total", "downlink_bytes_total"),
    *("simulated_hours", "final_accuracy", "best_accuracy", "samples_per_second", "weights_sha256"),
)


def main_table(grouping: Grouping) -> Table:
    """One row a group; the group with the fewest bytes comes first."""
    groups = grouping.groups
    axes = grouping.varying[:MAX_AXES]
    private = any(group.privacy for group in groups)
    timed = any(group.simulated_hours is not None for group in groups)
    columns = [Column("method", is_text=True)]
    for axis, heading in zip(axes, axis_headings(axes)):
        columns.append(Column(heading, is_text=True, drop=NEVER if axis in grouping.telling else ALWAYS))
    columns += [Column("trained parameters"), Column("clients a round", drop=1)]
    columns += [Column("MiB per client and round", drop=3), Column("MiB a round")]
    columns += [Column("total MiB", drop=4), Column("share of full's bytes", drop=2)]
    columns += [Column("simulated hours")] * timed + [Column("epsilon")] * private
    columns += [Column("final accuracy"), Column("seeds")]
    rows = []
    for group in groups:
        row = [text_cell(group.method), *(axis_cell(group, axis) for axis in axes), *_byte_cells(group)]
        row += [_hours_cell(group)] * timed + [epsilon_cell(group)] * private
        rows.append((*row, accuracy_cell(group), count_cell(len(group.seeds))))
    return Table("groups", "All groups", tuple(columns), tuple(rows), grouping.note)


def _byte_cells(group: Group) -> list[Cell]:
    return [
        count_cell(group.parameters),
        count_cell(group.cohort),
        Cell(f"{group.mib_per_client:,.4f}", group.mib_per_client),
        Cell(f"{group.mib_per_round:,.3f}", group.mib_per_round),
        Cell(f"{group.mib_total:,.2f}", group.mib_total),
        Cell(f"{group.share_of_full:.2%}", group.share_of_full),
    ]


def _hours_cell(group: Group) -> Cell:
    hours = group.simulated_hours
    return EMPTY if hours is None else Cell(f"{hours:,.4g}", hours)


def unfinished_table(runs: Sequence[Run]) -> Table:
    columns = (Column("run", True), Column("state", True), Column("rounds done"), Column("what is wrong", True))
    rows = [
        (text_cell(run.name), text_cell(run.state), count_cell(run.rounds_done), Cell(run.problem or "", run.problem))
        for run in runs
        if run.state != COMPLETE or run.problem
    ]
    title = "Unfinished or damaged runs"
    if not any(run.problem for run in runs):
        title, columns, rows = "Unfinished runs", columns[:3], [row[:3] for row in rows]
    return Table("unfinished", title, columns, tuple(rows))


def run_table(runs: Sequence[Run], grouping: Grouping) -> Table:
    """One row a run, with every config key that differs between runs; for the CSV."""
    labels = {run.name: group.label for group in grouping.groups for run in group.runs}
    keys = sorted({key for run in runs for key in run.keys} - {"seed", "method.name"})
    differing = [k for k in keys if len({repr(run.keys[k]) for run in runs if k in run.keys}) > 1]
    columns = ["run", "state", "group", "method.name", *differing, "seed", "rounds_done", *_FROM_SUMMARY]
    columns += ["epsilon", "dp_delta", "noise_multiplier", "guarantee", "outside_guarantee", "problem"]
    rows = []
    for run in runs:
        values = [run.name, run.state, labels.get(run.name), run.keys.get("method.name")]
        values += [*(run.keys.get(key) for key in differing), run.seed, run.rounds_done]
        values += [(run.summary or {}).get(key) for key in _FROM_SUMMARY]
        privacy = run.privacy or {}
        values += [run.epsilon, *(privacy.get(key) for key in ("dp_delta", "noise_multiplier", "guarantee"))]
        values += [", ".join(privacy.get("outside") or ()), run.problem]
        rows.append(tuple(Cell("" if value is None else str(value), value) for value in values))
    return Table("runs", "All runs", tuple(Column(name) for name in columns), tuple(rows))
