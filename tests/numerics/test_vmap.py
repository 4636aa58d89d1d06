"""Full fine-tuning maps the whole model over lanes; each lane's gradient is what autograd gives for it alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpeft_dist.lanes.parameters import LaneParameters

from .cases import CLASSES, METHODS, VIT, make_lane_model, make_model, make_runtime, start_vector
from .plain import make_plain
from .test_families import FAMILIES

LANES, BATCH = 4, 3


def gradients(lane_model, rows, images, labels) -> torch.Tensor:
    """The gradient of the sum of the lanes' mean losses: [L, W]."""
    parameters = LaneParameters(lane_model.layout, len(rows))
    for lane, row in enumerate(rows):
        parameters.load(lane, lane_model.layout.pad(row))
    lane_model.bind(parameters)
    logits = lane_model.logits(images)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses.view(labels.shape).mean(dim=1).sum().backward()
    return parameters.grad.clone()


@pytest.mark.parametrize("family", ["vit", *FAMILIES])
def test_lanes_have_their_own_gradients(family):
    name, arguments, image_size, heads = FAMILIES.get(family, (*VIT, 16, ["head"]))
    model = make_model(name, arguments)
    lane_model = make_lane_model(model, METHODS["full"], image_size)
    generator = torch.Generator().manual_seed(0)
    start = start_vector(lane_model, noise=0.0)
    rows = [start + 0.02 * torch.randn(len(start), generator=generator) for _ in range(LANES)]
    images = torch.randn(LANES, BATCH, 3, image_size, image_size, generator=generator)
    labels = torch.randint(0, CLASSES, (LANES, BATCH), generator=generator)
    together = gradients(lane_model, rows, images, labels)
    assert not torch.allclose(together[0], together[1], rtol=0.1)
    plain = make_plain(model, METHODS["full"], heads)
    for lane, row in enumerate(rows):
        alone = gradients(lane_model, [row], images[lane : lane + 1], labels[lane : lane + 1])[0]
        plain.load(lane_model.layout.split(row))
        plain.model.zero_grad()
        F.cross_entropy(plain.model(images[lane]), labels[lane]).backward()
        expected = lane_model.layout.pad(lane_model.layout.join({n: p.grad for n, p in plain.trainable.items()}))
        scale = expected.abs().max().item()
        assert scale > 1e-3
        torch.testing.assert_close(together[lane], alone, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(together[lane], expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_reaches_the_model_whatever_the_number_of_lanes(method, lanes):
    """A precision that held for one lane and not for several would change results, and cost speed, in silence."""
    lane_model = make_lane_model(make_model(*VIT), METHODS[method])
    parameters = LaneParameters(lane_model.layout, lanes)
    for lane in range(lanes):
        parameters.load(lane, lane_model.layout.pad(lane_model.initial_vector()))
    lane_model.bind(parameters)
    types = {}
    for name, module in lane_model.backbone.model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda _, __, y, name=name: types.update({name: y.dtype}))
    with make_runtime("bf16").autocast():
        logits = lane_model.logits(torch.randn(lanes, BATCH, 3, 16, 16))
    assert len(types) > 1
    assert set(types.values()) == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16
