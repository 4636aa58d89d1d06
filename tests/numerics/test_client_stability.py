"""Runs whose clients are lost, late or cut short, against a plain loop that lives through each round second by second.

Shapes: N clients, M cohort.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fedpeft_dist.backbones.timm_backbone import build_backbone
from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import ParticipationConfig
from fedpeft_dist.federation.run import run
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.lanes.random import derive_seed
from tests.participation_fixtures import DEVICES, DROPOUT, write_trace

from .cases import METHODS, OPTIMIZERS, assert_same_delta, client_batches, make_runtime
from .plain import make_plain, train_plain
from .test_federated_rounds import BATCH, CLIENTS, COHORT, make_config, plain_cohort, plain_images

UPLINK, DOWNLINK = 4000.0, 8000.0
SPEEDS = [1.0, 9.0, 5.0, 30.0, 12.0, 40.0, 1.0, 20.0, 1.5]
DEADLINE = 3.0
LOSSES = [(1, client, "after") for client in (0, 3)] + [(2, client, "before") for client in range(CLIENTS)]


def plain_round(batches: list[int], speed: float, num_bytes: int, late: str) -> tuple[int, float] | None:
    """How many of its local steps a client takes before it must send, and when it has sent; None: it is late.

    Args:
        batches: the size of each.
    """
    clock = num_bytes / DOWNLINK
    steps = 0
    for size in batches:
        if clock + size / speed + num_bytes / UPLINK > DEADLINE + 1e-9:
            if late == "drop" or not steps:
                return None
            break
        clock += size / speed
        steps += 1
    return steps, clock + num_bytes / UPLINK


def plain_fedavg(config, plain, vector, clients, images, labels, late):
    """The final parameters, and each round's clients with their steps."""
    num_bytes = 4 * sum(value.numel() for value in vector.values())
    rounds = []
    for number in range(config.federation.rounds):
        total, weight, steps_of = {name: torch.zeros_like(value) for name, value in vector.items()}, 0, {}
        for client in plain_cohort(config, number):
            task = clients[client]
            batches = list(client_batches(task, BATCH, number, config.seed))
            found = plain_round([len(batch) for batch in batches], SPEEDS[client], num_bytes, late)
            if found is None or any((number + 1, client) == loss[:2] for loss in LOSSES):
                continue
            steps_of[client] = found[0]
            pairs = [(images[batch], labels[batch]) for batch in batches[: found[0]]]
            result = train_plain(plain, vector, pairs, OPTIMIZERS["sgd"])
            for name, delta in result.delta.items():
                total[name] += len(task.samples) * delta
            weight += len(task.samples)
        rounds.append(steps_of)
        if weight:
            vector = {name: value + total[name] / weight for name, value in vector.items()}
    return vector, rounds


@pytest.mark.parametrize("late", ["drop", "partial"])
def test_a_run_with_losses_and_stragglers_is_federated_averaging_of_what_arrives(late, tmp_path):
    devices = write_trace(tmp_path / "devices.csv", DEVICES, [(n, s, UPLINK, DOWNLINK) for n, s in enumerate(SPEEDS)])
    settings = {
        "devices": {"name": "trace", "path": devices},
        "dropout": {"name": "trace", "path": write_trace(tmp_path / "losses.csv", DROPOUT, LOSSES)},
        "deadline": DEADLINE,
        "late": late,
    }
    config = make_config("bias", tmp_path)
    config = with_values(config, "federation", participation=ParticipationConfig.model_validate(settings))
    runtime = make_runtime()
    assert run(config, runtime=runtime) == "complete"
    final = load_file(tmp_path / "bias" / "trainable.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "bias" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "bias" / "summary.json").read_text())

    setup = Setup(config, runtime)
    clients = setup.tasks(range(CLIENTS))
    backbone = build_backbone(config.backbone, 10, 16, derive_seed(config.seed, "backbone"))
    plain = make_plain(backbone.model, METHODS["bias"], ("head",))
    start = setup.model.layout.split(setup.initial_vector)
    train = setup.dataset.train
    images = plain_images(train, backbone.mean, backbone.std)
    expected, rounds = plain_fedavg(config, plain, start, clients, images, train.labels, late)

    moved = [{name: values[name] - start[name] for name in start} for values in (final, expected)]
    assert_same_delta(moved[0], moved[1], 1e-5)
    whole = {task.client: task.num_steps for task in clients}
    partial = [sum(steps < whole[client] for client, steps in found.items()) for found in rounds]
    assert [row["cohort"] for row in rows] == [len(found) for found in rounds]
    assert [row["partial"] for row in rows] == partial
    assert rows[1]["cohort"] == 0, "a round that loses everyone is skipped"
    assert (rows[1]["dropped"], rows[1]["simulated_seconds"], rows[1]["samples"]) == (COHORT, DEADLINE, 0)
    assert any(partial) == (late == "partial")
    assert any(row["late"] for row in rows), "somebody should be late"
    for row in rows:
        assert row["selected"] == COHORT == row["cohort"] + row["dropped"] + row["late"]
        assert row["uplink_bytes"] == 4 * len(setup.initial_vector) * row["cohort"]
        assert row["downlink_bytes"] == 4 * len(setup.initial_vector) * COHORT
    for name in ("uplink_bytes", "downlink_bytes"):
        assert summary[f"{name}_total"] == sum(row[name] for row in rows)
    for name, value in summary["participation"].items():
        assert value == sum(row[name] for row in rows)
    assert summary["simulated_hours"] == pytest.approx(sum(row["simulated_seconds"] for row in rows) / 3600)
