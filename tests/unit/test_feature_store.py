"""A FeatureStore serves what the prefix gives for each sample, and computes it once, in chunks of one shape."""

from __future__ import annotations

import pytest
import torch

from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.feature_store import FeatureStore
from fedpeft_dist.data.store import StreamedRows
from fedpeft_dist.methods.cut import cut_model
from fedpeft_dist.training.lane_count import measure_row
from tests.numerics.cases import CPU, make_images, make_lane_model, make_model, make_runtime, make_store
from tests.tiny import VIT_ARGS, VIT_NAME

SAMPLES = 40


class Prefix:
    """The mean of each channel, and a note of the images that it was asked for."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(images.shape[:2]))
        return images.mean(dim=(-1, -2)).double()

    @property
    def rows(self) -> int:
        return sum(lanes * batch for lanes, batch in self.shapes)


@pytest.fixture
def images() -> ImageSet:
    return make_images(SAMPLES)


@pytest.fixture(params=[False, True], ids=["resident", "streamed"])
def features(images: ImageSet, request: pytest.FixtureRequest) -> FeatureStore:
    store = FeatureStore(make_store(images), Prefix(), torch.empty(SAMPLES, 3, dtype=torch.float64))
    if request.param:  # as with rows on the host beside a GPU
        store.streamed = StreamedRows(store, CPU)
    return store


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(SAMPLES, (2, 5), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("is_announced", [False, True])
def test_a_batch_holds_the_features_and_labels_of_its_samples(features, images, is_announced):
    plain, drawn = make_store(images), batches(12)
    for indices, upcoming in zip(drawn, [*drawn[1:], drawn[0]]):
        found, labels = features.batch(indices)
        if is_announced:
            features.prefetch(upcoming)
        expected, right = plain.batch(indices)
        assert torch.equal(found, expected.mean(dim=(-1, -2)).double())
        assert torch.equal(labels, right)


def test_chunks_have_the_rows_of_a_batch(features):
    for indices in batches(12):
        features.batch(indices)
    assert set(features.prefix.shapes) == {(1, 10)}


def test_expected_samples_fill_up_chunks(features):
    """A batch with one new sample computes nine others, and the batches that hold those compute nothing."""
    own = torch.arange(20)
    features.batch(own[:10].view(2, 5))
    features.expect([own[:10], own[10:]])
    features.batch(own[[0, 1, 2, 3, 4, 5, 6, 7, 8, 10]].view(2, 5))
    assert features.num_known == 20
    features.batch(own[10:].view(2, 5))
    assert features.prefix.shapes == [(1, 10)] * 2


def test_no_sample_is_computed_twice(features):
    for round_number in range(3):
        features.expect([torch.arange(SAMPLES)])
        for indices in torch.arange(SAMPLES).view(4, 2, 5):
            features.batch(indices)
        assert features.prefix.rows == SAMPLES, round_number


def test_rows_of_samples_that_were_never_asked_for_are_not_needed(images):
    features = FeatureStore(make_store(images), Prefix(), torch.empty(3, 3, dtype=torch.float64))
    found, _ = features.batch(torch.tensor([[39, 7, 39]]))
    again, _ = features.batch(torch.tensor([[7, 7, 0]]))
    assert torch.equal(found[0, 1], again[0, 0])
    assert not torch.equal(again[0, 0], again[0, 2])


def test_memory_of_a_lane_is_measured_after_the_cut(images):
    """The whole model and its suffix keep the same for the backward pass: a frozen prefix keeps nothing."""
    model = make_lane_model(make_model(VIT_NAME, VIT_ARGS | {"img_size": 16, "depth": 3}), {"name": "partial"})
    model.backbone.model.requires_grad_(False)
    kept = [
        measure_row(4, own, make_store(images), make_runtime()) for own in (model, cut_model(model, make_runtime()))
    ]
    assert kept[0] >= kept[1] > 0
