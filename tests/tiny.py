"""The ViT that is small enough for every test, and the config of a short run that trains it."""

from __future__ import annotations

from typing import Any

VIT_NAME = "vit_tiny_patch16_224"
VIT_ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
"""timm's arguments. An image of 16 x 16 has five tokens: an odd number, so no activation's size is a round number."""


def tiny_vit(**arguments: Any) -> dict[str, Any]:
    """The `backbone` section of a config, with the given model arguments in place of the usual ones."""
    return {"name": VIT_NAME, "pretrained": False, "model_args": VIT_ARGS | arguments}


def tiny_tree(**sections: Any) -> dict[str, Any]:
    """The config of a short run on random images. A given section replaces the usual section's keys one by one."""
    tree = {
        "backbone": tiny_vit(),
        "method": {"name": "head"},
        # "synthetic" is the data set that starts soonest: digits need an import of two seconds.
        "data": {"name": "synthetic", "image_size": 16, "clients": 4, "partition": {"name": "iid"}},
        "federation": {"rounds": 2, "cohort": 2},
        "client": {"epochs": 1, "batch_size": 32},
        "runtime": {"device": "cpu", "lanes": 2},
    }
    return tree | {name: tree[name] | keys if name in tree else keys for name, keys in sections.items()}
