"""The lanes on a GPU: near the CPU's results in float32, and exact between lanes and between runs in bfloat16.

A kernel that splits its sums by a row's place shows in large products alone. So lanes are also compared at ViT-B's
widths (768, 2304, 3072) and number of tokens (197).

Shapes: L lanes, B batch.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime import process
from fedpeft_dist.training.lane_check import verify_lanes
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
    make_runtime,
    make_store,
    make_tasks,
    make_trainer,
    passes_of,
    start_vector,
    with_dropout,
)

DEVICE = torch.device("cuda", 0)
SIZES, STEPS = (9, 3, 6, 1, 11, 7), (3, 1, 3, 2, 3, 4)
PIXELS, BATCH = 224, 4

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


@cache
def two_blocks_of_vit_b() -> nn.Module:
    return make_model("vit_base_patch16_224", {"depth": 2})


def make_wide(method: str) -> LaneModel:
    return make_lane_model(two_blocks_of_vit_b(), with_dropout(METHODS[method], 0.1), PIXELS)


@pytest.mark.parametrize("lanes", [3, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_at_vit_b_a_gradient_depends_on_no_place_and_no_neighbour(method, precision, lanes):
    model, runtime = make_wide(method), make_runtime(precision, DEVICE)
    freeze(model.backbone.model, runtime.compute_dtype, DEVICE)
    verify_lanes(lanes, BATCH, model, make_store(make_images(40, PIXELS), DEVICE), runtime)


@pytest.mark.parametrize("lanes", [3, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_at_vit_b_a_client_has_the_same_delta_in_another_lane_beside_other_clients(method, precision, lanes):
    """The client comes first, then last, and shares no neighbour; its batches are ragged."""
    model = make_wide(method)
    vector = start_vector(model).to(DEVICE)
    client = client_config(OPTIMIZERS["sgd"], BATCH)
    trainer = make_trainer(model, make_images(120, PIXELS), client, lanes, precision=precision, device=DEVICE)
    own, *others = make_tasks([6] + [5] * (2 * lanes - 2), [2] * (2 * lanes - 1))
    left, right = others[: lanes - 1], others[lanes - 1 :]
    deltas = []
    for tasks in ([own, *left], [*right, own]):
        updates = {update.client: update.delta for update in trainer.train(tasks, RoundStart(0, vector))}
        deltas.append(updates[own.client])
    assert deltas[0].abs().max() > 0
    assert torch.equal(*deltas)


def test_fp32_is_no_tf32():
    """Ten bits of a mantissa would show at once, in a product and in a convolution."""
    x = torch.rand(64, 768, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close((x @ x.T).double(), x.double() @ x.double().T, rtol=1e-5, atol=0)
    images, kernel = x[:, :256].view(64, 1, 16, 16), x[:, -16:].view(64, 1, 4, 4)
    found, exact = (torch.nn.functional.conv2d(i, k) for i, k in ((images, kernel), (images.double(), kernel.double())))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
