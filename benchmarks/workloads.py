"""The six workloads that the speed figures are about, and the configs that run them. Imports nothing but Python itself.

Every model is a ViT on random 32 x 32 images in patches of 8, so a sequence has 17 tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

CLASSES, IMAGE_SIZE, PATCH_SIZE = 10, 32, 8
SGD = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1.0e-4}
LINEARS = ["qkv", "proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Workload:
    """A federation whose clients all have the same number of samples."""

    method: dict[str, Any]
    width: int = 128
    depth: int = 6
    heads: int = 4
    clients: int = 64
    samples: int = 64
    """Samples of each client."""
    cohort: int = 8
    batch: int = 16
    epochs: int = 2
    privacy: dict[str, Any] = field(default_factory=lambda: {"name": "none"})

    @property
    def large_batch(self) -> int:
        """The batch of a bare loop that trains one model on eight clients' batches at once."""
        return 8 * self.batch

    def backbone(self) -> dict[str, Any]:
        arguments = {"patch_size": PATCH_SIZE, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}
        return {"name": "vit_tiny_patch16_224", "pretrained": False, "model_args": arguments}

    def tree(self, **runtime: Any) -> dict[str, Any]:
        """The config. Its last round never comes, so no round is evaluated."""
        return {
            "backbone": self.backbone(),
            "method": self.method,
            "data": {
                "name": "synthetic",
                "image_size": IMAGE_SIZE,
                "classes": CLASSES,
                "num_train": self.clients * self.samples,
                "num_test": 1,
                "clients": self.clients,
                "partition": {"name": "iid"},
            },
            "federation": {"rounds": 1000, "cohort": self.cohort, "evaluate_every": 0},
            "client": {"epochs": self.epochs, "batch_size": self.batch, "optimizer": {"name": "sgd", **SGD}},
            "privacy": self.privacy,
            "runtime": {"device": "cpu", "precision": "fp32", **runtime},
        }

    def tiny(self) -> Workload:
        """A workload of the same kind that takes milliseconds, to see that a program works."""
        return replace(self, width=32, depth=2, heads=2, clients=4, samples=8, cohort=2, batch=4, epochs=1)


WORKLOADS = {
    "overhead": Workload({"name": "bias"}, 64, 2, 2, clients=100, samples=16, cohort=20, batch=8, epochs=1),
    "glyph": Workload({"name": "bias"}),
    "lora": Workload({"name": "lora", "rank": 8, "targets": LINEARS}),
    "head": Workload({"name": "head"}, epochs=10),
    "partial": Workload({"name": "partial", "blocks": 1}, epochs=10),
    "private": Workload({"name": "bias"}, privacy={"name": "sample", "noise_multiplier": 1.0}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt": {"dropout": 0.0},
    "adapter": {"bottleneck": 16},
    "lora": {"rank": 8, "targets": LINEARS},
    "adaptformer": {"bottleneck": 16},
    "houlsby": {"bottleneck": 16},
    "vera": {"rank": 48},
    "fact_tt": {"rank": 4},
    "fact_tk": {"rank": 8},
}
"""What these models give a method in place of its defaults, which suit a width of 768."""
FEW_METHODS = ("head", "bias", "norm", "prompt", "adapter", "lora", "full")
"""The methods of programs that need a process for each figure, unless others are asked for."""


def common_options(description: str, workloads: list[str] | None = None) -> argparse.ArgumentParser:
    """A parser with the options that the programs share.

    Args:
        workloads: those that the program takes by default; None leaves the option out.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--turns", type=int, default=5, help="turns of each contestant; figures are their medians")
    parser.add_argument("--seconds", type=float, default=1.0, help="the least length of a turn")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: to see that the program works")
    if workloads is not None:
        parser.add_argument("--workloads", nargs="+", default=workloads, choices=list(WORKLOADS))
    return parser


def chosen(name: str, options: argparse.Namespace) -> Workload:
    return WORKLOADS[name].tiny() if options.tiny else WORKLOADS[name]
