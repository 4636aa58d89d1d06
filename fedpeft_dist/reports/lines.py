"""The curves of a report, as the plot and the page draw them: one line a group, and one for each unfinished run."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft_dist.reports.groups import Grouping, Statistic
from fedpeft_dist.reports.runs import Point, Run
from fedpeft_dist.tracking.run_directory import COMPLETE


@dataclass(frozen=True)
class Line:
    label: str
    method: str
    curve: list[tuple[Point, Statistic]]
    state: str = COMPLETE
    seeds: int = 1

    @property
    def is_complete(self) -> bool:
        return self.state == COMPLETE


def group_lines(grouping: Grouping) -> list[Line]:
    """One line a group, in the order of the main table's rows."""
    return [Line(group.label, group.method, group.curve(), seeds=len(group.seeds)) for group in grouping.groups]


def unfinished_lines(runs: Iterable[Run]) -> list[Line]:
    """One line for each unfinished run that has evaluated a round."""
    return [
        Line(
            f"{run.name} ({run.state})",
            run.keys.get("method.name", ""),
            [(point, Statistic(point.accuracy, None, 1)) for point in run.curve],
            run.state,
        )
        for run in runs
        if run.state != COMPLETE and run.curve
    ]
