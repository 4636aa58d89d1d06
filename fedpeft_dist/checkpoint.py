"""Checkpoints: all that a run needs to go on as if it had never stopped, in safetensors.

A run's state between two rounds is small: the global vector, the server optimizer and the number of the round. Clients
keep nothing from round to round, and randomness has no history.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.files import write_atomically

NUM_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state before round `next_round` (counted from 0)."""

    next_round: int
    backbone_sha256: str
    """Of the backbone that the vector goes with."""
    data_sha256: str
    """Of the data that it was trained on (`Dataset.fingerprint`)."""
    vector: torch.Tensor
    """float32 [P]."""
    server_state: dict[str, torch.Tensor]
    totals: dict[str, float]
    """Sums and records over the rounds so far, for the run's summary."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes `round-<n>.safetensors` whole or not at all, and keeps the newest two."""
    tensors = {"vector": checkpoint.vector}
    tensors |= {f"server.{name}": tensor for name, tensor in checkpoint.server_state.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "next_round": str(checkpoint.next_round),
        "backbone_sha256": checkpoint.backbone_sha256,
        "data_sha256": checkpoint.data_sha256,
        "totals": json.dumps(checkpoint.totals),
    }
    path = directory / f"round-{checkpoint.next_round:06d}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    for old in _paths(directory)[:-NUM_KEPT]:
        old.unlink()


def load_newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None where it has none.

    Raises:
        ConfigError: the newest one cannot be read.
    """
    paths = _paths(directory)
    if not paths:
        return None
    try:
        with safe_open(paths[-1], framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        return Checkpoint(
            next_round=int(metadata["next_round"]),
            backbone_sha256=metadata["backbone_sha256"],
            data_sha256=metadata["data_sha256"],
            vector=tensors.pop("vector"),
            server_state={name.removeprefix("server."): tensor for name, tensor in tensors.items()},
            totals=json.loads(metadata["totals"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{paths[-1]}: not a readable checkpoint ({error}); remove it to go on from the one before"
        ) from None


def _paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("round-*.safetensors"), key=lambda path: int(path.stem.removeprefix("round-")))
