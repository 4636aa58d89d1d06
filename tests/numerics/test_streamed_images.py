"""Training and evaluation are the same to the bit, whether images are resident or streamed from the host."""

from __future__ import annotations

import pytest
import torch

from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.federation.evaluation import Evaluator
from fedpeft_dist.runtime import process

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_runtime,
    make_store,
    make_tasks,
    make_trainer,
    start_vector,
    train_lanes,
)

CUDA = pytest.param(
    "cuda:0",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest):
    device = torch.device(request.param)
    if device.type == "cpu":
        yield device
        return
    with process.start(RuntimeConfig(device="cuda")):
        yield device


def test_streamed_images_train_the_same_deltas(device: torch.device) -> None:
    images = make_images()
    deltas = []
    for resident in (True, False):
        lane_model = make_lane_model(make_model(*VIT), METHODS["bias"])
        vector = start_vector(lane_model).to(device)
        trainer = make_trainer(lane_model, images, client_config(OPTIMIZERS["sgd"], 4), 3, device=device)
        trainer.store = make_store(images, device, resident)
        updates = train_lanes(trainer, make_tasks((9, 3, 6, 1, 11, 7), (3, 1, 3, 2, 3, 4)), vector)
        deltas.append([updates[client].delta for client in range(6)])
    for resident_delta, streamed_delta in zip(*deltas):
        assert resident_delta.abs().max() > 1e-4
        assert torch.equal(resident_delta, streamed_delta)


def test_streamed_images_evaluate_the_same(device: torch.device) -> None:
    images = make_images()
    lane_model = make_lane_model(make_model(*VIT), METHODS["head"])
    vector = start_vector(lane_model).to(device)
    lane_model.backbone.model.to(device)
    samples = torch.arange(1, 40)
    correct = [
        Evaluator(lane_model, make_store(images, device, resident), samples, 7, make_runtime(device=device)).correct(
            vector
        )
        for resident in (True, False)
    ]
    assert 0 < correct[0].sum() < len(samples)
    assert torch.equal(*correct)
