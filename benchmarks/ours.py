"""A contestant: the package's own rounds, from the plan to the new state. Its argument is a config as JSON.

`federation_file` writes the same federation for the contestants that do without the package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, get_args

import torch
from contest import Contestant, claim_output, serve
from safetensors.torch import save_file
from workloads import SETTINGS, Workload

from fedpeft_dist.backbones.timm_backbone import build_backbone
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig, RuntimeConfig
from fedpeft_dist.federation.round import run_round
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.federation.watch import Watch
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.methods import METHODS as REGISTRY
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.runtime.process import Runtime

NAMES = [get_args(section.model_fields["name"].annotation)[0] for section in REGISTRY]
METHODS: dict[str, dict[str, Any]] = {name: {"name": name, **SETTINGS.get(name, {})} for name in NAMES}
"""Every method of the package, with its settings for the models of the workloads."""


def main() -> None:
    answers, config = claim_output(), parse_config(json.loads(sys.argv[1]), "benchmark")
    with process.start(config.runtime) as runtime:
        rounds = Rounds(config, runtime)
        facts = {"lanes": rounds.simulation.config.runtime.lanes, "precision": runtime.precision}
        serve(answers, rounds.run, rounds.save, **facts)


class Rounds:
    """A federation that goes on from round to round."""

    def __init__(self, config: RunConfig, runtime: Runtime):
        self.simulation = build_simulation(config, runtime)
        self.state, self.watch = self.simulation.initial_state(), Watch(StopRequest())

    def run(self, number: int) -> int:
        """Runs so many rounds and returns the samples of all ranks' clients; rank 0 answers for all."""
        samples = 0
        for _ in range(number):
            result = run_round(self.state, self.simulation, self.watch)
            if result is None:  # dropped: only on a fake GPU, whose flags are noise
                continue
            self.state, samples = result.state, samples + result.record.samples
        return samples if self.simulation.runtime.is_main else 0

    def save(self, path: str) -> None:
        """Writes the global tensors."""
        if self.simulation.runtime.is_main:
            tensors = self.simulation.setup.model.layout.split(self.state.vector)
            save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, path)


def contestant(workload: Workload, ranks: int, threads: int, **runtime: Any) -> Contestant:
    """The package on one workload; further keys are those of the config's section `runtime`."""
    return Contestant("ours.py", workload.tree(threads=threads, **known(runtime)), threads, ranks)


def known(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that this version's config has; a benchmark may ask for a lever that is not there yet."""
    return {key: value for key, value in runtime.items() if key in RuntimeConfig.model_fields}


def federation_file(workload: Workload, path: str) -> None:
    """Writes images, labels, the clients' samples, the backbone and the starting point into one file."""
    config = parse_config(workload.tree(), "benchmark")
    with process.start(config.runtime) as runtime:
        setup = Setup(config, runtime)
    plain = build_backbone(
        config.backbone, setup.dataset.num_classes, config.data.image_size, derive_seed(config.seed, "backbone")
    )
    train = setup.dataset.train
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (plain.mean, plain.std))
    indices = torch.stack([setup.partition.indices(client) for client in range(workload.clients)])
    trained = setup.model.layout.split(setup.initial_vector)
    tensors = {
        "images": (train.images.float() / 255 - mean) / std,
        "labels": train.labels,
        "clients": indices,
        **{f"backbone.{name}": tensor for name, tensor in plain.model.state_dict().items()},
        **{f"trained.{name}": tensor for name, tensor in trained.items()},
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main()
