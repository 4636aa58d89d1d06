"""Clients trained side by side in lanes end where plain PyTorch, training them one by one, ends."""

from __future__ import annotations

import pytest
import torch

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    assert_ragged,
    assert_same_delta,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_tasks,
    make_trainer,
    passes_of,
    plain_batches,
    start_vector,
    train_lanes,
)
from .plain import PlainResult, make_plain, train_plain

LANES, BATCH = 3, 4
SIZES, STEPS = (9, 3, 6, 1, 11), (5, 2, 5, 5, 3)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def compare(method, optimizer, dtype, lr_factor=1.0, **client) -> list[PlainResult]:
    """Trains five clients on three lanes and one by one, and compares deltas and losses."""
    model, images, tasks = make_model(*VIT), make_images(), make_tasks(SIZES, STEPS)
    assert_ragged(passes_of(tasks, LANES, BATCH))
    lane_model = make_lane_model(model, method, dtype=dtype)
    vector = start_vector(lane_model, dtype)
    trainer = make_trainer(lane_model, images, client_config(optimizer, BATCH, **client), LANES, dtype)
    updates = train_lanes(trainer, tasks, vector, lr_factor)

    plain = make_plain(model, method, ("head",))
    plain.model.to(dtype)
    start = lane_model.layout.split(vector)
    settings = {**optimizer, "lr": optimizer["lr"] * lr_factor}
    results = []
    for task in tasks:
        result = train_plain(plain, start, plain_batches(images, task, BATCH, dtype), settings, **client)
        update = updates[task.client]
        assert update.weight == len(task.samples)
        assert update.loss.item() == pytest.approx(result.loss, rel=1e-5)
        assert_same_delta(lane_model.layout.split(update.delta), result.delta, TOLERANCE[dtype])
        results.append(result)
    return results


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_lanes_end_where_plain_training_ends_in_float64(method, optimizer):
    compare(METHODS[method], OPTIMIZERS[optimizer], torch.float64)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_lanes_end_where_plain_training_ends_in_float32(method, optimizer):
    """AdamW's eps is raised further: rounding errors are larger here."""
    settings = OPTIMIZERS[optimizer]
    compare(METHODS[method], {**settings, "eps": 0.1} if "eps" in settings else settings, torch.float32)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["full", "adapter-shared"])
def test_proximal_term_is_a_term_of_the_loss(method, optimizer):
    compare(METHODS[method], OPTIMIZERS[optimizer], torch.float64, proximal=3.0)


@pytest.mark.parametrize("proximal", [0.0, 3.0])
@pytest.mark.parametrize("method", ["full", "lora-all"])
def test_each_client_is_clipped_on_its_own(method, proximal):
    """The bound lies between the norms met, so that some steps are clipped and some are not."""
    bound = 4.0
    results = compare(METHODS[method], OPTIMIZERS["sgd"], torch.float64, clip_norm=bound, proximal=proximal)
    norms = [norm for result in results for norm in result.norms]
    assert min(norms) < bound < max(norms)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rate_factor_scales_the_rate(optimizer):
    """AdamW's decay follows the rate, as it does in torch."""
    compare(METHODS["norm"], OPTIMIZERS[optimizer], torch.float64, lr_factor=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "lr": 0.05, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
        {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1},
        {"name": "adamw", "lr": 0.01, "beta1": 0.0, "beta2": 0.9, "eps": 1e-4, "weight_decay": 0.0},
    ],
    ids=["sgd-bare", "sgd-heavy-ball", "adamw-bare"],
)
def test_other_optimizer_settings(settings):
    compare(METHODS["lora-qkv"], settings, torch.float64)


@pytest.mark.parametrize("method", ["full", "bias"])
def test_padding_of_short_batches_is_inert(method):
    """Sample 0 fills the gaps of the mask; nobody holds it, so its picture must not matter, to the bit."""
    tasks, deltas = make_tasks(SIZES, STEPS), []
    for value in (0, 255):
        images = make_images()
        images.images[0] = value
        lane_model = make_lane_model(make_model(*VIT), METHODS[method])
        vector = start_vector(lane_model)
        trainer = make_trainer(lane_model, images, client_config(OPTIMIZERS["sgd"], BATCH), LANES)
        deltas.append({client: u.delta for client, u in train_lanes(trainer, tasks, vector).items()})
    assert all(torch.equal(deltas[0][client], deltas[1][client]) for client in deltas[0])
