"""The mean and standard deviation that a checkpoint's publisher normalises images with, where its origin shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)


class Normalization(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, for images scaled to 0 .. 1."""


IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF = Normalization(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
CLIP = Normalization(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

# Files in which publishers say it, beside the weights: the keys of mean and std.
NEIGHBOURS = {"preprocessor_config.json": ("image_mean", "image_std"), "config.json": ("mean", "std")}

# A word of a file's name.
FILES = (
    (r"mae|moco|dino(v[123])?|ibot|deit3?|swin(v2)?|convnext(v2)?|resnet\d*", IMAGENET),
    (r"clip|openclip", CLIP),
    (r"augreg|siglip2?", HALF),
)
# A part of a tensor's name.
TENSORS = (
    (r"(^|/)(module\.)?(decoder_embed|decoder_blocks|base_encoder|momentum_encoder|encoder_[qk])\.", IMAGENET),
    (r"(^|/)(teacher|student)/", IMAGENET),
    (r"(^|/|\.)(visual\.class_embedding|vision_model\.embeddings\.class_embedding)$", CLIP),
)


def published_normalization(path: Path, names: Iterable[str]) -> tuple[str, Normalization] | None:
    """What shows a checkpoint's origin, and how its publisher normalises; None where nothing does.

    Args:
        names: of the file's tensors, behind the names of the dictionaries that hold them.
    """
    for file, keys in NEIGHBOURS.items():
        found = _read_neighbour(path.with_name(file), keys)
        if found is not None:
            return f"{file} beside it", found
    for name in names:
        for pattern, values in TENSORS:
            if re.search(pattern, name):
                return f"its tensor {name!r}", values
    words = re.split(r"[^a-z0-9]+", path.name.lower())
    for pattern, values in FILES:
        for word in words:
            if re.fullmatch(pattern, word):
                return f"{word!r} in its name", values
    return None


def _read_neighbour(path: Path, keys: tuple[str, str]) -> Normalization | None:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
        tree = tree.get("pretrained_cfg", tree)
        mean, std = (tuple(float(value) for value in tree[key]) for key in keys)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # most folders have none
    return Normalization(mean, std)


def tensor_names(stored: Mapping[Any, Any], place: str = "") -> Iterable[str]:
    """Names of a file's tensors, behind the names of the dictionaries that hold them."""
    for name, value in stored.items():
        if isinstance(value, Mapping):
            yield from tensor_names(value, f"{place}{name}/")
        elif hasattr(value, "shape"):
            yield f"{place}{name}"
