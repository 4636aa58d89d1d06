"""A run's directory: which files it has, and how each is written and read.

Every file that matters is written beside its place, flushed and renamed.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import dump_config, load_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.runtime.files import remove_temporaries, write_atomically, write_text
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.tracking.run_lock import Owner, RunLock, find_holder, read_owner

if TYPE_CHECKING:
    import torch

# torch and safetensors stand inside the methods that need them: a report reads hundreds of runs and no tensor.

RUNNING, INTERRUPTED, COMPLETE, FAILED = "running", "interrupted", "complete", "failed"


class RunDirectory:
    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.state_file = path / "state.json"
        self.metrics_file = path / "metrics.jsonl"
        self.trainable_file = path / "trainable.safetensors"
        self.summary_file = path / "summary.json"
        self.partition_file = path / "partition.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """
        Raises:
            ConfigError: no run was begun there.
        """
        directory = cls(path)
        if not directory.config_file.exists():
            raise ConfigError(f"{path}: no run's directory, it has no config.yaml")
        return directory

    def lock(self, owner: Owner | None = None, stop: StopRequest | None = None) -> RunLock:
        """Makes this process the run's only writer, and removes files that killed writers have left half-written.

        Args:
            stop: ends the wait for an earlier attempt of the owner's job.

        Raises:
            RunInUseError: another process is writing the run.
            ConfigError: the directory cannot be made, written or locked.
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
        """The process that may write the run: the lock's holder, or a later attempt of its job that waits for it."""
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

    def write_trainable(self, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.trainable_file, lambda path: save_file(tensors, path, metadata=metadata))

    def read_trainable(self) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
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
        """Writes which client holds which classes, for a report, which has no data at hand.

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
