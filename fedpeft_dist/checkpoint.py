"""Checkpoints: all that a run needs to go on as if it had never stopped, in safetensors.

A run's state between two rounds is small: the global vector, the server optimizer, what its privacy's noise follows
from and the number of the round. Clients keep nothing from round to round, and randomness has no history. Beside it
stand what it belongs to (config, backbone, data, versions of libraries) and a digest of the whole, so that a damaged
file is known for what it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.runtime.files import write_atomically
from fedpeft_dist.runtime.versions import library_versions

NUM_KEPT = 2
_NAME = re.compile(r"round-([0-9]{6}|[1-9][0-9]{6,17})\.safetensors")


@dataclass(frozen=True)
class Origin:
    """What a checkpoint belongs to."""

    config: dict[str, Any]
    """Its keys and values."""
    config_sha256: str
    """Of the keys that can change the result."""
    backbone_sha256: str
    """Of the backbone that the vector goes with."""
    data_sha256: str
    """Of the data that it was trained on (`Dataset.fingerprint`)."""
    traces_sha256: str = ""
    """Of the traces that clients took part by; the empty text where there were none."""
    versions: dict[str, str] = field(default_factory=library_versions)

    @classmethod
    def of(cls, config: RunConfig, backbone_sha256: str, data_sha256: str, traces_sha256: str = "") -> Origin:
        tree = json.loads(config.model_dump_json())
        return cls(tree, config_digest(config), backbone_sha256, data_sha256, traces_sha256)


@dataclass(frozen=True)
class Checkpoint:
    """The state before round `next_round` (counted from 0)."""

    next_round: int
    origin: Origin
    vector: torch.Tensor
    """float32 [P]."""
    server_state: dict[str, torch.Tensor]
    totals: dict[str, float]
    """Sums and records over the rounds so far, for the run's summary."""
    aggregator_state: dict[str, torch.Tensor] = field(default_factory=dict)
    noise_multipliers: torch.Tensor | None = None
    """Of the run's privacy plan, which stay as they were calibrated: float64 [N], or [1]."""
    noise_seed: int | None = None
    """What a private run's noise follows from."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes `round-<n>.safetensors` whole or not at all, and keeps the newest two.

    Whatever has another name than a checkpoint's stays untouched.

    Raises:
        OSError: a full disk; the older ones are still there.
    """
    tensors = {"vector": checkpoint.vector}
    tensors |= {f"server.{name}": tensor for name, tensor in checkpoint.server_state.items()}
    tensors |= {f"aggregator.{name}": tensor for name, tensor in checkpoint.aggregator_state.items()}
    if checkpoint.noise_multipliers is not None:
        tensors["noise_multipliers"] = checkpoint.noise_multipliers
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "next_round": str(checkpoint.next_round),
        "origin": json.dumps(asdict(checkpoint.origin)),
        "totals": json.dumps(checkpoint.totals),
        "noise_seed": json.dumps(checkpoint.noise_seed),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    path = directory / f"round-{checkpoint.next_round:06d}.safetensors"
    # Not by save_file, which tells of a full disk in an exception of its own.
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))
    for old in [path for path in _paths(directory) if not path.is_dir()][:-NUM_KEPT]:
        old.unlink()
    return path


def load_newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole.

    Returns:
        It, or None where there is none; and a line on each newer one, which is damaged.

    Raises:
        ConfigError: one cannot be read, which says nothing about what it holds.
    """
    damaged = []
    for path in reversed(_paths(directory)):
        try:
            return _load(path), damaged
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            damaged.append(f"{path}: a damaged checkpoint ({' '.join(str(error).split())})")
    return None, damaged


def set_newer_aside(directory: Path, next_round: int) -> None:
    """Takes the checkpoints of later rounds, which are damaged, out of the way of what the run writes from here on."""
    for path in _paths(directory):
        if _round_of(path) > next_round:
            path.replace(path.with_name(f"damaged-{path.name}"))


def _load(path: Path) -> Checkpoint:
    if path.is_dir():
        raise ValueError("a folder")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError("its content does not match its digest")
    if int(metadata["next_round"]) != _round_of(path):
        raise ValueError(f"it holds the state after round {metadata['next_round']}")
    origin = json.loads(metadata["origin"])
    return Checkpoint(
        next_round=int(metadata["next_round"]),
        origin=Origin(**{entry.name: origin[entry.name] for entry in fields(Origin) if entry.name in origin}),
        vector=tensors["vector"],
        server_state=_below("server.", tensors),
        totals=json.loads(metadata["totals"]),
        aggregator_state=_below("aggregator.", tensors),
        noise_multipliers=tensors.get("noise_multipliers"),
        noise_seed=json.loads(metadata.get("noise_seed", "null")),
    )


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _paths(directory: Path) -> list[Path]:
    """By round. What a user keeps beside the checkpoints has another name, such as a copy's, and is left out."""
    return sorted((path for path in directory.glob("round-*.safetensors") if _NAME.fullmatch(path.name)), key=_round_of)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
