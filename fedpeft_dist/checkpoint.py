"""Checkpoints: a run's state between two rounds, and where it came from, in safetensors.

Beside the state stand the config, digests of backbone, data and traces, the versions of libraries, and a digest of the
whole file, which shows damage. Randomness has no history, so nothing else is needed to go on.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft_dist.algorithms.state import State, with_rows
from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.load import config_digest
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.runtime.files import write_atomically
from fedpeft_dist.runtime.process import library_versions

NUM_KEPT = 2
FORMAT = "2"
"""Checkpoints of another format are refused."""
_NAME = re.compile(r"round-([0-9]{6}|[1-9][0-9]{6,17})\.safetensors")


@dataclass(frozen=True)
class Origin:
    """What a checkpoint belongs to."""

    config: dict[str, Any]
    """The config's keys and values."""
    config_sha256: str
    """SHA-256 of the keys that can change the result."""
    backbone_sha256: str
    """SHA-256 of the backbone that the vector goes with."""
    data_sha256: str
    """SHA-256 of the training data (`Dataset.fingerprint`)."""
    traces_sha256: str = ""
    """SHA-256 of the traces of participation; the empty text if there are none."""
    start_sha256: str = ""
    """SHA-256 of the parameters that `method.init` has given; the empty text without it."""
    versions: dict[str, str] = field(default_factory=library_versions)

    @classmethod
    def of(cls, config: RunConfig, backbone: str, data: str, traces: str = "", start: str = "") -> "Origin":
        """Takes the digests."""
        tree = json.loads(config.model_dump_json())
        return cls(tree, config_digest(config), backbone, data, traces, start)


@dataclass(frozen=True)
class Noise:
    """The noise that a private run has begun with. It stays, whatever the run's config becomes."""

    multipliers: torch.Tensor
    """float64, on the CPU: [N] of the clients, or [1] of the server."""
    seed: int


@dataclass(frozen=True)
class Checkpoint:
    """A run's state between two rounds, and what it belongs to."""

    state: State
    origin: Origin
    noise: Noise | None = None


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes `round-<n>.safetensors` whole or not at all, and keeps the newest two.

    Whatever has another name than a checkpoint's stays untouched.

    Raises:
        OSError: a full disk; the older ones are still there.
    """
    state, noise = checkpoint.state, checkpoint.noise
    tensors = {"vector": state.vector}
    tensors |= {f"server.{name}": tensor for name, tensor in state.server.items()}
    tensors |= {f"algorithm.{name}": tensor for name, tensor in state.algorithm.items()}
    if state.clients:
        clients = sorted(state.clients)
        tensors["clients.numbers"] = torch.tensor(clients)
        tensors["clients.rows"] = torch.stack([state.clients[client] for client in clients])
    if noise is not None:
        tensors["noise_multipliers"] = noise.multipliers
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "next_round": str(state.round),
        "origin": json.dumps(asdict(checkpoint.origin)),
        "totals": json.dumps(state.totals),
        "noise_seed": json.dumps(None if noise is None else noise.seed),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    path = directory / f"round-{state.round:06d}.safetensors"
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
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            damaged.append(f"{path}: a damaged checkpoint ({one_line(error)})")
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
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path}: a checkpoint of another version of fedpeft_dist; go on with that one, or remove it")
    if int(metadata["next_round"]) != _round_of(path):
        raise ValueError(f"it holds the state after round {metadata['next_round']}")
    numbers = tensors.get("clients.numbers", torch.zeros(0)).tolist()
    seed = json.loads(metadata["noise_seed"])
    return Checkpoint(
        state=State(
            round=int(metadata["next_round"]),
            vector=tensors["vector"],
            server=_below("server.", tensors),
            algorithm=_below("algorithm.", tensors),
            clients=with_rows({}, numbers, tensors["clients.rows"]) if numbers else {},
            totals=json.loads(metadata["totals"]),
        ),
        origin=Origin(**json.loads(metadata["origin"])),
        noise=None if seed is None else Noise(tensors["noise_multipliers"], seed),
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
    """The checkpoints, ordered by round. A user's files beside them have other names and are left out."""
    return sorted((path for path in directory.glob("round-*.safetensors") if _NAME.fullmatch(path.name)), key=_round_of)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
