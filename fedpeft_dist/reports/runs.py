"""Reading runs for a report: config, state, summary and metrics of every run's directory, and nothing heavy.

A run whose files cannot be read is kept as damaged, together with the reason, so that it hides no other run.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.load import result_keys
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER, MIB
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory, read_json, read_metrics
from fedpeft_dist.tracking.sweep_axes import AxisChoice, read_axes

DAMAGED = "damaged"
"""The state of a run whose files cannot be read. Only reports use this state."""


class Point(NamedTuple):
    """A round of a run, or the mean over the runs of a group."""

    round: int
    mib: float
    """Uplink of all clients, up to this round."""
    hours: float | None
    """Simulated hours up to this round; None for runs without simulated time."""
    mean: float | None
    """The accuracy; None for a round without evaluation."""
    std: float = 0.0


@dataclass(frozen=True)
class Run:
    """A run as a report sees it."""

    name: str
    state: str
    keys: dict[str, Any] = field(default_factory=dict)
    """Every config key that can change a result, dotted, with its value; empty for a run without a config."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Empty unless the run is complete."""
    vectors_sent: int = 1
    """What a client sends in a round, in vectors of the trained parameters."""
    curve: tuple[Point, ...] = ()
    """The rounds that were evaluated."""
    rounds_done: int = 0
    partition: dict[str, Any] | None = None
    """partition.json, with its counts as an array, int64 [clients, classes]."""
    axes: dict[str, AxisChoice] = field(default_factory=dict)
    """The choice on each axis of the run's sweep; empty for a run that is no sweep's cell."""
    problem: str | None = None
    """The reason why files cannot be read, or why the run failed."""

    @property
    def mib_per_client(self) -> float:
        """What a client of a complete run sends in a round."""
        return self.vectors_sent * self.summary["trainable_parameters"] * BYTES_PER_PARAMETER / MIB

    @property
    def seed(self) -> int | None:
        return self.keys.get("seed")

    @property
    def privacy(self) -> dict[str, Any]:
        """The privacy that the summary states; empty without privacy. Its epsilon is None without a guarantee."""
        found = self.summary.get("privacy")
        epsilon = found.get("epsilon") if found else None
        return {**found, "epsilon": epsilon if is_number(epsilon) else None} if found else {}


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
    summary = {}
    try:
        state = directory.read_state() or {}
        config = directory.stored_config()
        if state.get("state") == COMPLETE:
            if config is None:
                raise ConfigError(f"{directory.config_file}: missing, though the run is complete")
            summary = read_json(directory.summary_file, "method")
            counts = ("trainable_parameters", "backbone_parameters", "uplink_bytes_total")
            _check_numbers(directory.summary_file, summary, ["final_accuracy"], counts)
    except ConfigError as error:
        return Run(name, DAMAGED, problem=one_line(error))
    problems = [str(state.get("error", ""))]
    found = {}
    # The result does not depend on these files, so a damaged one is only noted.
    readers = {
        "rounds": (_read_rounds, directory.metrics_file),
        "partition": (_read_partition, directory.partition_file),
        "axes": (read_axes, directory.path),
    }
    for part, (read, path) in readers.items():
        try:
            found[part] = read(path)
        except ConfigError as error:
            problems.append(one_line(error))
    if summary and not directory.metrics_file.exists():
        problems.append(f"{directory.metrics_file}: missing, so there is no curve")
    rounds, next_round = found.pop("rounds", ()), state.get("next_round")
    return Run(
        name=name,
        state=str(state.get("state")),
        keys={} if config is None else report_keys(config),
        summary=summary,
        vectors_sent=1 if config is None else config.algorithm.vectors_sent,
        curve=tuple(point for point in rounds if point.mean is not None),
        rounds_done=len(rounds) or (next_round if type(next_round) is int else 0),
        problem="; ".join(filter(None, problems)) or None,
        **found,
    )


def report_keys(config: RunConfig) -> dict[str, Any]:
    """`result_keys`, but the free-form arguments of a backbone are one value. Lists become text."""
    free = "backbone.model_args"
    keys = {key: value for key, value in result_keys(config).items() if not key.startswith(free)}
    arguments = config.backbone.model_args
    keys[free] = ", ".join(f"{name}={json.dumps(arguments[name])}" for name in sorted(arguments))
    return {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in keys.items()}


def _read_rounds(path: Path) -> list[Point]:
    """The rounds of a metrics.jsonl; empty where there is no such file."""
    try:
        rows = read_metrics(path) if path.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    points, sent, seconds = [], 0, 0.0
    for number, row in enumerate(rows, 1):
        found = row if isinstance(row, dict) else {}
        accuracy, time = found.get("accuracy"), found.get("simulated_seconds")
        keys = ["round", "uplink_bytes"] if accuracy is None else ["round", "uplink_bytes", "accuracy"]
        _check_numbers(f"{path}: line {number}", found, keys)
        sent += found["uplink_bytes"]
        seconds += time if is_number(time) else math.nan
        points.append(Point(int(found["round"]), sent / MIB, None if math.isnan(seconds) else seconds / 3600, accuracy))
    return points


def _check_numbers(place: Path | str, content: dict[str, Any], keys: Sequence[str], counts: Sequence[str] = ()) -> None:
    wrong = [key for key in keys if not is_number(content.get(key))]
    wrong += [key for key in counts if type(content.get(key)) is not int or content[key] < 1]
    if wrong:
        raise ConfigError(f"{place}: cannot be read ({wrong[0]} is {content.get(wrong[0])!r}, no valid number)")


def _read_partition(path: Path) -> dict[str, Any] | None:
    """The file that `RunDirectory.write_partition` wrote; None where there is no such file."""
    if not path.exists():
        return None
    found = read_json(path, "num_clients", "counts")
    try:
        counts = np.array(found["counts"])
    except ValueError:  # rows of several lengths
        counts = np.array([])
    is_table = counts.ndim == 2 and counts.dtype.kind == "i" and counts.min(initial=0) >= 0
    if not is_table or type(found["num_clients"]) is not int:
        raise ConfigError(f"{path}: cannot be read (counts are no table of clients and classes)")
    names = found.get("class_names")
    has_names = isinstance(names, list) and len(names) == counts.shape[1]
    return {**found, "counts": counts, "class_names": [str(name) for name in names] if has_names else None}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
