"""What sharding refuses, in one line each, and how ranks that compute in step share passes."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, parse_config
from fedpeft_dist.config.schema import RunConfig, RuntimeConfig, ShardingConfig
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.runtime import process, sharding
from fedpeft_dist.runtime.mesh import spread
from fedpeft_dist.training.lockstep import in_step
from fedpeft_dist.training.schedule import Pass
from tests.tiny import tiny_tree

SHARDED = {"size": 2}


def refusal(sharding: dict[str, Any], **sections: Any) -> str:
    sections["runtime"] = sections.get("runtime", {}) | {"sharding": sharding}
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_tree(**sections), "test")
    return str(caught.value)


@pytest.mark.parametrize(
    ("sharding", "sections", "words"),
    [
        (SHARDED, {"method": {"name": "full"}}, "runtime.sharding.size: 2 does not go with method 'full'"),
        ({"offload": "cpu"}, {"method": {"name": "full"}}, "runtime.sharding.offload: cpu does not go with method"),
        (SHARDED, {"runtime": {"compile": True}}, "runtime.sharding.size: 2 does not go with runtime.compile: true"),
        ({"offload": "nvme"}, {}, "runtime.sharding: offload: 'nvme' needs nvme_path"),
        ({"nvme_path": "/tmp"}, {}, "goes with offload: nvme only"),
        ({"lanes": "shared"}, {}, "lanes: 'shared' needs a group of ranks"),
        ({"size": 0}, {}, "runtime.sharding.size: 0"),
    ],
)
def test_refuses_what_does_not_go_together(sharding, sections, words):
    assert words in refusal(sharding, **sections)


def test_sharding_changes_no_run_name():
    plain, sharded = (
        parse_config(tiny_tree(runtime={"sharding": own}), "test") for own in ({}, {"size": 4, "offload": "cpu"})
    )
    assert config_digest(plain) == config_digest(sharded)


@pytest.fixture
def runtime():
    with process.start(RuntimeConfig(device="cpu")) as runtime:
        yield runtime


def spread_over(runtime: process.Runtime, **section: Any) -> process.Runtime:
    with spread(runtime, ShardingConfig(**section)) as spread_runtime:
        return spread_runtime


def test_refuses_ranks_that_make_no_whole_groups(runtime):
    with pytest.raises(ConfigError, match=r"runtime.sharding.size: 2 does not divide the run's 1 rank"):
        spread_over(runtime, size=2)


def test_names_the_extra_where_deepspeed_is_missing(runtime, monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sharding, "version", missing)
    with pytest.raises(ConfigError, match=r"needs deepspeed >= 0.19.6.*pip install 'fedpeft_dist\[sharding\]'"):
        spread_over(runtime, offload="cpu")


def test_refuses_an_old_deepspeed(runtime, monkeypatch):
    monkeypatch.setattr(sharding, "version", lambda name: "0.19.5")
    with pytest.raises(ConfigError, match=r"needs deepspeed >= 0.19.6, found 0.19.5"):
        spread_over(runtime, offload="cpu")


def test_refuses_a_folder_for_weights_that_cannot_be_written(runtime, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"nvme_path: '.*file/below' cannot be written \(Not a directory\); give"):
        spread_over(runtime, offload="nvme", nvme_path=str(tmp_path / "file" / "below"))


def test_a_saved_view_is_found_again_where_its_tensor_has_gone():
    """Two tensors share a buffer, as parts from files do, and have changed places when the view is asked for."""
    buffer = torch.arange(24.0)
    first, second = (nn.Parameter(buffer[start : start + 12].view(3, 4), False) for start in (0, 12))
    blocks = sharding.ShardedBlocks([[first, second]], SimpleNamespace(), torch.device("cpu"))
    blocks.current = (0, 0)
    expected = [view.clone() for view in (first.t(), second[1:].t())]
    packed = [blocks._pack(view) for view in (first.t(), second[1:].t())]
    assert not any(isinstance(own, torch.Tensor) for own in packed)
    values = first.clone(), second.clone()
    first.data, second.data = second.data, first.data
    for tensor, value in zip((first, second), values):
        tensor.copy_(value)
    for own, view in zip(packed, expected):
        assert torch.equal(blocks._unpack(own), view)
    elsewhere = torch.ones(3)
    assert blocks._pack(elsewhere).data_ptr() == elsewhere.data_ptr()


def test_refuses_batch_norm(runtime, tmp_path: Path):
    tree = tiny_tree(backbone={"name": "test_efficientnet", "model_args": {}}, output={"root": str(tmp_path)})
    config: RunConfig = parse_config(tree, "test")
    with spread(runtime, ShardingConfig(offload="cpu")) as spread_runtime:
        with pytest.raises(ConfigError, match=r"test_efficientnet has BatchNorm layers"):
            Setup(config, spread_runtime)


class Group:
    """Stands in for a Mesh: the other rank of the group has so many passes, and drops the round before one of them."""

    def __init__(self, passes: int, dropped_before: int | None = None):
        self.left, self.dropped_before, self.asked = passes, dropped_before, 0

    def agree(self, is_busy: bool, is_dropped: bool) -> list[bool]:
        drops = self.asked == self.dropped_before
        self.asked, self.left = self.asked + 1, self.left - 1
        return [is_busy or self.left >= 0, is_dropped or drops]


@pytest.mark.parametrize(
    ("others", "dropped", "expected"), [(1, None, "ab"), (4, None, "ab--"), (4, 1, "a"), (4, 3, "ab-")]
)
def test_a_rank_makes_as_many_passes_as_its_group(others, dropped, expected):
    pairs = iter([("a", "b"), ("b", None)])
    made = "".join(current or "-" for current, _ in in_step(pairs, Group(others, dropped), lambda: False))
    assert made == expected


def test_parts_of_a_pass_make_up_the_whole():
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    whole = Pass(torch.arange(21).view(3, 7) * mask, mask, torch.arange(3), torch.arange(3))
    parts = [whole.part(place, 4) for place in range(4)]
    assert {part.mask.shape for part in parts} == {(3, 2)}
    together = replace(
        whole,
        indices=torch.cat([part.indices for part in parts], dim=1)[:, :7],
        mask=torch.cat([part.mask for part in parts], dim=1)[:, :7],
    )
    assert torch.equal(together.indices, whole.indices)
    assert torch.equal(together.mask, whole.mask)
    assert not parts[-1].mask[:, 1:].any()
