"""weights_sha256 does not depend on the number of ranks: 1, 2 and 4 gloo processes, every method, fp32 and bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.runtime import process
from tests.multiprocess import exactness_worker
from tests.multiprocess.exactness_worker import BATCH, CASES, METHODS, make_config
from tests.warm_process import WarmRanks


def run_worker(output: Path, num_ranks: int, precisions: str) -> dict:
    """All cases on so many ranks; one launch."""
    output.mkdir(parents=True, exist_ok=True)
    with WarmRanks(num_ranks, output, str(output), precisions, main=exactness_worker.main) as warm:
        assert [done.returncode for done in warm.finish(500)] == [0] * num_ranks, warm.output[-4000:]
    return json.loads((output / f"results-{num_ranks}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    output = tmp_path_factory.mktemp("exactness")
    return {ranks: run_worker(output, ranks, "fp32,bf16") for ranks in (1, 2, 4)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_on_1_2_and_4_ranks(results, case, precision):
    case = f"{case}-{precision}"
    assert [results[ranks][case]["world_size"] for ranks in (1, 2, 4)] == [1, 2, 4]
    assert len({results[ranks][case]["weights_sha256"] for ranks in (1, 2, 4)}) == 1
    assert results[1][case]["refills"] > 0, "7 clients on 3 lanes must refill lanes"
    assert results[1][case]["stochastic"] > 0 or case.startswith("efficientnet"), "dropout must be on"
    assert (results[1][case]["chunks"] > 0) == ("kept" in case), "features must be kept where they can be"


def test_cases_differ_from_each_other(results):
    """Each method and precision trains something of its own; otherwise equality would prove nothing."""
    hashes = [case["weights_sha256"] for case in results[1].values()]
    assert len(set(hashes)) == len(hashes) == 2 * len(CASES)


def test_a_second_run_is_equal(results, tmp_path):
    again = run_worker(tmp_path, 1, "fp32,bf16")
    assert again.keys() == results[1].keys()
    for case, result in again.items():
        assert result["weights_sha256"] == results[1][case]["weights_sha256"]


def test_clients_are_as_ragged_as_the_comparison_needs(tmp_path):
    """Clients hold from less than one batch to five batches, and an image has an odd number of tokens."""
    config = parse_config(make_config(METHODS["bias"], tmp_path, "none"), "test")
    with process.start(RuntimeConfig(device="cpu")) as runtime:
        setup = Setup(config, runtime)
    sizes = [setup.partition.size(client) for client in range(12)]
    assert min(sizes) < BATCH
    assert max(sizes) > 4 * BATCH
    assert setup.model.backbone.model.pos_embed.shape[1] % 2 == 1
