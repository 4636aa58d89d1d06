"""`runtime.compile`: one compilation for all blocks, none in later rounds, and results as exact as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.methods.compiled import compile_blocks, repeated_blocks
from fedpeft_dist.training.schedule import ClientTask
from tests.tiny import tiny_tree, tiny_vit
from tests.warm_process import WarmRanks

from .cases import METHODS, make_runtime

DROPOUT = {"name": "lora", "targets": ["qkv", "fc2"], "dropout": 0.2}
SECTIONS = {"lora with dropout": DROPOUT, **METHODS}
QUICK = ("bias", "lora with dropout")
"""The others take 10 to 35 seconds each, where PyTorch has not compiled them before."""


def tree_of(method: dict[str, Any], *, is_compiled: bool = True, **sections: Any) -> dict[str, Any]:
    runtime = {"device": "cpu", "precision": "fp32", "lanes": 2, "compile": is_compiled}
    data = {"name": "synthetic", "image_size": 16, "clients": 4, "partition": {"name": "iid"}, "num_train": 64}
    return tiny_tree(backbone=tiny_vit(depth=3), method=method, runtime=runtime, data=data, **sections)


def deltas_of(method: dict[str, Any], *, is_compiled: bool) -> list[torch.Tensor]:
    """The clients' updates of a round with more clients than lanes, and of clients of unequal length."""
    simulation = build_simulation(parse_config(tree_of(method, is_compiled=is_compiled), "test"), make_runtime())
    samples = torch.arange(20)
    tasks = [ClientTask(client, samples, steps, 20) for client, steps in enumerate((3, 1, 2))]
    start = simulation.start(simulation.aggregation(simulation.initial_state()))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    deltas = [update.delta for _ in range(2) for update in simulation.trainer.train(tasks, start)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled, "a round compiles anew"
    return deltas


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in SECTIONS if m != "full"]
)
def test_a_compiled_block_serves_all_blocks_and_rounds(method: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = deltas_of(SECTIONS[method], is_compiled=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, "the blocks share a graph, but LoRA gives the first one an input without a gradient"
    assert (graphs == 0) == (method == "head"), "head trains nothing in the blocks or in front of them"
    plain = deltas_of(SECTIONS[method], is_compiled=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for found, expected in zip(compiled, plain, strict=True):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "head"}, [False, False, False]),
        ({"name": "bias"}, [True, True, True]),
        ({"name": "lora", "blocks": 1}, [False, False, True]),
        ({"name": "lora", "blocks": [1]}, [False, True, True]),
        ({"name": "prompt", "depth": "shallow"}, [True, True, True]),
        ({"name": "prompt", "depth": "shallow", "blocks": 2}, [True, True]),  # the first is not repeated
    ],
)
def test_blocks_are_compiled_from_the_first_trained_one_on(method: dict[str, Any], expected: list[bool]) -> None:
    model = build_lane_model(parse_config(tree_of(method), "test"), num_classes=2).backbone.model
    blocks = repeated_blocks(model)
    compile_blocks(model)
    assert [block._compiled_call_impl is not None for block in blocks] == expected


def test_the_innermost_repeated_blocks_are_found() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))})

    stages = nn.Sequential(*(nn.ModuleDict({"blocks": nn.Sequential(block(), block())}) for _ in range(2)))
    expected = [own for stage in stages for own in stage["blocks"]]
    assert repeated_blocks(nn.ModuleDict({"stages": stages, "head": nn.Linear(2, 2)})) == expected
    assert repeated_blocks(nn.Sequential(block(), nn.Linear(2, 2))) == []


def weights_of(folder: Path, name: str, num_ranks: int, rounds: int) -> str:
    arguments = (f"output.name={name}", f"federation.rounds={rounds}")
    with WarmRanks(num_ranks, folder, "train", "config.yaml", *arguments) as ranks:
        assert all(rank.returncode == 0 for rank in ranks.finish()), ranks.output
    return json.loads((folder / "runs" / name / "summary.json").read_text())["weights_sha256"]


def test_compiled_runs_are_equal_on_one_and_two_ranks_and_when_they_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree_of(DROPOUT)))
    expected = weights_of(tmp_path, "one", num_ranks=1, rounds=3)
    assert weights_of(tmp_path, "two", num_ranks=2, rounds=2) != expected
    assert weights_of(tmp_path, "two", num_ranks=2, rounds=3) == expected
