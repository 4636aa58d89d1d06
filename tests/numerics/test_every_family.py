"""Every timm family x every method: equal to plain PyTorch on two ragged lanes, or refused in one line.

CI runs one part of the families, less than a minute of them, and another part each day. Of the families that are not in
LONG_FAMILIES it takes those whose number in the alphabet leaves the remainder `day % PARTS`, where day counts from year
1. FEDPEFT_FAMILIES names others ("swin_transformer,levit"), and --slow runs all. The methods of
test_reparameterized_families.py, which has families of its own, run with --slow only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date

import pytest
import torch

from fedpeft_dist.backbones.timm_backbone import classifier_names, freeze
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.ahead import compute_cost
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.training.lane_check import check_lanes

from .cases import (
    CLASSES,
    CPU,
    METHODS,
    OPTIMIZERS,
    REPARAMETERIZED,
    assert_same_delta,
    client_config,
    make_images,
    make_lane_model,
    make_runtime,
    make_tasks,
    make_trainer,
    passes_of,
    plain_batches,
    start_vector,
    train_lanes,
)
from .families import FAMILIES, LONG_FAMILIES, known_families, make_family_model
from .plain import make_plain, train_plain

PARTS = 16
SHORT_FAMILIES = sorted(set(FAMILIES) - LONG_FAMILIES)
LANES, BATCH = 2, 3
OPTIMIZER = {**OPTIMIZERS["sgd"], "lr": 0.01}
"""The tests also clip gradients, because untrained deep networks would not stay finite."""
SIZES, STEPS = (5, 2, 5), (2, 2, 2)
"""No batch has one sample: some of PyTorch's convolutions on the CPU compute a wrong gradient for it."""


def is_in_this_part(family: str) -> bool:
    if chosen := os.environ.get("FEDPEFT_FAMILIES"):
        return family in chosen.split(",")
    return family in SHORT_FAMILIES[date.today().toordinal() % PARTS :: PARTS]


def cell_marks(family: str, method: str) -> list[pytest.MarkDecorator]:
    return [] if is_in_this_part(family) and method not in REPARAMETERIZED else [pytest.mark.slow]


CELLS = [
    pytest.param(family, method, id=f"{family}-{method}", marks=cell_marks(family, method))
    for family in FAMILIES
    for method in METHODS
]


def make_config(family: str, method: str) -> RunConfig:
    name, arguments, size = FAMILIES[family]
    tree = {
        "backbone": {"name": name, "pretrained": False, "model_args": arguments},
        "method": METHODS[method],
        "data": {"name": "synthetic", "image_size": size, "classes": CLASSES, "clients": 8},
        "output": {"name": "unused"},
    }
    return parse_config(tree, "test")


def refusal(function: Callable[..., object], *arguments: object) -> str:
    try:
        function(*arguments)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_family_equals_plain_training_or_is_refused(family, method):
    if family not in known_families():
        pytest.skip("this timm has no such family")
    config = make_config(family, method)
    message = refusal(compute_cost, config)
    if message:
        assert "\n" not in message
        assert message.startswith(("method.", "backbone.", "data.image_size"))
        assert refusal(build_lane_model, config, CLASSES) == message  # before a run reads weights or writes a file
        return
    assert_passes_the_check_of_a_run(config, family, method)
    assert_equals_plain_training(family, method)


def assert_passes_the_check_of_a_run(config: RunConfig, family: str, method: str) -> None:
    """The model's own dropout and drop-path are on."""
    model = make_lane_model(make_family_model(family, with_dropout=True), METHODS[method], config.data.image_size)
    freeze(model.backbone.model, torch.float32, CPU)
    check_lanes(model, config, make_runtime())


def assert_equals_plain_training(family: str, method: str) -> None:
    model, image_size = make_family_model(family), FAMILIES[family][2]
    images, tasks = make_images(20, image_size), make_tasks(SIZES, STEPS)
    passes = passes_of(tasks, LANES, BATCH)
    assert any(one.starting for one in passes[1:])
    assert not all(one.mask.all() for one in passes)
    lane_model = make_lane_model(model, METHODS[method], image_size, torch.float64)
    vector = start_vector(lane_model, torch.float64, noise=0.02)
    trainer = make_trainer(lane_model, images, client_config(OPTIMIZER, BATCH, clip_norm=1.0), LANES, torch.float64)
    updates = train_lanes(trainer, tasks, vector)
    plain = make_plain(model, METHODS[method], classifier_names(model))
    plain.model.double()
    for task in tasks:
        batches = plain_batches(images, task, BATCH, torch.float64)
        expected = train_plain(plain, lane_model.layout.split(vector), batches, OPTIMIZER, clip_norm=1.0)
        assert_same_delta(lane_model.layout.split(updates[task.client].delta), expected.delta, 1e-9)


def test_no_family_of_timm_is_missing():
    assert known_families() <= set(FAMILIES)
