"""Every algorithm against its paper's pseudocode, written as a plain loop in float64.

Shapes: N clients, M cohort, P trainable parameters.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fedpeft_dist.checkpoint import load_newest_checkpoint
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.ahead import compute_cost
from fedpeft_dist.federation.run import run
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory
from fedpeft_dist.training.batches import EpochBatches
from tests.tiny import tiny_tree

from .cases import make_runtime
from .plain import Plain, make_plain

ROUNDS, CLIENTS, COHORT, BATCH = 4, 9, 5, 6
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0, "nesterov": False, "weight_decay": 0.01}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedprox": {"name": "fedprox", "mu": 0.7},
    "scaffold": {"name": "scaffold"},
    "trimmed_mean": {"name": "trimmed_mean", "trim": 0.2},
    "median": {"name": "median"},
}
Vector = dict[str, torch.Tensor]
Term = Callable[[str, torch.Tensor], torch.Tensor]


def make_config(output: Path, algorithm: Mapping[str, Any], **sections: Any) -> RunConfig:
    tree = tiny_tree(
        method={"name": "bias"},
        data={
            "name": "synthetic",
            "image_size": 16,
            "num_train": 120,
            "num_test": 50,
            "classes": 5,
            "clients": CLIENTS,
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 3},
        },
        federation={"rounds": ROUNDS, "cohort": COHORT},
        client={"epochs": 2, "batch_size": BATCH, "optimizer": SGD, "schedule": {"name": "exponential", "gamma": 0.8}},
        runtime={"device": "cpu", "precision": "fp32", "lanes": 3},
        output={"root": str(output), "name": algorithm["name"]},
    )
    return parse_config({**tree, "algorithm": dict(algorithm), **sections}, "test")


@dataclass
class PlainFederation:
    """A federation in ordinary PyTorch, one client after another, in float64."""

    config: RunConfig
    setup: Setup = field(init=False)
    plain: Plain = field(init=False)

    def __post_init__(self) -> None:
        self.setup = Setup(self.config, make_runtime())
        model = self.setup.model.backbone.plain.double()
        self.plain = make_plain(model, {"name": "bias"}, ("head",))
        backbone, train = self.setup.model.backbone, self.setup.dataset.train
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (backbone.mean, backbone.std))
        self.images, self.labels = (train.images.double() / 255 - mean) / std, train.labels

    def start(self) -> Vector:
        return {k: v.double() for k, v in self.setup.model.layout.split(self.setup.initial_vector).items()}

    def cohort(self, number: int) -> list[int]:
        return random.Random(derive_seed(self.config.seed, "cohort", number)).sample(range(CLIENTS), COHORT)

    def rate(self, number: int) -> float:
        return SGD["lr"] * 0.8**number

    def size(self, client: int) -> int:
        return self.setup.partition.size(client)

    def num_steps(self, client: int) -> int:
        return 2 * math.ceil(self.size(client) / BATCH)

    def train(self, start: Vector, client: int, number: int, term: Term) -> Vector:
        """SGD from `start` on gradients plus term(name, parameter); returns the delta."""
        self.plain.load(start)
        for batch in self._batches(client, number):
            loss = F.cross_entropy(self.plain.model(self.images[batch]), self.labels[batch])
            gradients = torch.autograd.grad(loss, list(self.plain.trainable.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(self.plain.trainable.items(), gradients):
                    decay = SGD["weight_decay"] * parameter
                    parameter -= self.rate(number) * (gradient + term(name, parameter) + decay)
        return {name: value - start[name] for name, value in self.plain.values().items()}

    def _batches(self, client: int, number: int) -> Iterator[torch.Tensor]:
        batches = EpochBatches(BATCH, self.config.seed).of(self.setup.partition.indices(client), client, number)
        return islice(batches, self.num_steps(client))


def plain_fedprox(federation: PlainFederation, mu: float) -> Vector:
    vector = federation.start()
    for number in range(ROUNDS):
        cohort = federation.cohort(number)
        deltas = [federation.train(vector, i, number, lambda name, p, x=vector: mu * (p - x[name])) for i in cohort]
        total = sum(federation.size(i) for i in cohort)
        shares = [federation.size(i) / total for i in cohort]
        vector = {k: v + sum(share * delta[k] for share, delta in zip(shares, deltas)) for k, v in vector.items()}
    return vector


def plain_scaffold(federation: PlainFederation) -> Vector:
    """Algorithm 1 of the paper, option II."""
    x = federation.start()
    c = {k: torch.zeros_like(v) for k, v in x.items()}
    c_i = [dict(c) for _ in range(CLIENTS)]
    for number in range(ROUNDS):
        cohort, deltas, changes = federation.cohort(number), [], []
        for i in cohort:
            delta = federation.train(x, i, number, lambda name, _, c=c, own=c_i[i]: c[name] - own[name])
            steps = federation.num_steps(i) * federation.rate(number)
            after = {k: c_i[i][k] - c[k] - delta[k] / steps for k in x}
            deltas.append(delta)
            changes.append({k: after[k] - c_i[i][k] for k in x})
            c_i[i] = after
        x = {k: v + sum(delta[k] for delta in deltas) / COHORT for k, v in x.items()}
        c = {k: v + sum(change[k] for change in changes) / CLIENTS for k, v in c.items()}
    return x


def plain_robust(federation: PlainFederation, combine: Callable[[np.ndarray], np.ndarray]) -> Vector:
    vector = federation.start()
    for number in range(ROUNDS):
        deltas = [federation.train(vector, i, number, lambda name, p: 0 * p) for i in federation.cohort(number)]
        vector = {
            k: v + torch.from_numpy(combine(np.stack([delta[k].numpy() for delta in deltas])))
            for k, v in vector.items()
        }
    return vector


def trimmed(deltas: np.ndarray) -> np.ndarray:
    """One of five is left out at each end."""
    return np.sort(deltas, axis=0)[1:-1].mean(axis=0)


PLAIN: dict[str, Callable[[PlainFederation], Vector]] = {
    "fedavg": lambda federation: plain_fedprox(federation, 0.0),
    "fedprox": lambda federation: plain_fedprox(federation, 0.7),
    "scaffold": plain_scaffold,
    "trimmed_mean": lambda federation: plain_robust(federation, trimmed),
    "median": lambda federation: plain_robust(federation, lambda deltas: np.median(deltas, axis=0)),
}


def summary_of(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.output.root) / config.output.name / "summary.json").read_text())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_run_equals_a_plain_loop(name: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, ALGORITHMS[name])
    assert run(config, runtime=make_runtime()) == COMPLETE
    final = load_file(tmp_path / name / "trainable.safetensors")
    federation = PlainFederation(config)
    start, expected = federation.start(), PLAIN[name](federation)
    moved = [{k: values[k].double() - start[k] for k in start} for values in (final, expected)]
    scale = max(tensor.abs().max().item() for tensor in moved[1].values())
    assert scale > 0.01
    for key in start:
        torch.testing.assert_close(moved[0][key], moved[1][key], rtol=0, atol=2e-6 * scale)


def test_algorithms_differ_from_each_other(tmp_path: Path) -> None:
    digests = set()
    for algorithm in ALGORITHMS.values():
        config = make_config(tmp_path, algorithm)
        run(config, runtime=make_runtime())
        digests.add(summary_of(config)["weights_sha256"])
    assert len(digests) == len(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resumed_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = make_config(tmp_path, ALGORITHMS[name])
    run(whole, runtime=make_runtime())
    resumed = with_values(whole, "output", name="resumed")
    for rounds in (1, 3, ROUNDS):
        assert run(with_values(resumed, "federation", rounds=rounds), runtime=make_runtime()) == COMPLETE
    assert summary_of(resumed)["weights_sha256"] == summary_of(whole)["weights_sha256"]


def test_client_proximal_is_fedprox_by_another_name(tmp_path: Path) -> None:
    fedprox = make_config(tmp_path, ALGORITHMS["fedprox"])
    client = {**fedprox.client.model_dump(mode="json"), "proximal": 0.7}
    by_another_name = make_config(tmp_path, ALGORITHMS["fedavg"], client=client)
    for config in (fedprox, by_another_name):
        run(config, runtime=make_runtime())
    assert summary_of(fedprox)["weights_sha256"] == summary_of(by_another_name)["weights_sha256"]


def test_scaffold_counts_both_vectors(tmp_path: Path) -> None:
    scaffold, fedavg = (make_config(tmp_path, ALGORITHMS[name]) for name in ("scaffold", "fedavg"))
    for config in (scaffold, fedavg):
        run(config, runtime=make_runtime())
    for key in ("uplink_bytes_total", "downlink_bytes_total"):
        assert summary_of(scaffold)[key] == 2 * summary_of(fedavg)[key]
    costs = [compute_cost(config) for config in (scaffold, fedavg)]
    assert costs[0].uplink_bytes_total == 2 * costs[1].uplink_bytes_total == summary_of(scaffold)["uplink_bytes_total"]


def test_scaffold_keeps_a_row_for_each_client_that_took_part(tmp_path: Path) -> None:
    config = make_config(tmp_path, ALGORITHMS["scaffold"])
    run(config, runtime=make_runtime())
    checkpoint, _ = load_newest_checkpoint(RunDirectory(tmp_path / "scaffold").checkpoints)
    federation = PlainFederation(config)
    took_part = {client for number in range(ROUNDS) for client in federation.cohort(number)}
    assert set(checkpoint.state.clients) == took_part
    assert len({row.numpy().tobytes() for row in checkpoint.state.clients.values()}) == len(took_part)
    # c is the mean of all clients' control variates, those that are still zero included.
    mean = torch.stack(list(checkpoint.state.clients.values())).double().sum(dim=0) / CLIENTS
    torch.testing.assert_close(checkpoint.state.algorithm["control"].double(), mean, rtol=0, atol=1e-6)


REFUSED = {
    "privacy": ("scaffold", {"privacy": {"name": "sample", "noise_multiplier": 1.0}}, "privacy.name: sample"),
    "momentum": ("scaffold", {"client": {"optimizer": {"name": "sgd"}}}, "client.optimizer: sgd"),
    "adamw": ("scaffold", {"client": {"optimizer": {"name": "adamw"}}}, "client.optimizer: adamw"),
    "fp16": ("scaffold", {"runtime": {"precision": "fp16"}}, "runtime.precision: fp16"),
    "proximal": ("median", {"client": {"proximal": 0.1}}, "client.proximal: 0.1"),
    "twice": ("fedprox", {"client": {"proximal": 0.1}}, "client.proximal: 0.1"),
    "sum": (
        "trimmed_mean",
        {
            "privacy": {"name": "user", "noise_multiplier": 1.0},
            "federation": {"cohort": COHORT, "participation": {"name": "poisson"}},
        },
        "privacy.name: user",
    ),
    "nobody": ("trimmed_mean", {"federation": {"cohort": 4}}, "algorithm.trim: 0.2 of a cohort of 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combination_that_an_algorithm_cannot_carry_is_refused(case: str, tmp_path: Path) -> None:
    name, sections, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told) as error:
        make_config(tmp_path, ALGORITHMS[name], **sections)
    assert "give" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["trimmed_mean", "median"])
def test_robust_mean_ignores_a_client_whose_delta_is_not_finite(name: str, tmp_path: Path) -> None:
    """A client that diverges is rejected, as under FedAvg, and the others are combined."""
    optimizer = {**SGD, "lr": 1.0e30}
    config = make_config(tmp_path, ALGORITHMS[name], client={"epochs": 1, "batch_size": BATCH, "optimizer": optimizer})
    assert run(config, runtime=make_runtime()) == COMPLETE
    assert summary_of(config)["rejected_total"] == ROUNDS * COHORT
