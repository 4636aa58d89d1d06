"""LoRA and adapters begin as the backbone: round 0 predicts what the plain model predicts, head included."""

from __future__ import annotations

import pytest
import torch

from fedpeft_dist.lanes.parameters import LaneParameters

from .cases import METHODS, VIT, make_lane_model, make_model

LANES, BATCH = 3, 4
IDENTITIES = [name for name in METHODS if not name.startswith(("prompt", "prefix"))]
SILENT = {"adapter-shared": "up", "adapter-per-block": "up", "lora-qkv": "lora_B", "lora-all": "lora_B"}
SILENT |= {"adaptformer": "up", "houlsby": "up", "repadapter": "up", "convpass": "up"}
SILENT |= {"lora-parts": "lora_B", "dora": "lora_B", "vera": "vera_lambda_b", "fact-tt": "v", "fact-tk": "v"}


def lane_logits(lane_model, vector: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    parameters = LaneParameters(lane_model.layout, LANES)
    for lane in range(LANES):
        parameters.load(lane, lane_model.layout.pad(vector))
    lane_model.bind(parameters)
    with torch.no_grad():
        return lane_model.logits(images)


@pytest.mark.parametrize("method", IDENTITIES)
def test_first_logits_are_the_backbones(method):
    model = make_model(*VIT)
    lane_model = make_lane_model(model, METHODS[method])
    images = torch.randn(LANES, BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images.flatten(0, 1)).view(LANES, BATCH, -1)
    assert expected.std() > 0.1
    actual = lane_logits(lane_model, lane_model.initial_vector(), images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("method", SILENT)
def test_only_the_last_matrix_is_zero(method):
    """Every matrix then gets a gradient from the second step on, and the branch acts once that matrix is not zero."""
    lane_model = make_lane_model(make_model(*VIT), METHODS[method])
    start = lane_model.initial_vector()
    tensors = {name: value.clone() for name, value in lane_model.layout.split(start).items()}
    silent = [name for name in tensors if SILENT[method] in name.split(".")]
    weights = [name for name in tensors if name.endswith("weight")]
    assert silent
    assert all(not tensors[name].any() for name in silent)
    assert all(tensors[name].any() for name in set(weights) - set(silent))
    images = torch.randn(LANES, BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = lane_logits(lane_model, start, images)
    for name in silent:
        moved = {**tensors, name: 0.1 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))}
        assert not torch.allclose(lane_logits(lane_model, lane_model.layout.join(moved), images), before, atol=1e-4)
