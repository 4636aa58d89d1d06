"""Reading runs for a report: config, state, summary and metrics of every run's directory, and nothing heavy.

A run whose files cannot be read is kept as damaged, together with the reason, so that it hides no other run.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.load import result_keys
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.lanes.wire import MIB
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory, read_json, read_metrics
from fedpeft_dist.tracking.sweep_axes import AxisChoice, read_axes

DAMAGED = "damaged"
"""The state of a run whose files cannot be read. Only reports use this state."""
COUNTS = ("trainable_parameters", "backbone_parameters", "uplink_bytes_total")
SUMMARY_KEYS = ("method", *COUNTS, "final_accuracy")
"""The keys that a report cannot do without."""


@dataclass(frozen=True)
class Point:
    """A round that was evaluated."""

    round: int
    accuracy: float
    mib_sent: float
    """Uplink of all clients, up to this round."""
    hours: float | None = None
    """Simulated hours up to this round; None for runs without simulated time."""


@dataclass(frozen=True)
class Run:
    """A run as a report sees it. `summary` is None unless the run is complete; `keys` are empty without a config."""

    name: str
    state: str
    keys: dict[str, Any] = field(default_factory=dict)
    """Every config key that can change a result, dotted, with its value."""
    summary: dict[str, Any] | None = None
    curve: tuple[Point, ...] = ()
    rounds_done: int = 0
    partition: dict[str, Any] | None = None
    axes: dict[str, AxisChoice] = field(default_factory=dict)
    """The choice on each axis of the run's sweep; empty for a run that is no sweep's cell."""
    problem: str | None = None
    """The reason why files cannot be read, or why the run failed."""

    @property
    def seed(self) -> int | None:
        return self.keys.get("seed")

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        """The privacy that the summary states; None for a run without privacy."""
        found = (self.summary or {}).get("privacy")
        return found if isinstance(found, Mapping) else None

    @property
    def epsilon(self) -> float | None:
        """The epsilon that the run was accounted for; None for a run without a guarantee."""
        epsilon = (self.privacy or {}).get("epsilon")
        return float(epsilon) if is_number(epsilon) else None


def read_runs(directory: Path) -> list[Run]:
    """The runs at or below a directory, by name.

    Raises:
        ConfigError: there is no run, or no run whose files can be read.
    """
    runs = []
    for state_file in sorted(directory.rglob("state.json")):
        path = state_file.parent
        name = path.relative_to(directory).as_posix() if path != directory else path.absolute().name
        runs.append(_read_run(RunDirectory(path), name))
    if not runs:
        raise ConfigError(f"{directory}: no run's directory (state.json) at or below it")
    if all(run.state == DAMAGED for run in runs):
        others = f" (and {len(runs) - 1} more damaged)" if len(runs) > 1 else ""
        raise ConfigError(f"{runs[0].problem}{others}")
    return runs


def _read_run(directory: RunDirectory, name: str) -> Run:
    try:
        state = directory.read_state() or {}
        config = directory.stored_config()
        keys = {} if config is None else report_keys(config)
        summary = None
        if state.get("state") == COMPLETE:
            if config is None:
                raise ConfigError(f"{directory.config_file}: missing, though the run is complete")
            summary = _read_summary(directory.summary_file)
    except ConfigError as error:
        return Run(name, DAMAGED, problem=one_line(error))
    problems = [str(state.get("error", ""))]

    def read(reader: Any, *arguments: Any, default: Any) -> Any:
        """Reads a file that the result does not depend on; damage to such a file is noted."""
        try:
            return reader(*arguments)
        except ConfigError as error:
            problems.append(one_line(error))
            return default

    rows = read(_read_rows, directory.metrics_file, default=[])
    curve = read(_curve, directory.metrics_file, rows, default=())
    partition = read(_read_partition, directory.partition_file, default=None)
    axes = read(read_axes, directory.path, default={})
    if summary is not None and not directory.metrics_file.exists():
        problems.append(f"{directory.metrics_file}: missing, so there is no curve")
    next_round = state.get("next_round")
    rounds_done = len(rows) or (next_round if type(next_round) is int else 0)
    problem = "; ".join(filter(None, problems)) or None
    return Run(name, str(state.get("state")), keys, summary, curve, rounds_done, partition, axes, problem)


def report_keys(config: RunConfig) -> dict[str, Any]:
    """`result_keys`, but the free-form arguments of a backbone are one value. Lists become text."""
    free = "backbone.model_args"
    keys = {key: value for key, value in result_keys(config).items() if not key.startswith(free)}
    arguments = config.backbone.model_args
    keys[free] = ", ".join(f"{name}={json.dumps(arguments[name])}" for name in sorted(arguments))
    return {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in keys.items()}


def _read_summary(path: Path) -> dict[str, Any]:
    summary = read_json(path, *SUMMARY_KEYS)
    wrong = [key for key in COUNTS if type(summary[key]) is not int or summary[key] < 1]
    wrong += ["final_accuracy"] * (not is_number(summary["final_accuracy"]))
    if wrong:
        raise ConfigError(f"{path}: cannot be read ({wrong[0]} is {summary[wrong[0]]!r}, no valid number)")
    return summary


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rounds of a metrics.jsonl; empty where there is no such file."""
    try:
        rows = read_metrics(path) if path.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not is_number(row.get("uplink_bytes")) or not is_number(row.get("round")):
            raise ConfigError(f"{path}: line {number} cannot be read as a round's metrics")
    return rows


def _curve(path: Path, rows: list[dict[str, Any]]) -> tuple[Point, ...]:
    points, sent, seconds = [], 0, 0.0
    timed = all(is_number(row.get("simulated_seconds")) for row in rows)
    for row in rows:
        sent += row["uplink_bytes"]
        seconds += row["simulated_seconds"] if timed else 0.0
        accuracy = row.get("accuracy")
        if accuracy is None:
            continue
        if not is_number(accuracy):
            raise ConfigError(f"{path}: accuracy of round {row['round']} is {accuracy!r}, no number")
        points.append(Point(int(row["round"]), float(accuracy), sent / MIB, seconds / 3600 if timed else None))
    return tuple(points)


def _read_partition(path: Path) -> dict[str, Any] | None:
    """The file that `RunDirectory.write_partition` wrote; None where there is no such file."""
    if not path.exists():
        return None
    found = read_json(path, "num_clients", "counts")
    counts = found["counts"]
    rows = counts if isinstance(counts, list) else []
    if not rows or not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        raise ConfigError(f"{path}: cannot be read (counts are no table of clients and classes)")
    if not all(type(count) is int and count >= 0 for row in rows for count in row):
        raise ConfigError(f"{path}: cannot be read (counts are no numbers of samples)")
    if type(found["num_clients"]) is not int:
        raise ConfigError(f"{path}: cannot be read (num_clients is {found['num_clients']!r})")
    names = found.get("class_names")
    if not isinstance(names, list) or len(names) != len(rows[0]):
        found["class_names"] = None
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
