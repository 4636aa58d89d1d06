"""The evaluation against timm's own inference: images per second, in turns.

    python benchmarks/evaluation.py [--methods head bias ...] [--turns 5]

Both classify the same images in the same batches with two threads. timm's plain model gets images that are normalised
already and lie in memory as floats. The package starts from bytes, and merges or binds the trained parameters first.
The cache of the frozen prefix is off. The script prints one JSON object; a ratio is the package's speed over timm's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch
from contest import Contestant, claim_output, machine, race, ratio, serve
from ours import METHODS
from workloads import FEW_METHODS, WORKLOADS, common_options

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.runtime import process

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = common_options(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=FEW_METHODS, choices=list(METHODS))
    options = parser.parse_args()
    results = {}
    for method in options.methods:
        workload = {"method": METHODS[method], "images": 64 if options.tiny else 2048, "batch": 256}
        contestants = {
            side: Contestant("evaluation.py", {**workload, "side": side}, CORES) for side in ("package", "timm")
        }
        found = race(contestants, options.turns, options.seconds)
        results[method] = {"ratio": ratio(found, "package", "timm"), "images_per_second": found}
    print(json.dumps({"machine": machine(), "turns": options.turns, "methods": results}, indent=1))


def contender(method: dict, images: int, batch: int, side: str) -> Callable[[int], int]:
    """Evaluates all images so many times, and returns how many images that were."""
    tree = WORKLOADS["glyph"].tree(threads=CORES, evaluate_batch=batch, cache="none")
    tree["method"] = method
    tree["data"]["num_test"] = images
    config = parse_config(tree, "benchmark")
    with process.start(config.runtime) as runtime:
        setup = Setup(config, runtime)
    evaluate = package(setup) if side == "package" else timm_loop(setup, batch)

    def rounds(number: int) -> int:
        for _ in range(number):
            evaluate()
        return number * images

    return rounds


def package(setup: Setup) -> Callable[[], object]:
    return lambda: setup.test_evaluator.accuracy(setup.initial_vector)


def timm_loop(setup: Setup, batch: int) -> Callable[[], object]:
    own, test = setup.model.backbone, setup.dataset.test
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (own.mean, own.std))
    images, model = (test.images.float() / 255 - mean) / std, own.plain.eval()

    @torch.inference_mode()
    def evaluate() -> int:
        batches = zip(images.split(batch), test.labels.split(batch))
        return sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in batches)

    return evaluate


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        serve(claim_output(), contender(**json.loads(sys.argv[1])))
    else:
        main()
