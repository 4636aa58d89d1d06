"""Dropout and drop-path in lanes drop what the samples' keys say, whoever else is in the batch.

The reference trains one client after another and draws each mask for one sample at a time.

Shapes: R rows, or samples.
"""

from __future__ import annotations

import re

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from fedpeft_dist.lanes.dropout import KeyedDropout, KeyedDropPath
from fedpeft_dist.lanes.random import fold_in

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
    with_dropout,
)
from .plain import make_plain, train_plain
from .test_families import FAMILIES

LANES, BATCH = 3, 4
SIZES, STEPS = (6, 3, 5, 1, 7), (3, 1, 3, 2, 2)

# How a place in the package's model is called in the plain one.
PLAIN_NAMES = {
    "prompt-deep": [(r"^blocks\.(\d+)\.blocks\.0\.", r"vit.blocks.\1."), (r"^blocks\.(\d+)\.dropout$", r"dropouts.\1")],
    "prompt-shallow": [(r"^blocks\.0\.blocks\.", "vit.blocks."), (r"^blocks\.0\.dropout$", "dropouts.0")],
    "adapter-per-block": [(r"\.mlp\.layer\.", ".mlp.")],
}


class SampleBySample(nn.Module):
    """A dropout layer that asks the keyed one about each sample alone, with a batch of one."""

    def __init__(self, keyed: nn.Module):
        super().__init__()
        self.keyed, self.samples, self.dropped = keyed, torch.empty(0), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for key, part in zip(self.samples, x.chunk(len(self.samples))):
            self.keyed.keys.rows = key.view(1)
            factors = self.keyed(torch.ones_like(part).flatten().unsqueeze(0)).view(part.shape)
            self.dropped += int((factors == 0).sum())
            parts.append(part * factors)
        return torch.cat(parts)


def insert_masks(model: nn.Module, names: dict[str, nn.Module]) -> list[SampleBySample]:
    """Replaces the layers called so, which must be all that act at random."""
    stochastic = {
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Dropout) and module.p) or (isinstance(module, DropPath) and module.drop_prob)
    }
    assert stochastic == set(names)
    masks = []
    for name, keyed in names.items():
        parent, _, leaf = name.rpartition(".")
        masks.append(SampleBySample(keyed))
        setattr(model.get_submodule(parent), leaf, masks[-1])
    return masks


def keyed_copies(lane_model, method: str) -> dict[str, nn.Module]:
    """New keyed layers with the sites and rates of the package's model, by their plain names."""
    copies = {}
    for name, module in lane_model.backbone.model.named_modules():
        if isinstance(module, (KeyedDropout, KeyedDropPath)):
            for pattern, plain in PLAIN_NAMES.get(method, []):
                name = re.sub(pattern, plain, name)
            is_path = isinstance(module, KeyedDropPath)
            copy = KeyedDropPath(module.probability, True, "") if is_path else KeyedDropout(module.probability, "")
            copy.site = module.site
            copies[name] = copy
    return copies


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("vit", "full"),
        ("vit", "bias"),
        ("vit", "prompt-shallow"),
        ("vit", "prompt-deep"),
        ("vit", "adapter-per-block"),
        ("vit", "lora-all"),
        ("swin", "lora-qkv"),
        ("swin", "full"),
    ],
)
def test_training_with_dropout_is_plain_training_with_the_keys_masks(family, method):
    name, arguments, image_size, heads = FAMILIES.get(family, (*VIT, 16, ["head"]))
    model = make_model(name, {**arguments, "proj_drop_rate": 0.2, "drop_path_rate": 0.4})
    settings, tasks = with_dropout(METHODS[method], 0.3), make_tasks(SIZES, STEPS)
    images = make_images(image_size=image_size)
    assert_ragged(passes_of(tasks, LANES, BATCH))
    lane_model = make_lane_model(model, settings, image_size, torch.float64)
    vector = start_vector(lane_model, torch.float64)
    client = client_config(OPTIMIZERS["sgd"], BATCH)
    updates = train_lanes(make_trainer(lane_model, images, client, LANES, torch.float64), tasks, vector)

    plain = make_plain(model, settings, heads)
    plain.model.double()
    copies = keyed_copies(lane_model, method)
    assert len({copy.site for copy in copies.values()}) == len(copies)
    masks = insert_masks(plain.model, copies)
    start = lane_model.layout.split(vector)
    for task in tasks:

        def batches(task=task):
            alone = passes_of([task], 1, BATCH)
            for one, batch in zip(alone, plain_batches(images, task, BATCH, torch.float64), strict=True):
                for mask in masks:
                    mask.samples = fold_in(one.row_keys[0], one.indices[0][one.mask[0]])
                yield batch

        expected = train_plain(plain, start, batches(), OPTIMIZERS["sgd"])
        assert_same_delta(lane_model.layout.split(updates[task.client].delta), expected.delta, 1e-9)
    assert all(mask.dropped for mask in masks)


def make_keys(count: int) -> torch.Tensor:
    return fold_in(torch.full((count,), 77), torch.arange(count))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_dropout_keeps_its_share_and_the_mean(probability):
    dropout = KeyedDropout(probability, "somewhere")
    dropout.keys.rows = make_keys(500)
    x = torch.full((500, 7, 33), 2.0)
    y = dropout(x)
    kept = y != 0
    assert torch.equal(y[kept], (x / (1 - probability))[kept])
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < 5 * deviation
    assert y.double().mean().item() == pytest.approx(2.0, abs=2 * 5 * deviation / (1 - probability))
    # Not by sample or by place either: each has a share of its own near the rate.
    for axes in ((1, 2), (0,)):
        shares = kept.double().mean(dim=axes)
        count = x.numel() / shares.numel()
        assert (shares - (1 - probability)).abs().max() < 6 * (probability * (1 - probability) / count) ** 0.5


def test_dropout_draws_anew_for_samples_places_and_keys():
    rows = make_keys(64)
    x = torch.ones(64, 5, 32)

    def mask(name: str, keys: torch.Tensor) -> torch.Tensor:
        dropout = KeyedDropout(0.5, name)
        dropout.keys.rows = keys
        return dropout(x) != 0

    first = mask("blocks.0.drop", rows)
    assert torch.equal(first, mask("blocks.0.drop", rows))
    assert torch.equal(first.flip(0), mask("blocks.0.drop", rows.flip(0)))
    for other in (mask("blocks.1.drop", rows), mask("blocks.0.drop", fold_in(rows, 1)), first.roll(1, dims=0)):
        assert 0.45 < (first == other).double().mean() < 0.55


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_drops_whole_samples_at_its_rate(scale_by_keep):
    path = KeyedDropPath(0.3, scale_by_keep, "somewhere")
    path.keys.rows = make_keys(20_000)
    y = path(torch.ones(20_000, 3, 2))
    kept = y != 0
    assert torch.equal(kept.all(dim=(1, 2)), kept.any(dim=2).any(dim=1))
    assert abs(kept[:, 0, 0].double().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    value = torch.tensor(1 / 0.7 if scale_by_keep else 1.0)
    assert torch.equal(y[kept], value.expand_as(y[kept]))


def test_a_probability_of_one_drops_everything():
    dropout = KeyedDropout(1.0, "somewhere")
    dropout.keys.rows = make_keys(4)
    assert torch.equal(dropout(torch.ones(4, 5, 6)), torch.zeros(4, 5, 6))


def test_without_keys_nothing_is_dropped():
    x = torch.randn(4, 5, 6)
    assert KeyedDropout(0.5, "a")(x) is x
    assert KeyedDropPath(0.5, True, "a")(x) is x


def test_modules_that_share_their_draws_are_independent():
    """They keep pairs and triples of places as often as independent ones would."""
    names = [f"blocks.{number}.attn.qkv" for number in range(24)]
    modules = [KeyedDropout(0.3, name) for name in names]
    for module in modules:
        module.keys = modules[0].keys
    modules[0].keys.rows = make_keys(400)
    kept = torch.stack([(module(torch.ones(400, 250)) != 0).double().flatten() for module in modules])
    count = kept.shape[1]

    def deviation(share: float) -> float:
        return 6 * (share * (1 - share) / count) ** 0.5

    pairs = kept @ kept.T / count
    off_diagonal = ~torch.eye(len(modules), dtype=torch.bool)
    assert (pairs[off_diagonal] - 0.7**2).abs().max() < deviation(0.7**2)
    triples = torch.einsum("in,jn,kn->ijk", kept[:8], kept[8:16], kept[16:]) / count
    assert (triples - 0.7**3).abs().max() < deviation(0.7**3)
