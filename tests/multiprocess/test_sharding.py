"""Frozen weights in parts: groups of two ranks, 1 x 2 and 2 x 2, train what a rank with the whole backbone trains."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import load_config, parse_config
from fedpeft_dist.config.schema import RuntimeConfig, ShardingConfig
from fedpeft_dist.config.trees import merge_trees
from fedpeft_dist.federation.run import run
from fedpeft_dist.federation.setup import evaluate_run
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.mesh import spread
from fedpeft_dist.tracking.run_directory import RunDirectory
from tests.multiprocess import sharding_worker
from tests.multiprocess.sharded_kills import run_trials
from tests.multiprocess.sharding_worker import SMALL, make_config, name_of
from tests.tiny import tiny_vit
from tests.warm_process import WarmRanks

WHOLE = ["bias:fp32", "lora:fp32", "adapter:bf16", "prompt:bf16", "vera:fp32", "bias:fp32-int8", "lora:bf16-int8"]
REST = [
    *("bias:bf16", "lora:bf16", "adapter:fp32", "prompt:fp32", "partial:fp32", "norm:bf16", "scaffold:fp32"),
    *("adapter:fp32-int8", "prompt:bf16-int8"),
]
"""Run by --slow alone."""
SHARDED = {
    2: [
        "bias:fp32:2:split:none",
        "adapter:bf16:2:split:cpu",
        "bias:fp32:2:shared:none",
        "bias:fp32:2:split:none:first",
        "vera:fp32:2:split:none",  # its blocks share frozen matrices
        "bias:fp32-int8:2:split:none:first",
        "lora:bf16-int8:2:split:cpu",
    ],
    4: [
        "lora:fp32:2:split:none",
        "prompt:bf16:2:split:none",
        "lora:fp32:2:shared:none",
        "bias:fp32:4:split:none:second",
        "bias:fp32-int8:4:split:none:second",
    ],
}
"""By ranks; a run begins on 2 ranks and goes on with groups of 4."""
EQUAL = [(ranks, case) for ranks, own in SHARDED.items() for case in own if not case.endswith(":first")]
LAYOUTS = [(ranks, f"2:{lanes}:none") for ranks in (2, 4) for lanes in ("split", "shared")]


class Runs:
    """The runs of all cases so far. A launch runs its cases one after another."""

    def __init__(self, folder: Path):
        self.folder = folder

    def launch(self, num_ranks: int, cases: list[str]) -> None:
        with WarmRanks(num_ranks, self.folder, str(self.folder), ",".join(cases), main=sharding_worker.main) as warm:
            assert [done.returncode for done in warm.finish(500)] == [0] * num_ranks, warm.output[-4000:]

    def summary(self, num_ranks: int, case: str) -> dict:
        summary = json.loads((self.folder / name_of(case, num_ranks) / "summary.json").read_text())
        assert summary["world_size"] == num_ranks
        return summary

    def weights(self, num_ranks: int, case: str) -> dict:
        return load_file(self.folder / name_of(case, num_ranks) / "trainable.safetensors")

    def rounds(self, num_ranks: int, case: str) -> list[dict]:
        lines = (self.folder / name_of(case, num_ranks) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@cache
def _launched(folder: Path) -> Runs:
    runs = Runs(folder)
    runs.launch(1, [whole(case) for case in WHOLE])
    for num_ranks, cases in SHARDED.items():
        runs.launch(num_ranks, cases)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return _launched(tmp_path_factory.mktemp("sharding"))


def whole(case: str) -> str:
    """The case without sharding."""
    return ":".join(case.split(":")[:2]) + ":1:split:none"


def check(runs: Runs, num_ranks: int, case: str) -> None:
    """split gives the bits of the run without sharding. shared adds in another order."""
    if ":split:" in case:
        keys = (num_ranks, case), (1, whole(case))
        assert len({runs.summary(*key)["weights_sha256"] for key in keys}) == 1
        return
    # In bf16, each rank rounds its own part of a gradient to 8 bits before the parts are added.
    tolerance = 1e-6 if ":fp32" in case else 2.0**-7
    for name, expected in runs.weights(1, whole(case)).items():
        difference = (runs.weights(num_ranks, case)[name] - expected).norm()
        assert difference <= tolerance * expected.norm(), name


@pytest.mark.parametrize(("num_ranks", "case"), EQUAL)
def test_groups_train_what_a_rank_with_all_weights_trains(runs, num_ranks, case):
    check(runs, num_ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS)
def test_every_method_and_precision(tmp_path, num_ranks, layout):
    private = ["private:fp32"] * ("split" in layout)  # gradients of single samples are not shared
    runs, cases = Runs(tmp_path), [f"{case}:{layout}" for case in WHOLE + REST + private]
    runs.launch(1, [whole(case) for case in cases])
    runs.launch(num_ranks, cases)
    for case in cases:
        check(runs, num_ranks, case)


def test_ragged_ranks_stay_in_step_by_empty_passes(runs):
    """The longest client has more steps than all clients of the other rank. The log tells what waiting cost."""
    case = "bias:fp32:2:split:none"
    assert all(0 < round_["padded_passes"] < round_["passes"] for round_ in runs.rounds(2, case))
    assert all("padded_passes" not in round_ for round_ in runs.rounds(1, whole(case)))
    assert {round_["padded_batches"] for round_ in runs.rounds(2, case)} == {1}, "5 batches on 2 ranks"
    together = runs.rounds(2, "bias:fp32:2:shared:none")
    assert {round_["padded_passes"] for round_ in together} == {0}, "ranks with the same lanes have the same passes"


def test_a_rank_keeps_its_part_of_the_8_bit_weights(runs):
    """A quarter of the bytes of float32, which the ranks of a group share evenly."""
    plain = runs.summary(2, "bias:fp32:2:split:none")["sharding"]
    for ranks, case in ((2, "lora:bf16-int8:2:split:cpu"), (4, "bias:fp32-int8:4:split:none:second")):
        figures = runs.summary(ranks, case)["sharding"]
        assert figures["weight_bytes"] == plain["weight_bytes"] / 4 > 0
        assert figures["rank_bytes"] == figures["weight_bytes"] / figures["size"]


def test_evaluation_gives_the_same_accuracy(runs):
    for num_ranks, case in ((2, "bias:fp32:2:split:none"), (4, "prompt:bf16:2:split:none")):
        accuracies = [[r["accuracy"] for r in runs.rounds(*own)] for own in ((num_ranks, case), (1, whole(case)))]
        assert accuracies[0] == accuracies[1]


def offload_to_files(folder: Path, quantize: str) -> dict:
    """The summary of a run whose only rank keeps parts in files, after one whose rank has all weights."""
    sharding, summaries = {"offload": "nvme", "nvme_path": str(folder / "parts")}, []
    for name, own in (("whole", {}), ("files", sharding)):
        tree = make_config({"name": "bias"}, folder, name, tiny_vit(depth=2, embed_dim=512))
        tree = merge_trees(merge_trees(tree, SMALL), {"runtime": {"sharding": {**own, "quantize": quantize}}})
        with process.start(RuntimeConfig(device="cpu")) as runtime:
            run(parse_config(tree, "test"), runtime=runtime)
        summaries.append(json.loads((folder / name / "summary.json").read_text()))
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    return summaries[1]["sharding"]


def test_parts_in_files_need_libaio(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose: False)
    config = ShardingConfig(offload="nvme", nvme_path=str(tmp_path))
    with process.start(RuntimeConfig(device="cpu")) as runtime:
        with pytest.raises(ConfigError, match="'nvme' needs libaio with its headers"), spread(runtime, config):
            pass


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/include/libaio.h").is_file(), reason="needs libaio with its headers")
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_parts_in_files(tmp_path, quantize):
    """A matrix of less than 1 MiB would stay in memory. DeepSpeed's reader is compiled at the first use."""
    assert offload_to_files(tmp_path, quantize)["weight_bytes"] == 2 * 12 * 512**2 * (4 if quantize == "none" else 1)


@pytest.mark.slow
def test_a_lost_rank_ends_its_group_and_the_run_goes_on_with_other_groups(tmp_path):
    assert run_trials(count=1, seed=3, folder=tmp_path, rounds=8) == 1


@pytest.mark.parametrize("overrides", [[], ["runtime.sharding={size: 1, lanes: split, offload: cpu}"]])
def test_one_rank_evaluates_what_a_group_has_trained(runs, overrides):
    """With all weights, or with parts in the machine's memory that are gathered block by block."""
    case = "bias:fp32:2:shared:none"
    directory = RunDirectory(runs.folder / name_of(case, 2))
    config = load_config(directory.config_file, overrides)
    with process.start(config.runtime) as runtime:
        assert evaluate_run(config, directory, runtime)["accuracy"] == runs.rounds(2, case)[-1]["accuracy"]
