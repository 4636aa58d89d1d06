"""Run by test_exactness.py on each rank: every case once, in one process group, because start-up is expensive.

Prints nothing; writes {case: {weights_sha256, world_size, refills, stochastic, chunks}} to the path given, from rank 0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.config.trees import merge_trees
from fedpeft_dist.federation.run import run
from fedpeft_dist.lanes.dropout import KeyedDropout, KeyedDropPath
from fedpeft_dist.methods.cut import SuffixModel
from fedpeft_dist.runtime import process
from fedpeft_dist.training.schedule import Schedule
from tests.tiny import tiny_vit

VIT = tiny_vit(depth=2, proj_drop_rate=0.1, drop_path_rate=0.1)
METHODS = {
    "full": {"name": "full"},
    "head": {"name": "head"},
    "bias": {"name": "bias"},
    "norm": {"name": "norm"},
    "prompt": {"name": "prompt", "tokens": 3, "dropout": 0.2},
    "adapter": {"name": "adapter", "bottleneck": 7},
    "lora": {"name": "lora", "rank": 3, "targets": ["qkv", "fc2"], "dropout": 0.1},
    "partial": {"name": "partial"},
    "adaptformer": {"name": "adaptformer", "bottleneck": 7},
    "houlsby": {"name": "houlsby", "bottleneck": 5},
    "repadapter": {"name": "repadapter", "bottleneck": 6},
    "diffit": {"name": "diffit"},
    "convpass": {"name": "convpass", "bottleneck": 3},
    "prefix": {"name": "prefix", "tokens": 3},
    "lora-parts": {"name": "lora", "rank": 3, "targets": ["q", "v"], "ranks": {"v": 2}, "dropout": 0.1},
    "ssf": {"name": "ssf"},
    "ia3": {"name": "ia3"},
    "dora": {"name": "dora", "rank": 3, "targets": ["qkv", "fc2"], "dropout": 0.1},
    "vera": {"name": "vera", "rank": 9, "dropout": 0.1},
    "fact_tt": {"name": "fact_tt", "rank": 3, "dropout": 0.1},
    "fact_tk": {"name": "fact_tk", "rank": 5},
}
# Position MLPs on a table of coordinates, with dropout of their own; activations that round by place, convolutions.
RELPOS = {"name": "test_vit_relpos", "pretrained": False, "model_args": {"depth": 2, "drop_path_rate": 0.1}}
EFFICIENT = {"name": "test_efficientnet", "pretrained": False}
PLAIN_SGD = {"name": "sgd", "momentum": 0.0, "nesterov": False}
ALGORITHMS = {
    "scaffold": {"algorithm": {"name": "scaffold"}, "client": {"optimizer": PLAIN_SGD}},
    "trimmed_mean": {"algorithm": {"name": "trimmed_mean"}},
    "median": {"algorithm": {"name": "median"}},
    "fedprox": {"algorithm": {"name": "fedprox", "mu": 0.5}},
}
"""The sections that choose an algorithm."""
CASES = {name: (VIT, method, {}) for name, method in METHODS.items()} | {
    "relpos-head": (RELPOS, METHODS["head"], {}),
    "efficientnet-head": (EFFICIENT, METHODS["head"], {}),
}
CASES |= {name: (VIT, METHODS["bias"], sections) for name, sections in ALGORITHMS.items()}
KEPT_PREFIX = {"data": {"augment": "none"}, "runtime": {"cache": 10**7}}
"""The sections under which features of the frozen prefix are kept."""
CASES |= {
    "efficientnet-head-kept": (EFFICIENT, METHODS["head"], KEPT_PREFIX),
    # Only the last block drops paths, so the prefix has no dropout.
    "partial-kept": (tiny_vit(depth=2, drop_path_rate=0.1), METHODS["partial"], KEPT_PREFIX),
}
INT8 = {"runtime": {"sharding": {"quantize": "int8"}}}
CASES |= {f"{name}-int8": (VIT, METHODS[name], INT8) for name in ("bias", "lora")}
BATCH, LANES, COHORT = 7, 3, 7


def make_config(method: dict, output: Path, name: str, backbone: dict = VIT) -> dict:
    """Clients from below one batch to five batches, two rounds, dropout and drop-path on, five tokens."""
    return {
        "seed": 5,
        "backbone": backbone,
        "method": method,
        "data": {
            "name": "synthetic",  # importing what digits come from takes each process two seconds
            "num_train": 400,
            "num_test": 500,
            "classes": 10,
            "image_size": 16,
            "max_train": 300,
            "clients": 12,
            "augment": "crop_flip",
            "crop_padding": 2,
            "partition": {"name": "dirichlet", "alpha": 0.3, "min_samples": 3},
        },
        "federation": {"rounds": 2, "cohort": COHORT},
        "client": {"epochs": 1, "batch_size": BATCH},
        "runtime": {"device": "cpu", "lanes": LANES},
        "output": {"root": str(output), "name": name},
    }


def main() -> None:
    output, precisions = Path(sys.argv[1]), sys.argv[2].split(",")
    refills, stochastic, chunks = _count_refills(), _count_stochastic_calls(), _count_chunks()
    results = {}
    with process.start(RuntimeConfig(device="cpu")) as runtime:
        for precision in precisions:
            for case, (backbone, method, sections) in CASES.items():
                name = f"{case}-{precision}-{runtime.world_size}"
                config = parse_config(merge_trees(make_config(method, output, name, backbone), sections), "test")
                refills[0] = stochastic[0] = chunks[0] = 0
                run(config, runtime=replace(runtime, precision=precision))
                if runtime.is_main:
                    summary = json.loads((output / name / "summary.json").read_text())
                    results[f"{case}-{precision}"] = {
                        "weights_sha256": summary["weights_sha256"],
                        "world_size": summary["world_size"],
                        "refills": refills[0],
                        "stochastic": stochastic[0],
                        "chunks": chunks[0],
                    }
    if runtime.is_main:
        (output / f"results-{runtime.world_size}.json").write_text(json.dumps(results))


def _count_refills() -> list[int]:
    """Counts the clients that are loaded into a lane while another lane is in the middle of one."""
    counter = [0]
    passes = Schedule.passes

    def counting(*arguments):
        for number, one in enumerate(passes(*arguments)):
            if number:
                counter[0] += len(one.starting)
            yield one

    Schedule.passes = counting
    return counter


def _count_chunks() -> list[int]:
    """Counts the chunks of training images whose features are computed to be kept."""
    counter = [0]
    prefix = SuffixModel.prefix

    def counting(model, images):
        counter[0] += images.shape[:2] == (1, LANES * BATCH)
        return prefix(model, images)

    SuffixModel.prefix = counting
    return counter


def _count_stochastic_calls() -> list[int]:
    counter = [0]
    for module in (KeyedDropout, KeyedDropPath):

        def counting(self, x, forward=module.forward):
            counter[0] += self.keys.rows is not None
            return forward(self, x)

        module.forward = counting
    return counter
