"""Frozen weights in 8 bits: layers, training against a plain loop on the rounded weights, memory, and refusals.

Shapes: R rows, D inputs, E outputs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpeft_dist.backbones.deferred import made
from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, parse_config
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.lanes.quantized import QuantizedLinear
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.methods.quantized import quantize_frozen
from fedpeft_dist.runtime import process
from fedpeft_dist.training.lane_check import check_lanes, verify_lanes
from tests.tiny import tiny_tree, tiny_vit

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    assert_same_delta,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_tasks,
    make_trainer,
    plain_batches,
    start_vector,
    train_lanes,
)
from .plain import make_plain, train_plain

INT8 = {"sharding": {"quantize": "int8"}}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_weight_is_within_half_a_step(dtype: torch.dtype) -> None:
    linear = nn.Linear(70, 33)
    with torch.no_grad():
        linear.weight[3] = 0.0
        linear.weight[4] *= 0.02
    quantized = QuantizedLinear.of(linear, dtype)
    steps = linear.weight.detach().double().abs().amax(dim=1, keepdim=True) / 127
    exact = quantized.values.double() * quantized.scale.double().unsqueeze(1)
    assert ((exact - linear.weight.detach().double()).abs() <= 0.51 * steps + 1e-12).all()
    assert quantized.values.dtype == torch.int8
    assert quantized.weight.dtype == quantized.scale.dtype == dtype
    torch.testing.assert_close(quantized.weight, exact.to(dtype), rtol=0, atol=0)  # rounded once


@pytest.mark.parametrize("use_onednn", [False, True])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_and_its_gradients_are_those_of_float64(has_bias: bool, use_onednn: bool) -> None:
    quantized = QuantizedLinear.of(nn.Linear(64, 96, bias=has_bias), torch.float32)
    quantized.use_onednn = use_onednn and torch.backends.mkldnn.is_available()
    x, grad = random(3, 5, 64).requires_grad_(), random(3, 5, 96)
    quantized(x).backward(grad)
    wide = x.detach().double().requires_grad_()
    bias = quantized.bias.detach().double().requires_grad_() if has_bias else None
    y = functional.linear(wide, quantized.values.double() * quantized.scale.double().unsqueeze(1), bias)
    y.backward(grad.double())
    torch.testing.assert_close(quantized(x).double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    if has_bias:
        torch.testing.assert_close(quantized.bias.grad.double(), bias.grad, rtol=1e-5, atol=1e-5)


def test_a_pass_keeps_no_tensor_of_the_weights_size() -> None:
    layers = nn.Sequential(*[QuantizedLinear.of(nn.Linear(64, 64), torch.float32) for _ in range(3)])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layers(random(2, 64).requires_grad_())
    assert len(kept) == 6
    assert {id(t) for t in kept} == {id(t) for layer in layers for t in (layer.values, layer.scale)}


@pytest.mark.parametrize("method", ["bias", "lora-all", "adapter-shared", "prompt-deep", "partial"])
def test_training_is_a_plain_loop_on_the_rounded_weights(method: str) -> None:
    images, tasks, client = make_images(), make_tasks((9, 7, 8), (3, 2, 3)), client_config(OPTIMIZERS["sgd"], 4)
    model = make_model(*VIT)
    lane_model = make_lane_model(model, METHODS[method], dtype=torch.float64)
    vector = start_vector(lane_model, torch.float64)
    count = quantize_frozen(lane_model.backbone.model, lane_model.backbone.plain, torch.float64)
    rounded = copy.deepcopy(model).double()
    for name, module in lane_model.backbone.plain.named_modules():
        if isinstance(module, QuantizedLinear):
            rounded.get_submodule(name).weight.data = module.weight.detach()
            count -= module.weight.numel()
    assert count == 0
    assert any((a != b).any() for a, b in zip(rounded.parameters(), model.double().parameters()))
    updates = train_lanes(make_trainer(lane_model, images, client, 2, torch.float64), tasks, vector)
    plain, start = make_plain(rounded, METHODS[method], ("head",)), lane_model.layout.split(vector)
    plain.model.double()
    for task in tasks:
        expected = train_plain(plain, start, plain_batches(images, task, 4, torch.float64), OPTIMIZERS["sgd"])
        assert_same_delta(lane_model.layout.split(updates[task.client].delta), expected.delta, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_made_later_has_the_integers_of_one_that_is_made_at_once(dtype: torch.dtype) -> None:
    config, states = parse_config(tiny_tree(backbone=tiny_vit(depth=2), method={"name": "lora"}), "test"), []
    for deferred in (True, False):
        backbone = build_lane_model(config, 10, deferred=deferred).backbone
        quantize_frozen(backbone.model, backbone.plain, dtype)
        freeze(backbone.model, dtype, torch.device("cpu"))
        states.append(backbone.model.state_dict(keep_vars=True))
    later, whole = states
    assert {tensor.dtype for tensor in later.values() if tensor.is_meta} == {torch.int8}
    for name, tensor in later.items():
        torch.testing.assert_close(made(tensor), whole[name], rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["vit", "eva"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_holds_no_frozen_linear_weight_twice(backbone: str, precision: str) -> None:
    """Both the model on lanes and the one that evaluation merges into have 8-bit weights, which they share."""
    eva = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    section = tiny_vit(depth=2) if backbone == "vit" else tiny_vit(**eva) | {"name": "eva02_tiny_patch14_224"}
    tree = tiny_tree(
        backbone=section, method={"name": "bias"}, runtime={"precision": precision, "cache": "none", **INT8}
    )
    config = parse_config(tree, "test")
    with process.start(config.runtime) as runtime:
        setup = Setup(config, runtime)
        check_lanes(setup.model, config, runtime)
        verify_lanes(3, 4, setup.model, setup.train_store, runtime)
        models = [setup.model.backbone.model, setup.model.backbone.plain, setup.test_evaluator.model.plain]
        layers = [[m for m in model.modules() if isinstance(m, QuantizedLinear)] for model in models]
        assert len({len(found) for found in layers}) == 1
        assert sum(layer.values.numel() for layer in layers[0]) == setup.quantized_weights > 10_000
        for own, *others in zip(*layers):
            assert all(other.values.data_ptr() == own.values.data_ptr() for other in others)
        for model in models:
            left = [m for m in model.modules() if type(m) is nn.Linear]
            assert len(left) <= 1, "the classifier alone, where it is one"


def test_8_bits_are_refused_where_nothing_is_frozen() -> None:
    with pytest.raises(ConfigError, match="quantize: int8 does not go with method 'full'"):
        parse_config(tiny_tree(method={"name": "full"}, runtime=INT8), "test")
    backbone = {"name": "test_efficientnet", "pretrained": False}
    config = parse_config(tiny_tree(method={"name": "head"}, runtime=INT8) | {"backbone": backbone}, "test")
    with process.start(config.runtime) as runtime, pytest.raises(ConfigError, match="finds no linear layer"):
        Setup(config, runtime)


def test_the_key_is_part_of_a_runs_name_only_where_it_is_on() -> None:
    """A key that changes no result of older configs must not change their digests either."""
    plain, rounded = (parse_config(tiny_tree(runtime=own), "test") for own in ({}, INT8))
    assert config_digest(plain) != config_digest(rounded)
