"""`runtime.lanes: auto`: what a lane takes on the CPU, and how a measured peak becomes a number of lanes."""

from __future__ import annotations

import gc

import pytest
import torch

from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training import lane_count
from fedpeft_dist.training.lane_count import MEMORY_SHARE, choose_lanes, live_peaks, measure_row

from .cases import CPU, METHODS, VIT, make_images, make_lane_model, make_model, make_runtime, make_store, with_dropout

BATCH = 64


def make(method: str = "bias", dropout: float = 0.0) -> LaneModel:
    model = make_lane_model(make_model(*VIT), with_dropout(METHODS[method], dropout))
    freeze(model.backbone.model, torch.float32, CPU)
    return model


def measure(model: LaneModel, batch: int) -> int:
    return measure_row(batch, model, make_store(make_images()), make_runtime())


@pytest.mark.parametrize("method", METHODS)
def test_a_row_takes_more_with_more_samples(method):
    """The extrapolation from a few samples is near the measurement of all of them."""
    model = make(method)
    counted, store = measure(model, BATCH), make_store(make_images())
    real = max(live_peaks(BATCH, model, store, make_runtime())) + 8 * model.layout.width
    assert counted == pytest.approx(real, rel=0.1)
    assert counted > 5 * measure(model, 2) or method == "full"


def test_the_head_counts_the_frozen_pass():
    """A block's hidden features, for every token of every sample, are in memory at some time."""
    hidden = BATCH * 5 * 4 * 32 * 4
    assert measure(make("head"), BATCH) > hidden


def test_dropout_counts():
    assert measure(make("lora-all", dropout=0.1), BATCH) > 1.2 * measure(make("lora-all"), BATCH)


@pytest.mark.parametrize("method", ["head", "lora-all", "full"])
def test_a_measurement_keeps_no_tensor(method):
    model, store = make(method), make_store(make_images())

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    measure_row(4, model, store, make_runtime())
    before = tensors()
    for _ in range(3):
        measure_row(4, model, store, make_runtime())
    assert tensors() <= before


class FakeGpu:
    """A GPU on which `fixed` bytes and `each` bytes a lane are taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fixed: int, each: int, free: int):
        self.fixed, self.each, self.free, self.tried = fixed, each, free, []
        monkeypatch.setattr(lane_count, "used_memory", lambda device: 7)
        monkeypatch.setattr(lane_count, "forget_peak_memory", lambda device: None)
        monkeypatch.setattr(lane_count, "peak_memory", lambda device: 7 + self.taken(self.tried[-1]))
        monkeypatch.setattr(lane_count, "free_device_memory", lambda device, sharers: free // sharers)

    def taken(self, lanes: int) -> int:
        return self.fixed + self.each * lanes

    def train_some(self, lanes: int) -> None:
        self.tried.append(lanes)
        if self.taken(lanes) > self.free:
            raise torch.OutOfMemoryError

    def choose(self, needed: int, sharers: int = 1) -> int:
        runtime = Runtime(Launch(gpu_sharers=sharers), torch.device("cuda", 0), "fp32", threads=1)
        return choose_lanes(needed, 4, make("head"), make_store(make_images()), runtime, self.train_some)


def test_on_a_gpu_the_lanes_follow_two_measured_peaks(monkeypatch):
    gpu = FakeGpu(monkeypatch, fixed=500, each=100, free=10_000)
    assert gpu.choose(1000) == (MEMORY_SHARE * 10_000 - 500) // 100
    assert gpu.tried == [2, 3]
    assert gpu.choose(10) == 10
    assert gpu.choose(1000, sharers=4) == (MEMORY_SHARE * 2_500 - 500) // 100


@pytest.mark.parametrize(("free", "expected"), [(650, 1), (750, 1), (1050, 2)])
def test_on_a_small_gpu_an_attempt_that_fails_limits_the_lanes(free, expected, monkeypatch):
    assert FakeGpu(monkeypatch, fixed=500, each=100, free=free).choose(2 if free > 1000 else 9) == expected


def test_a_single_lane_is_not_measured():
    store = make_store(make_images())
    assert choose_lanes(1, 4, make("head"), store, make_runtime(device=CPU), pytest.fail) == 1
