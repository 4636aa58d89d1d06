"""Products by oneDNN are those of float64, also their gradients, and a row does not depend on its place.

Shapes: L lanes, R rows, D inputs, E outputs.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes import onednn
from fedpeft_dist.lanes.attention import use_plain_attention
from fedpeft_dist.lanes.onednn import FrozenLinear, TrainedLinear, choose_products, lane_product, use_onednn

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    assert_same_delta,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_runtime,
    make_tasks,
    make_trainer,
    start_vector,
    train_lanes,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")

SHAPES = [(5, 7, 3), (64, 128, 96), (272, 128, 384), (130, 512, 64)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", [FrozenLinear, TrainedLinear])
def test_a_linear_layer_is_that_of_float64(kind, has_bias: bool, rows: int, inputs: int, outputs: int) -> None:
    linear, x, grad = nn.Linear(inputs, outputs, bias=has_bias), random(2, rows, inputs), random(2, rows, outputs)
    wide, own = nn.Linear(inputs, outputs, bias=has_bias).double(), kind(linear)
    wide.load_state_dict(linear.state_dict())
    results = []
    for layer, images in ((own, x.clone().requires_grad_()), (wide, x.double().requires_grad_())):
        y = layer(images)
        y.backward(grad.to(y.dtype))
        gradients = [p.grad for p in layer.parameters()] if kind is TrainedLinear else []
        results.append([y.detach(), images.grad, *gradients])
    if kind is FrozenLinear:
        assert all(p.grad is None for p in own.parameters())
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("has_bias", [True, False])
def test_lanes_products_are_those_of_float64(has_bias: bool) -> None:
    x, weight, bias = random(6, 70, 64), random(3, 96, 64), random(3, 96) if has_bias else None
    given = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    lane_product(*given).square().sum().backward()
    wide = [t if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    lanes = zip(wide[0].view(3, 2, 70, 64), wide[1], [None] * 3 if bias is None else wide[2])
    torch.cat([functional.linear(*lane) for lane in lanes]).square().sum().backward()
    for found, expected in zip(given, wide):
        if found is not None:
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_row_does_not_depend_on_its_place(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    layer = FrozenLinear(nn.Linear(inputs, outputs).to(dtype).requires_grad_(False))
    x, order = random(rows, inputs).to(dtype), torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    results = []
    for images in (x.clone().requires_grad_(), x[order].clone().requires_grad_()):
        y = layer(images)
        y.sum().backward()
        results.append((y.detach(), images.grad))
    for straight, mixed in zip(*results):
        assert torch.equal(straight[order], mixed)


@pytest.mark.parametrize("method", ["full", "bias", "lora-all"])
def test_training_by_onednn_is_training_by_pytorch(method: str) -> None:
    images, tasks, client = make_images(), make_tasks((9, 7, 8), (3, 2, 3)), client_config(OPTIMIZERS["sgd"], 4)
    deltas = []
    for is_fast in (True, False):
        lane_model = make_lane_model(make_model(*VIT), METHODS[method])
        model = lane_model.backbone.model
        if is_fast:
            use_plain_attention(model, torch.float32)
            use_onednn(model, is_trained=method == "full")
            lane_model.lane_by_lane = True
            kinds = {type(module) for module in model.modules()}
            assert (TrainedLinear if method == "full" else FrozenLinear) in kinds
            assert nn.Linear not in kinds
        updates = train_lanes(make_trainer(lane_model, images, client, 2), tasks, start_vector(lane_model, noise=0.02))
        deltas.append({c: lane_model.layout.split(update.delta) for c, update in updates.items()})
    for client_id, expected in deltas[1].items():
        assert_same_delta(deltas[0][client_id], expected, 1e-4)


def test_the_choice_follows_processor_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = make_runtime(), dataclasses.replace(make_runtime(), device=torch.device("cuda"))
    for is_amd in (True, False):
        monkeypatch.setattr(onednn, "_is_amd", lambda is_amd=is_amd: is_amd)
        assert choose_products("auto", cpu) == ("onednn" if is_amd else "torch")
        assert choose_products("auto", dataclasses.replace(cpu, precision="bf16")) == "torch"
        assert choose_products("auto", cuda) == "torch"
        assert [choose_products(given, cpu) for given in ("torch", "onednn")] == ["torch", "onednn"]
    for runtime, reason in ((cuda, "on cuda"), (dataclasses.replace(cpu, precision="bf16"), "in bf16")):
        with pytest.raises(ConfigError, match=rf"runtime\.products: 'onednn' is for fp32 on the CPU, .* {reason}"):
            choose_products("onednn", runtime)
