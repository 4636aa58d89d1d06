"""The merged model that evaluates scores as the model on lanes that trains, for every vector that it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.methods.merged import MergedModel
from fedpeft_dist.runtime import process
from tests.tiny import tiny_tree, tiny_vit

METHODS: list[dict[str, Any]] = [
    {"name": "bias"},
    {"name": "norm"},
    {"name": "lora", "targets": ["qkv", "proj", "fc1", "fc2"]},
    {"name": "full"},
    {"name": "repadapter", "scale": 0.5},
    {"name": "diffit"},
    {"name": "lora", "targets": ["q", "v", "fc1"], "ranks": {"q": 3}, "rslora": True},
    {"name": "ssf"},
    {"name": "ia3"},
    {"name": "dora", "targets": ["qkv", "fc2"]},
    {"name": "vera", "rank": 9},
    {"name": "fact_tt", "rank": 3},
    {"name": "fact_tk", "rank": 4},
]
EXACT = ("bias", "norm", "full")
"""The methods whose merged tensors are the trained ones, which are merged in 16 bits, too."""


def scores_of(model: LaneModel, vector: torch.Tensor, images: torch.Tensor, runtime: process.Runtime) -> torch.Tensor:
    parameters = LaneParameters(model.layout, 1, with_grad=False, compute_dtype=runtime.compute_dtype)
    parameters.load(0, model.layout.pad(vector))
    model.bind(parameters)
    with torch.no_grad(), runtime.autocast():
        return model.logits(images).float()


def test_a_merged_model_follows_attention_biases() -> None:
    """timm's LeViT keeps the biases of its first call, unless it is told not to."""
    backbone = {"name": "levit_128s", "pretrained": False, "model_args": {}}
    tree = tiny_tree(method={"name": "full"}, data={"image_size": 64}, runtime={"precision": "fp32"})
    tree["backbone"] = backbone
    config = parse_config(tree, "test")
    with process.start(config.runtime) as runtime:
        setup = Setup(config, runtime)
        images, vector = setup.test_store.batch(torch.arange(8).unsqueeze(0))[0], setup.initial_vector
        before = scores_of(setup.test_evaluator.model, vector, images, runtime)
        for name, tensor in setup.model.layout.split(vector).items():
            if "attention_biases" in name:
                tensor += torch.linspace(-5, 5, tensor.numel()).view_as(tensor)
        scores = [scores_of(model, vector, images, runtime) for model in (setup.test_evaluator.model, setup.model)]
        largest = scores[1].abs().max()
        assert (scores[0] - scores[1]).abs().max() < 1e-3 * largest
        assert (scores[0] - before).abs().max() > 0.05 * largest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method['name']}{len(method)}")
def test_a_merged_model_scores_as_the_model_on_lanes(method: dict[str, Any], precision: str) -> None:
    runtime = {"device": "cpu", "precision": precision, "cache": "none"}
    tree = tiny_tree(backbone=tiny_vit(depth=2), method=method, runtime=runtime)
    config = parse_config(tree, "test")
    with process.start(config.runtime) as runtime:
        setup = Setup(config, runtime)
        evaluated, trained = setup.test_evaluator.model, setup.model
        assert isinstance(evaluated, MergedModel) == (precision == "fp32" or method["name"] in EXACT)
        images, _ = setup.test_store.batch(torch.arange(32).unsqueeze(0))
        scores = []
        for seed in range(2):
            noise = torch.randn(setup.initial_vector.shape, generator=torch.Generator().manual_seed(seed))
            vector = setup.initial_vector + 0.05 * noise
            scores.append(scores_of(evaluated, vector, images, runtime))
            expected = scores_of(trained, vector, images, runtime)
            tolerance = 1e-5 if precision == "fp32" else 0.05
            torch.testing.assert_close(scores[-1], expected, rtol=tolerance, atol=tolerance)
        assert (scores[0] - scores[1]).abs().max() > 0.1
