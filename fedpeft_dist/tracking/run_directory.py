"""A run's directory: which files it has, and how each is written and read.

Every file that matters is written beside its place, flushed and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import dump_config, load_config, result_keys, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.runtime.files import remove_temporaries, write_atomically, write_text
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.tracking.run_lock import Owner, RunLock, find_holder, read_owner

if TYPE_CHECKING:
    import torch

# torch and safetensors stand inside the methods that need them: a report reads hundreds of runs and no tensor.

RUNNING, INTERRUPTED, COMPLETE, FAILED = "running", "interrupted", "complete", "failed"


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def trainable_file(self) -> Path:
        return self.path / "trainable.safetensors"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def partition_file(self) -> Path:
        return self.path / "partition.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def lock(self, owner: Owner | None = None, stop: StopRequest | None = None) -> RunLock:
        """Makes this process the run's only writer, and removes what writers that were killed have left half-written.

        Args:
            stop: ends the waiting for an earlier attempt of the owner's job.

        Raises:
            RunInUseError: another process is.
            ConfigError: the directory cannot be made or locked.
        """
        lock = RunLock(self.path, owner or Owner.this_process(), stop or StopRequest())
        for folder in (self.path, self.checkpoints):
            remove_temporaries(folder)
        return lock

    def in_use(self) -> bool:
        """Whether some process is writing the run at this moment."""
        return self.holder() is not None

    def holder(self) -> Owner | None:
        """The process that is writing the run at this moment."""
        return find_holder(self.path)

    def owner(self) -> Owner | None:
        """Who may write the run: its holder, or the later attempt of the holder's job that waits for the lock."""
        return read_owner(self.path)

    def check_writable(self) -> None:
        """
        Raises:
            ConfigError: the directory is not there and cannot be made, or cannot be written to.
        """
        existing = next(path for path in (self.path, *self.path.absolute().parents) if os.path.exists(path))
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"output.root: no run can be written to '{self.path}', because of '{existing}'")

    def read_state(self) -> dict[str, Any] | None:
        """`state` (running, interrupted, complete or failed), the `next_round`, and the `launch` that wrote it.

        A run that failed may also tell its `error`, and one whose privacy was spent before its last round its
        `stopped_at_epsilon`.

        None where there is no run.
        """
        return read_json(self.state_file, "state") if self.state_file.exists() else None

    def write_state(self, state: str, next_round: int, launch: str = "", **further: Any) -> None:
        content = {"state": state, "next_round": next_round, "launch": launch, **further}
        write_text(self.state_file, json.dumps(content) + "\n")

    def stored_config(self) -> RunConfig | None:
        return load_config(self.config_file) if self.config_file.exists() else None

    def write_config(self, config: RunConfig) -> None:
        write_text(self.config_file, dump_config(config))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds a line for a round; a reader sees whole lines only, up to the last one."""
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint on disk must not be ahead of it

    def cut_metrics(self, num_rounds: int) -> None:
        """Drops the lines of the rounds that are about to be run again."""
        if not self.metrics_file.exists():
            return
        rows = [row for row in read_metrics(self.metrics_file) if row["round"] <= num_rounds]
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def write_trainable(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.trainable_file, lambda path: save_file(tensors, path, metadata=metadata))

    def read_trainable(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The trained parameters by name, and the metadata beside them.

        Raises:
            ConfigError: there is no such file, or it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.trainable_file, framework="pt") as file:
                names = file.keys()
                metadata = file.metadata() or {}
                if "backbone_sha256" not in metadata:
                    raise ValueError("it does not say which backbone it goes with")
                return {name: file.get_tensor(name) for name in names}, metadata
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"{self.trainable_file}: no trained parameters can be read ({error})") from None

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.summary_file, json.dumps(summary, indent=2) + "\n")

    def write_partition(
        self, counts: Sequence[Sequence[int]], num_clients: int, class_names: Sequence[str] | None = None
    ) -> None:
        """Who holds what, for a report, which has no data at hand.

        Args:
            counts: samples of each class (inner) that the first clients (outer) hold.
            num_clients: of the whole population.
        """
        names = None if class_names is None else list(class_names)
        found = {"num_clients": num_clients, "class_names": names, "counts": counts}
        write_text(self.partition_file, json.dumps(found) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing, or is no JSON object with these keys.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found.keys() >= set(keys):
            raise ValueError(f"no JSON object with {', '.join(keys)}")
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def check_same_backbone(expected: str, actual: str, path: Path) -> None:
    """Refuses to put trained parameters on a backbone of other weights than they were trained on.

    Raises:
        ConfigError: the two digests differ.
    """
    _check_same(expected, actual, f"{path} was trained on a backbone of other weights", "weights")


def check_same_data(expected: str, actual: str, path: Path) -> None:
    """Refuses to go on with a run on other data than it began with.

    Raises:
        ConfigError: the two digests differ.
    """
    _check_same(expected, actual, f"{path} was begun on other data", "files below data.root")


def check_same_traces(expected: str, actual: str, path: Path) -> None:
    """Refuses to go on with a run by other traces than it began with.

    Raises:
        ConfigError: the two digests differ.
    """
    _check_same(expected, actual, f"{path} was begun with other traces", "files of federation.participation")


def _check_same(expected: str, actual: str, complaint: str, things: str) -> None:
    if expected != actual:
        raise ConfigError(
            f"{complaint} (sha256 {expected[:12]} there, {actual[:12]} here); give back the {things} that it had, or "
            "train again under another output.name"
        )


def is_complete(state: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether nothing is left to do for a config in a directory with that state."""
    if state["state"] != COMPLETE:
        return False
    budget = state.get("stopped_at_epsilon")
    is_spent = budget is not None and budget == getattr(config.privacy, "stop_at_epsilon", None)
    return is_spent or state.get("next_round", 0) >= config.federation.rounds


def with_choices_of(stored: RunConfig, config: RunConfig) -> RunConfig:
    """The config with what `auto` stood for when the stored one's run began."""
    for section, keys in (("runtime", ("device", "precision", "lanes")), ("privacy", ("slots",))):
        theirs, ours = getattr(stored, section), getattr(config, section)
        taken = {key: getattr(theirs, key, "auto") for key in keys if getattr(ours, key, None) == "auto"}
        config = with_values(config, section, **taken)
    return config


def check_same_run(stored: RunConfig, config: RunConfig, path: Path) -> None:
    """Refuses to go on with a run under a config that would give another result.

    `federation.rounds` may grow, unless the rounds already run have followed a schedule that depends on it, and with it
    the privacy budget; `privacy.stop_at_epsilon` may change.

    Raises:
        ConfigError: with the keys that differ.
    """
    differing = differing_keys(stored, config)
    if differing:
        old, new = result_keys(stored), result_keys(config)
        changes = ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in differing)
        raise ConfigError(f"{path} holds a run of another config: {changes}; give another output.name, or remove it")


def differing_keys(stored: RunConfig, config: RunConfig) -> list[str]:
    """The keys in which a config asks for another result than a run's own, as `check_same_run` counts them."""
    old, new = result_keys(stored), result_keys(config)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    longer = config.federation.rounds > stored.federation.rounds
    if "federation.rounds" in differing and longer and config.client.schedule.name != "cosine":
        differing.remove("federation.rounds")
        target = "privacy.epsilon"
        if target in differing and None not in (old.get(target), new.get(target)) and new[target] > old[target]:
            differing.remove(target)
    return [key for key in differing if key != "privacy.stop_at_epsilon"]
