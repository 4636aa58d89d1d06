"""The seed of a private run's noise and, where cohorts are secret, of these.

Two releases must never have the same noise, or their difference would have none. So the noise follows from the config's
seed and from all that makes a run's releases: its config, noise multipliers, traces, backbone and first parameters,
every image of its training split, and the machinery that computes them. A run keeps its noise seed in its checkpoints,
which are as secret as the config's seed.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable

import torch

from fedpeft_dist.config.load import result_keys
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.runtime.collectives import sum_over_ranks
from fedpeft_dist.runtime.process import Runtime, library_versions


def derive_noise_seed(
    config: RunConfig, digests: Iterable[str], train: ImageSet, noise_multipliers: torch.Tensor, runtime: Runtime
) -> int:
    """The same seed for runs that release the same, be it for fewer or more rounds; every rank must call it.

    Args:
        config: with the values that `auto` stood for.
        digests: of the data set, the backbone, the traces, and the parameters of `method.init`.
        train: the clients' training images. Rank 0 reads all of them.
        noise_multipliers: float64, on the CPU.
    """
    if not runtime.is_main:
        return _from_main(0, runtime)
    own = {f"runtime.{key}": getattr(config.runtime, key) for key in ("compile", "products")}
    keys = result_keys(config) | own
    keys.pop("privacy.stop_at_epsilon")
    if config.client.schedule.name != "cosine":  # a cosine's rates depend on the number of rounds
        keys.pop("federation.rounds")
    # The multipliers say all that the target says. If the config gives them, clients of later rounds join them.
    is_calibrated = keys.pop("privacy.epsilon") is not None
    rounding = [library_versions()]  # runs that round gradients differently release different things
    if runtime.device.type == "cuda":
        rounding += [torch.cuda.get_device_name(runtime.device), runtime.world_size]
    content = hashlib.sha256(json.dumps([keys, *digests, *rounding], sort_keys=True).encode())
    content.update(train.digest())
    if is_calibrated:
        content.update(noise_multipliers.numpy())
    return _from_main(derive_seed(config.seed, "noise", int.from_bytes(content.digest(), "big")), runtime)


def draw_noise_seed(runtime: Runtime) -> int:
    """A seed from the operating system, the same on all ranks; every rank must call it."""
    return _from_main(secrets.randbits(62) if runtime.is_main else 0, runtime)


def _from_main(value: int, runtime: Runtime) -> int:
    """The value of rank 0; the others give 0."""
    return int(sum_over_ranks(torch.tensor([value], device=runtime.device), runtime))
