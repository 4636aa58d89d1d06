"""The lanes on a GPU: near the CPU's results in float32, and exact between lanes and between runs in bfloat16.

Shapes: L lanes, B batch.
"""

from __future__ import annotations

import pytest
import torch

from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.runtime import process
from fedpeft_dist.training.trainer import RoundStart

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    assert_ragged,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_tasks,
    make_trainer,
    passes_of,
    start_vector,
)

DEVICE = torch.device("cuda", 0)
SIZES, STEPS = (9, 3, 6, 1, 11, 7), (3, 1, 3, 2, 3, 4)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module", autouse=True)
def deterministic_device():
    with process.start(RuntimeConfig(device="cuda")):
        yield


def deltas_on(device: torch.device, method: str, precision: str) -> dict[int, torch.Tensor]:
    """Six ragged clients on three lanes."""
    lane_model = make_lane_model(make_model(*VIT), METHODS[method])
    vector = start_vector(lane_model).to(device)
    client = client_config(OPTIMIZERS["sgd"], 4)
    trainer = make_trainer(lane_model, make_images(), client, 3, precision=precision, device=device)
    tasks = make_tasks(SIZES, STEPS)
    assert_ragged(passes_of(tasks, 3, 4))
    return {update.client: update.delta.cpu() for update in trainer.train(tasks, RoundStart(0, vector))}


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_the_cpu(method):
    expected = deltas_on(torch.device("cpu"), method, "fp32")
    actual = deltas_on(DEVICE, method, "fp32")
    for client, delta in expected.items():
        assert delta.abs().max() > 1e-4
        assert (actual[client] - delta).abs().max() < 1e-3 * delta.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_is_equal(method, precision):
    first, second = (deltas_on(DEVICE, method, precision) for _ in range(2))
    for client, delta in first.items():
        assert torch.isfinite(delta).all()
        assert torch.equal(delta, second[client])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_client_in_every_lane_gives_equal_rows(method, precision):
    lane_model = make_lane_model(make_model(*VIT), METHODS[method])
    vector = start_vector(lane_model).to(DEVICE)
    client = client_config(OPTIMIZERS["sgd"], 4)
    trainer = make_trainer(lane_model, make_images(), client, 3, precision=precision, device=DEVICE)
    task = make_tasks([9], [3])[0]
    first, *others = list(trainer.train([task] * 3, RoundStart(0, vector)))
    assert first.delta.abs().max() > 1e-4
    for other in others:
        assert torch.equal(other.delta, first.delta)
