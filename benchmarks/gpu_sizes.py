"""The sizes that benchmarks/on_gpu.py measures at, and those of a trial of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "head": {"name": "head"},
    "bias": {"name": "bias"},
    "prompt": {"name": "prompt", "tokens": 10, "dropout": 0.1},
    "adapter": {"name": "adapter", "bottleneck": 96},
    "lora": {"name": "lora", "rank": 8, "targets": ["qkv", "proj", "fc1", "fc2"]},
}
TINY = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


@dataclass(frozen=True)
class Sizes:
    image: int = 224
    batch: int = 64
    steps: int = 2
    """Local steps of a client in a measured round."""
    cohort: int = 8
    gemm: int = 8192
    seconds: float = 2.0
    """The length of a measurement."""
    base: dict[str, Any] = field(default_factory=lambda: {"name": "vit_base_patch16_224"})
    small: dict[str, Any] = field(default_factory=lambda: {"name": "vit_tiny_patch16_224"})
    exact_batch: int = 8
    exact_lanes: tuple[int, ...] = (3, 8)
    many_lanes: int = 16
    many_batch: int = 16
    cell_samples: int = 781
    """Samples of a client: CIFAR-100's 50,000 over 64 clients."""
    cell_tests: int = 2048
    """Test images that the evaluation is measured on; CIFAR-100 has 10,000."""

    def tree(self, method: dict[str, Any], backbone: dict[str, Any], device: str, **runtime: Any) -> dict[str, Any]:
        """A config on random images, with a window of one pool for each client."""
        return {
            "backbone": {"pretrained": False, **backbone},
            "method": method,
            "data": {
                "name": "synthetic",
                "image_size": self.image,
                "num_train": max(256, 2 * self.batch),
                "num_test": 8,
                "clients": 64,
                "partition": {"name": "pool", "samples": self.batch},
            },
            "federation": {"rounds": 1000, "cohort": self.cohort, "evaluate_every": 0},
            "client": {"steps": self.steps, "batch_size": self.batch},
            "runtime": {"device": device, **runtime},
        }


FULL = Sizes()
SMALL = Sizes(
    image=32,
    batch=4,
    steps=1,
    cohort=2,
    gemm=128,
    seconds=0.01,
    base={"name": "vit_base_patch16_224", "model_args": TINY},
    small={"name": "vit_tiny_patch16_224", "model_args": TINY},
    exact_batch=2,
    exact_lanes=(3,),
    many_lanes=4,
    many_batch=2,
    cell_samples=8,
    cell_tests=8,
)
