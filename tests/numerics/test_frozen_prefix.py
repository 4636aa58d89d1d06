"""A run that keeps what its frozen prefix gives for each image ends with the bits of one that computes it anew."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.trees import merge_trees
from fedpeft_dist.data import feature_memory
from fedpeft_dist.federation.run import run
from fedpeft_dist.methods.cut import NoCutError, SuffixModel, cut_model
from tests.tiny import tiny_tree, tiny_vit

from .cases import CPU, make_lane_model, make_model, make_runtime

METHODS = {
    "head": {"name": "head"},
    "partial": {"name": "partial"},
    "lora": {"name": "lora", "rank": 3, "targets": ["qkv", "fc2"], "dropout": 0.1, "blocks": 1},
    "adapter": {"name": "adapter", "bottleneck": 7, "blocks": 2},
    "bias-last": {"name": "bias", "blocks": [-1]},
    "norm-last": {"name": "norm", "blocks": [2]},
    "ssf-last": {"name": "ssf", "blocks": 1},
    "fact": {"name": "fact_tk", "rank": 3, "blocks": [1, -1], "dropout": 0.1},
    "prompt-deep": {"name": "prompt", "tokens": 3, "dropout": 0.2, "blocks": 1},
    "prompt-shallow": {"name": "prompt", "tokens": 3, "depth": "shallow", "blocks": [1, 2]},
}
# These get no private run of their own: a cut does not look at privacy.
ADDED = {
    "adaptformer": {"name": "adaptformer", "bottleneck": 7, "blocks": 1},
    "houlsby": {"name": "houlsby", "bottleneck": 5, "blocks": 1},
    "repadapter": {"name": "repadapter", "bottleneck": 6, "blocks": 1},
    "diffit": {"name": "diffit", "blocks": 1},
    "convpass": {"name": "convpass", "bottleneck": 3, "blocks": 1},
    "prefix": {"name": "prefix", "tokens": 3, "blocks": 1},
}
PRIVATE = {"privacy": {"name": "sample", "noise_multiplier": 1.0, "clip_norm": 1.0, "slots": 9}}
VALIDATION = {"data": {"validation": 0.2}, "federation": {"evaluate_on": "validation", "evaluate_clients": True}}


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The leading sizes, [L, B], of the images whose features are computed."""
    sizes, prefix = [], SuffixModel.prefix

    def noting(model, images):
        sizes.append(tuple(images.shape[:2]))
        return prefix(model, images)

    monkeypatch.setattr(SuffixModel, "prefix", noting)
    return sizes


def train(folder: Path, name: str, cache: str | int, method: str, sections: Mapping[str, Any] = {}) -> dict[str, Any]:
    """A run's summary. Two lanes take clients of unequal size; the run ends after an evaluation on test images."""
    tree = tiny_tree(
        backbone=tiny_vit(depth=3),
        method=(METHODS | ADDED).get(method, {"name": method}),
        data={"num_train": 100, "num_test": 50, "clients": 8, "partition": {"name": "dirichlet", "alpha": 1.0}},
        federation={"rounds": 3, "cohort": 4},
        client={"epochs": 2, "batch_size": 7},
        runtime={"device": "cpu", "lanes": 2, "cache": cache, "evaluate_batch": 16},
        output={"root": str(folder), "name": name},
    )
    run(parse_config(merge_trees(tree, sections), "test"))
    return json.loads((folder / name / "summary.json").read_text())


def results(summary: dict) -> list[Any]:
    return [summary[key] for key in ("weights_sha256", "final_accuracy", "best_accuracy", "lanes")]


@pytest.mark.parametrize(
    ("method", "sections"),
    [(name, own) for name in METHODS for own in ({}, PRIVATE)] + [(name, {}) for name in ADDED],
    ids=lambda value: value if isinstance(value, str) else ("private" if value else "plain"),
)
def test_kept_features_change_no_bit(tmp_path, chunks, method, sections):
    anew = train(tmp_path, "anew", "none", method, sections)
    assert not chunks
    assert results(train(tmp_path, "kept", "auto", method, sections)) == results(anew)
    trial, probe, evaluation, step = 3, 1, 16, 9 if sections else 14
    assert {rows for _, rows in chunks} == {trial, probe, evaluation, step}


@pytest.mark.parametrize("sections", [{"runtime": {"precision": "bf16"}}, VALIDATION], ids=["bf16", "validation"])
@pytest.mark.parametrize("method", ["head", "partial"])
def test_kept_features_change_no_bit_elsewhere(tmp_path, chunks, method, sections):
    anew = train(tmp_path, "anew", "none", method, sections)
    assert results(train(tmp_path, "kept", "auto", method, sections)) == results(anew)
    assert chunks


def test_each_sample_is_computed_once(tmp_path, chunks):
    train(tmp_path, "kept", "auto", "head", {"federation": {"rounds": 9}})
    assert 100 / 14 <= chunks.count((1, 14)) <= 100 / 14 + 9, "at most one chunk of a round is part empty"
    assert chunks.count((1, 16)) == 4, "50 test images in batches of 16"


def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(tmp_path):
    whole = train(tmp_path, "whole", "auto", "partial", {"federation": {"rounds": 4}})
    train(tmp_path, "parts", "auto", "partial", {"federation": {"rounds": 2}})
    assert results(train(tmp_path, "parts", 10**6, "partial", {"federation": {"rounds": 4}})) == results(whole)


NOTE = "the frozen layers are computed at every step: "
REFUSALS = {
    "augmentation": ("head", "auto", {"data": {"augment": "flip"}}, ["data.augment: flip changes training images"]),
    "dropout": ("head", "auto", {"backbone": tiny_vit(proj_drop_rate=0.1)}, ["dropout or drop-path is on"]),
    "small budget": (
        "head",
        13_000,
        {},
        ["the features of test images take 6,528 bytes, and runtime.cache has 72 left"],
    ),
    "first block": ("bias", 10**6, {}, ["the method trains from the first block on"]),
    "first block, not asked for": ("bias", "auto", {}, []),
    "served": ("head", "auto", {}, []),
    "not wanted": ("head", "none", {}, []),
}


@pytest.mark.parametrize(("method", "cache", "sections", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_a_run_says_once_why_it_computes_features_anew(tmp_path, capsys, method, cache, sections, expected):
    train(tmp_path, "run", cache, method, sections)
    notes = [line.partition(NOTE)[2] for line in capsys.readouterr().out.splitlines() if NOTE in line]
    assert len(notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(notes, expected))


def test_features_are_in_a_file_where_memory_is_short(tmp_path, monkeypatch):
    mapped = []

    def map_file(*arguments, make=feature_memory._map_file):
        mapped.append(make(*arguments))
        return mapped[-1]

    monkeypatch.setattr(feature_memory, "available_host_memory", lambda: 1000)
    monkeypatch.setattr(feature_memory, "_map_file", map_file)
    kept = train(tmp_path, "kept", "auto", "partial")
    assert [tuple(rows.shape) for rows in mapped] == [(101, 5, 32), (51, 5, 32)]
    assert results(kept) == results(train(tmp_path, "anew", "none", "partial"))
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("kept", "anew")]
    assert files[0] == files[1]


def test_a_full_machine_computes_features_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_memory, "available_host_memory", lambda: 1000)
    monkeypatch.setattr(feature_memory, "DISK_SHARE", 0.0)
    train(tmp_path, "run", "auto", "head")
    assert capsys.readouterr().out.count("neither memory nor disk has room") == 2


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(feature_memory, "available_host_memory", lambda: 0)
    assert feature_memory.allocate((4, 8), torch.float32, make_runtime(), tmp_path) is None


UNCUT = {
    "positions beside features": ("vit_tiny_patch16_dinov3_qkvb", {"depth": 2}, 64, "lora", "computes something else"),
    "neither blocks nor one classifier": ("levit_128s", {}, 224, "head", "no sequence of blocks, and not one class"),
}


@pytest.mark.parametrize(("name", "arguments", "image_size", "method", "reason"), UNCUT.values(), ids=UNCUT)
def test_a_model_that_does_more_than_one_block_after_another_is_not_cut(name, arguments, image_size, method, reason):
    model = make_lane_model(make_model(name, arguments), METHODS[method], image_size)
    freeze(model.backbone.model, torch.float32, CPU)
    with pytest.raises(NoCutError, match=reason):
        cut_model(model, make_runtime())
