"""The plan ahead of a run: its memory against a real step's tensors, its balance against the real schedule."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.balance import balance_of, count_passes
from fedpeft_dist.federation.fit import Plan, compute_fit
from fedpeft_dist.federation.footprint import Outline
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.lanes.quantized import QuantizedLinear
from fedpeft_dist.runtime import process
from fedpeft_dist.training.batches import EpochBatches
from fedpeft_dist.training.lane_count import LiveTensors
from fedpeft_dist.training.schedule import ClientTask, Schedule
from tests.tiny import tiny_tree, tiny_vit

LANES, BATCH = 3, 6


def make_config(
    method: dict[str, Any], runtime: dict[str, Any] | None = None, depth: int = 3, **sections: Any
) -> RunConfig:
    """Clients of one batch on a small ViT, on the CPU."""
    own = {"lanes": LANES, "cache": "none", "precision": "fp32", "evaluate_batch": 16, **(runtime or {})}
    data = {"image_size": 32, "num_train": 48, "num_test": 4, "clients": 8, "partition": {"name": "iid"}}
    tree = tiny_tree(backbone=tiny_vit(depth=depth, embed_dim=64), method=method, runtime=own, data=data, **sections)
    return parse_config(tree, "test")


@pytest.mark.parametrize(
    ("method", "runtime"),
    [
        ({"name": "bias"}, {}),
        ({"name": "lora", "targets": ["qkv", "fc2"]}, {"precision": "bf16"}),
        ({"name": "adapter"}, {"sharding": {"quantize": "int8"}}),
        ({"name": "full"}, {"products": "torch"}),
    ],
    ids=["bias", "lora-bf16", "adapter-int8", "full"],
)
def test_a_steps_memory_is_that_of_real_tensors(method: dict[str, Any], runtime: dict[str, Any]) -> None:
    config = make_config(method, runtime, client={"batch_size": BATCH})
    foreseen = Outline(config, config.data.classes, config.runtime.precision, is_cuda=False).measure(LANES, BATCH)
    with process.start(config.runtime) as here:
        simulation = build_simulation(config, here)
        trainer, setup = simulation.trainer, simulation.setup
        state = simulation.initial_state()
        tasks = [ClientTask(client, torch.arange(BATCH), num_steps=2, weight=BATCH) for client in range(LANES)]
        with LiveTensors() as tensors:
            for _ in trainer.train(tasks, simulation.start(simulation.aggregation(state))):
                pass
        with LiveTensors() as evaluation:
            setup.test_evaluator.accuracy(state.vector)
        kept = [trainer.rule.theta, trainer.rule.rows.low, trainer.rule.rows._grad, trainer.optimizer.momentum]
        lanes = sum(matrix.nbytes for matrix in kept if matrix is not None)
        models = (setup.model.backbone.model, setup.model.backbone.plain, setup.test_evaluator.model)
        models = [getattr(model, "plain", model) for model in models if model is not setup.model]
        storages = {t.data_ptr(): t.nbytes for m in models for t in (*m.parameters(), *m.buffers())}
    row = 4 * setup.model.layout.width  # of the global vector, which counts as the server's
    assert foreseen.activations == pytest.approx(tensors.peak - row, rel=0.05)
    assert foreseen.lanes == pytest.approx(lanes, rel=0.01)
    assert foreseen.weights == pytest.approx(sum(storages.values()), rel=0.01)
    assert foreseen.evaluation == pytest.approx(max(evaluation.peak, 40 * setup.model.layout.num_parameters), rel=0.1)


def test_memory_is_linear_in_the_lanes() -> None:
    config = make_config({"name": "lora"}, {"precision": "bf16"})
    plan = Plan(config, 1, 1)
    for name, size in vars(plan.outline.measure(7, plan.batch_size)).items():
        assert getattr(plan.footprint(7), name) == pytest.approx(size, rel=0.01), name


@pytest.mark.parametrize("method", ["bias", "lora"])
def test_the_figures_of_other_ways_to_keep_the_weights_are_those_of_configs_that_keep_them_so(method: str) -> None:
    """Among them are the copies that evaluation merges where ranks have plain weights. LoRA's are large."""
    ways = {(1, "none"): {}, (2, "int8"): {"size": 2, "quantize": "int8"}}
    plans = {way: Plan(make_config({"name": method}, {"sharding": own}), 4, 1) for way, own in ways.items()}
    for way, other in (ways, reversed(ways)):
        found, expected = plans[other].option(*way), plans[way].option(*way)
        assert found.weights == pytest.approx(expected.weights, rel=0.001)
        assert (found.gathered, found.gathered_per_pass) == (expected.gathered, expected.gathered_per_pass)


def test_8_bit_weights_and_groups_are_counted_as_they_are() -> None:
    plan = Plan(make_config({"name": "bias"}, {"sharding": {"quantize": "int8"}}), 4, 1)
    model = plan.outline.model.backbone.model
    linears = [m for block in model.blocks for m in block.modules() if isinstance(m, QuantizedLinear)]
    whole, half = (plan.option(size, "int8") for size in (1, 2))
    matrices = sum(m.values.numel() for m in linears)
    assert plan.outline.weights_as("int8", is_sharded=True)[1].forward == matrices
    assert whole.weights - half.weights == matrices // 2
    assert half.gathered == 2 * matrices // 3
    assert half.gathered_per_pass == matrices  # half of them, forward and backward


@pytest.mark.parametrize("blocks", [None, 1])
def test_a_backward_pass_gathers_from_the_first_trained_block_on(blocks: int | None) -> None:
    plan = Plan(make_config({"name": "bias", "blocks": blocks}), 2, 1)
    _, own = plan.outline.weights_as("none", is_sharded=True)
    assert own.backward == (own.forward if blocks is None else own.largest)


def test_the_proposal_shards_only_where_it_must() -> None:
    config = make_config({"name": "bias"}, depth=6, federation={"cohort": 8})
    plan = Plan(config, 4, 1)
    assert plan.propose(plan.options()) == {
        "runtime.sharding.size": 1,
        "runtime.sharding.quantize": "none",
        "runtime.lanes": 2,
        "client.batch_size": config.client.batch_size,
        "runtime.evaluate_batch": 16,
    }
    one = plan.footprint(1)
    plan.memory = plan.option(2, "none").weights + plan.option(2, "none").gathered + one.server + plan.images
    plan.memory += int(one.step / 0.7) + 10
    sizes = [(option.size, option.lanes) for option in plan.options() if option.quantize == "none"]
    assert sizes[0] == (1, 0)
    assert sizes[1] == (2, 1)
    assert plan.propose(plan.options())["runtime.sharding.size"] == 2
    plan.memory -= one.step // 2 + 100_000
    assert 1 <= plan.propose(plan.options())["client.batch_size"] < config.client.batch_size
    plan.memory = plan.option(4, "int8").weights
    assert plan.propose(plan.options()) == {}
    plan.memory = plan.option(1, "none").weights + one.server + plan.images + int(one.evaluation / 0.7) - 1
    plan.few, plan.more = (replace(plan.few, activations=0, gradients=0, optimizer=0, parameters=p) for p in (2, 3))
    assert plan.propose([plan.option(1, "none")])["runtime.evaluate_batch"] == 15


@pytest.mark.parametrize("num_lanes", [1, 2, 5])
def test_passes_are_those_of_the_schedule(num_lanes: int) -> None:
    generator = random.Random(num_lanes)
    steps = {client: generator.randint(1, 9) for client in range(12)}
    tasks = [ClientTask(client, torch.arange(2), count, 2) for client, count in steps.items()]
    passes = list(Schedule(num_lanes, EpochBatches(2, seed=1), seed=1).passes(tasks, 0))
    assert count_passes(list(steps), steps, num_lanes) == len(passes)


class _Participation:
    """Rounds whose plan is given."""

    cohort = 5

    def plan(self, number: int) -> Any:
        return type("Plan", (), {"steps": {0: 8, 1: 4, 2: 3, 3: 2, 4: 1}})


def test_balance_by_hand() -> None:
    """On four ranks of one lane: 8, 4, 3 and 2 + 1 passes. The last three wait, and groups of two fill up."""
    config = make_config({"name": "bias"}, {"lanes": 1}, federation={"rounds": 3, "cohort": 5})
    found = balance_of(config, _Participation(), 4, 1)
    assert (found.rounds, found.passes, found.longest) == (3, 4.5, 8.0)
    assert found.idle_share == pytest.approx(1 - 18 / 32)
    assert found.empty_lanes == found.padded_share == 0.0
    two_lanes = balance_of(config, _Participation(), 2, 2)  # 8 beside 1; 4 beside 3 and 2
    assert two_lanes.empty_lanes == pytest.approx(1 - 18 / (2 * (8 + 5)))
    split = make_config({"name": "bias"}, {"sharding": {"size": 2}}, federation={"rounds": 3, "cohort": 5})
    assert balance_of(split, _Participation(), 4, 1).padded_share == pytest.approx(1 - 18 / (2 * 8 + 2 * 3))


def test_a_thousand_ranks_and_missing_data(tmp_path: Path) -> None:
    data = {"name": "cifar100", "root": str(tmp_path), "image_size": 32, "clients": 64, "partition": {"name": "iid"}}
    tree = tiny_tree(backbone=tiny_vit(img_size=32), federation={"rounds": 3, "cohort": 64}, runtime={"device": "auto"})
    fit = compute_fit(parse_config(tree | {"data": data}, "test"), 1024, 80)
    assert fit.clients_from == "no data set on this machine: a draw of 50,000 samples, equally many of each class"
    assert (fit.device, fit.precision, fit.needed_lanes, fit.ranks) == ("cuda", "bf16", 1, 1024)
    assert fit.balance.idle_share == pytest.approx(1 - 64 / 1024, abs=0.001)  # 64 ranks have a client
    assert fit.reduced_per_round == 8 * fit.trainable_parameters
    assert {option.size for option in fit.options} == {1, 2, 4, 8, 16, 32, 64}
    assert json.loads(json.dumps(asdict(fit)))["proposal"]["runtime.sharding.size"] == 1


def test_ranks_must_make_whole_groups() -> None:
    config = make_config({"name": "bias"}, {"sharding": {"size": 2}})
    with pytest.raises(ConfigError, match=r"--ranks 3: makes no whole groups of runtime.sharding.size: 2 ranks"):
        compute_fit(config, 3, 1)
