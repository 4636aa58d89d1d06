"""What the noise of a private run follows from.

Two releases must never have the same noise, or their difference would have none. So the noise does not follow from the
config's seed alone, but from that and all else that makes a run's releases what they are: its config, data, backbone
and noise multipliers. A run keeps its noise seed in its checkpoints, which are as secret as the config's seed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable

import torch

from fedpeft_dist.config.load import result_keys
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.runtime.collectives import sum_over_ranks
from fedpeft_dist.runtime.process import Runtime


def derive_noise_seed(config: RunConfig, digests: Iterable[str], noise_multipliers: torch.Tensor) -> int:
    """The same for runs that release the same, be it for fewer or more rounds.

    Args:
        config: with what `auto` stood for.
        digests: of the data, the backbone and the traces.
        noise_multipliers: float64, on the CPU.
    """
    keys = result_keys(config) | {"runtime.compile": config.runtime.compile}
    keys.pop("privacy.stop_at_epsilon")
    if config.client.schedule.name != "cosine":  # whose rates depend on how many rounds there will be
        keys.pop("federation.rounds")
    # The target says nothing that the multipliers do not; where these are given, clients of later rounds join them.
    is_calibrated = keys.pop("privacy.epsilon") is not None
    content = hashlib.sha256(json.dumps([keys, *digests], sort_keys=True).encode())
    if is_calibrated:
        content.update(noise_multipliers.numpy())
    return derive_seed(config.seed, "noise", int.from_bytes(content.digest(), "big"))


def draw_noise_seed(runtime: Runtime) -> int:
    """One from the operating system, the same on all ranks; every rank must call it."""
    own = secrets.randbits(62) if runtime.is_main else 0
    return int(sum_over_ranks(torch.tensor([own], device=runtime.device), runtime))
