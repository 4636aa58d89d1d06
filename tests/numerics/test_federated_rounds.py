"""Whole runs against federated averaging as a plain loop, and averaging against centralised training.

Shapes: N clients, M cohort, S samples.
"""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fedpeft_dist.algorithms.state import State
from fedpeft_dist.backbones.timm_backbone import build_backbone
from fedpeft_dist.config.load import parse_config, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation import simulation as simulation_module
from fedpeft_dist.federation.aggregation import Aggregation, WeightedMean, fraction_bits
from fedpeft_dist.federation.run import run
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.training.trainer import RoundStart
from tests.tiny import tiny_vit

from .cases import (
    MEAN,
    METHODS,
    OPTIMIZERS,
    STD,
    VIT,
    assert_same_delta,
    client_batches,
    client_config,
    make_algorithm,
    make_images,
    make_lane_model,
    make_model,
    make_runtime,
    make_tasks,
    make_trainer,
    start_vector,
    train_lanes,
)
from .plain import make_plain, train_plain

ROUNDS, CLIENTS, COHORT, BATCH, EPOCHS = 3, 9, 5, 6, 2
ADAMW = {**OPTIMIZERS["adamw"], "eps": 0.1}

RUNS = {
    "bias": {"client": {"optimizer": OPTIMIZERS["sgd"]}},
    "full": {"client": {"optimizer": OPTIMIZERS["sgd"], "proximal": 1.0, "clip_norm": 1.0}},
    "lora-all": {
        "client": {"optimizer": ADAMW, "schedule": {"name": "exponential", "gamma": 0.5}},
        "server": {"optimizer": {"name": "sgd", "lr": 0.7, "momentum": 0.9}},
    },
    "prompt-deep": {"client": {"optimizer": OPTIMIZERS["sgd"]}},
    "adapter-shared": {"client": {"optimizer": ADAMW}},
}


def make_config(method: str, output, batch: int = BATCH, **data) -> RunConfig:
    own = RUNS[method]
    return parse_config(
        {
            "seed": 7,
            "backbone": tiny_vit(depth=2),
            "method": METHODS[method],
            "data": {
                "name": "digits",
                "image_size": 16,
                "interpolation": "bilinear",
                "max_train": 120,
                "clients": CLIENTS,
                "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 3},
                **data,
            },
            "federation": {"rounds": ROUNDS, "cohort": COHORT},
            "client": {"epochs": EPOCHS, "batch_size": batch, **own["client"]},
            "server": own.get("server", {}),
            "runtime": {"device": "cpu", "precision": "fp32", "lanes": 3},
            "output": {"root": str(output), "name": method},
        },
        "test",
    )


def plain_images(images, mean, std) -> torch.Tensor:
    """Grey images, enlarged, scaled and repeated over the channels."""
    own = images.images if images.rows is None else images.images[images.rows]
    x = F.interpolate(own.float() / 255, (16, 16), mode="bilinear", antialias=True)
    return (x.expand(-1, 3, -1, -1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def plain_cohort(config, number: int) -> list[int]:
    generator = random.Random(derive_seed(config.seed, "cohort", number))
    return generator.sample(range(CLIENTS), COHORT)


def plain_fedavg(config, plain, vector, clients, images, labels) -> tuple[dict, list[float]]:
    """FedAvg as McMahan et al. write it: the final parameters, and each round's training loss.

    Args:
        vector: the first global parameters by name.
        clients: each client's samples.
    """
    own = RUNS[config.output.name]
    settings = dict(own["client"]["optimizer"])
    extra = {key: own["client"][key] for key in ("proximal", "clip_norm") if key in own["client"]}
    server = own.get("server", {}).get("optimizer", {"lr": 1.0, "momentum": 0.0})
    velocity = {name: torch.zeros_like(value) for name, value in vector.items()}
    rounds = []
    for number in range(config.federation.rounds):
        rate = settings["lr"] * own["client"].get("schedule", {"gamma": 1.0})["gamma"] ** number
        cohort = plain_cohort(config, number)
        assert len(set(cohort)) == COHORT
        total = {name: torch.zeros_like(value) for name, value in vector.items()}
        weight, loss = 0, 0.0
        for client in cohort:
            task = clients[client]
            batches = client_batches(task, config.client.batch_size, number, config.seed)
            pairs = ((images[batch], labels[batch]) for batch in batches)
            result = train_plain(plain, vector, pairs, {**settings, "lr": rate}, **extra)
            for name, delta in result.delta.items():
                total[name] += len(task.samples) * delta
            weight += len(task.samples)
            loss += len(task.samples) * result.loss
        rounds.append(loss / weight)
        for name in vector:
            velocity[name] = server["momentum"] * velocity[name] + total[name] / weight
            vector = {**vector, name: vector[name] + server["lr"] * velocity[name]}
    return vector, rounds


@pytest.mark.parametrize(("method", "batch"), [*((method, BATCH) for method in RUNS), ("bias", 1024), ("lora-all", 50)])
def test_a_run_is_federated_averaging(method, batch, tmp_path):
    config, runtime = make_config(method, tmp_path, batch), make_runtime()
    assert run(config, runtime=runtime) == "complete"
    final = load_file(tmp_path / method / "trainable.safetensors")
    rows = [json.loads(line) for line in (tmp_path / method / "metrics.jsonl").read_text().splitlines()]

    setup = Setup(config, runtime)
    clients = setup.tasks(range(CLIENTS))
    sizes = [len(task.samples) for task in clients]
    assert sum(sizes) == 120
    assert len(set(sizes)) > 4
    assert all(task.num_steps == EPOCHS * math.ceil(size / batch) for task, size in zip(clients, sizes))
    backbone = build_backbone(config.backbone, 10, 16, derive_seed(config.seed, "backbone"))
    plain = make_plain(backbone.model, METHODS[method], ("head",))
    start = setup.model.layout.split(setup.initial_vector)
    splits = (setup.dataset.train, setup.dataset.test)
    normalised = [plain_images(part, backbone.mean, backbone.std) for part in splits]
    labels = setup.dataset.train.labels
    expected, losses = plain_fedavg(config, plain, start, clients, normalised[0], labels)

    moved = [{name: values[name] - start[name] for name in start} for values in (final, expected)]
    assert_same_delta(moved[0], moved[1], 1e-5)
    assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["rejected"] for row in rows] == [0] * ROUNDS
    plain.load(expected)
    with torch.no_grad():
        correct = (plain.model(normalised[1]).argmax(dim=1) == setup.dataset.test.labels).double().mean()
    assert rows[-1]["accuracy"] == pytest.approx(correct.item(), abs=0.003)  # a near tie may fall either way


def test_runs_differ_and_cohorts_are_partial(tmp_path):
    """Every round has another cohort, and none holds everybody: otherwise sampling would go untested."""
    config = make_config("bias", tmp_path)
    cohorts = [tuple(plain_cohort(config, number)) for number in range(ROUNDS)]
    assert len(set(cohorts)) == ROUNDS
    assert all(len(cohort) == COHORT < CLIENTS for cohort in cohorts)


@pytest.mark.parametrize("partition", [{"name": "iid"}, {"name": "quantity", "alpha": 1.0}, {"name": "dirichlet_mix"}])
@pytest.mark.parametrize("batch", [2, 13, 64, 1024])
def test_a_lane_has_no_more_slots_than_the_largest_client_has_samples(partition, batch, tmp_path, monkeypatch):
    """Whatever the batch size: the trainer's shapes and the measurement of memory for `lanes: auto` follow the bound,
    and a client's update is that of a batch of just that size, to the bit."""
    measured = []
    monkeypatch.setattr(simulation_module, "choose_lanes", lambda needed, batch, *rest: measured.append(batch) or 3)
    config = with_values(make_config("bias", tmp_path, batch, partition=partition), "runtime", lanes="auto")
    simulation = build_simulation(config, make_runtime())
    largest = int(simulation.setup.partition.sizes().max())
    assert simulation.config.runtime.lanes == 3
    assert simulation.trainer.config.batch_size == min(batch, largest)
    assert measured == [min(batch, largest)]
    tight = build_simulation(with_values(config, "client", batch_size=min(batch, largest)), make_runtime())
    updates = [
        list(found.trainer.train(found.setup.tasks(range(CLIENTS)), RoundStart(0, found.setup.initial_vector)))
        for found in (simulation, tight)
    ]
    for ours, theirs in zip(*updates, strict=True):
        assert (ours.client, ours.num_samples) == (theirs.client, theirs.num_samples)
        assert torch.equal(ours.delta, theirs.delta)


RATE = 0.3
FULL_BATCH = {"name": "sgd", "lr": RATE, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_one_full_batch_step_of_everyone_is_one_centralised_step(method):
    """The mean of gradients weighted by samples is the gradient of the pooled data."""
    sizes = (9, 3, 6, 1, 11)
    model, images, tasks = make_model(*VIT), make_images(), make_tasks(sizes, [1] * len(sizes))
    lane_model = make_lane_model(model, METHODS[method], dtype=torch.float64)
    vector = start_vector(lane_model, torch.float64)
    trainer = make_trainer(lane_model, images, client_config(FULL_BATCH, max(sizes)), 3, torch.float64)
    updates = train_lanes(trainer, tasks, vector)
    mean = sum(update.weight * update.delta for update in updates.values()) / sum(sizes)

    plain = make_plain(model, METHODS[method], ("head",))
    plain.model.double()
    start = lane_model.layout.split(vector)
    pool = torch.cat([task.samples for task in tasks])
    mean_pixel, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = ((images.images[pool] / 255 - mean_pixel) / std).double()
    step = train_plain(plain, start, [(pixels, images.labels[pool])], FULL_BATCH)
    assert_same_delta(lane_model.layout.split(mean), step.delta, 1e-9)

    # The same through the exact aggregation and the server, whose wire is float32.
    algorithm, state = make_algorithm(len(vector)), State(0, vector.float(), server={}, algorithm={})
    aggregation = Aggregation(algorithm, state, 1.0, sum(sizes), WeightedMean(fraction_bits(sum(sizes))))
    for client in (3, 1, 4, 0, 2):
        aggregation.add(updates[client])
    total = aggregation.total(aggregation.sums)
    assert (total.num_rejected, total.num_samples) == (0, sum(sizes))
    assert total.train_loss == pytest.approx(step.loss, rel=1e-6)
    after = algorithm.step(state, total.mean, len(sizes)).vector
    central = lane_model.layout.join(plain.values())
    torch.testing.assert_close(after.double(), central, rtol=0, atol=2e-7 * central.abs().max().item())
