"""How images are normalised for a backbone, and a warning if a checkpoint's publisher normalises them differently."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import constants

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, for images scaled to 0 .. 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def for_channels(self, channels: int) -> "Normalization":
        """This normalization for a number of channels: the average of all channels if the numbers differ."""
        return Normalization(*(v if len(v) == channels else (sum(v) / len(v),) * channels for v in map(tuple, self)))


IMAGENET = Normalization(constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
HALF = Normalization(constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)
CLIP = Normalization(constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD)

# Files beside the weights in which publishers state the normalization, and the keys of mean and std.
NEIGHBOURS = {"preprocessor_config.json": ("image_mean", "image_std"), "config.json": ("mean", "std")}

# Words of a file's name that show its publisher.
FILES = (
    (r"mae|moco|dino(v[123])?|ibot|deit3?|swin(v2)?|convnext(v2)?|resnet\d*", IMAGENET),
    (r"clip|openclip", CLIP),
    (r"augreg|siglip2?", HALF),
)
# Parts of a tensor's name that show its publisher.
TENSORS = (
    (r"(^|/)(module\.)?(decoder_embed|decoder_blocks|base_encoder|momentum_encoder|encoder_[qk])\.", IMAGENET),
    (r"(^|/)(teacher|student)/", IMAGENET),
    (r"(^|/|\.)(visual\.class_embedding|vision_model\.embeddings\.class_embedding)$", CLIP),
)


def normalization_of(config: BackboneConfig, pretrained_cfg: Mapping[str, Any], channels: int) -> Normalization:
    """The config's normalization, or that of the pre-training that the model's name stands for.

    Raises:
        ConfigError: the config gives another number of channels than the model has.
    """
    if config.mean is None or config.std is None:
        return Normalization(pretrained_cfg["mean"], pretrained_cfg["std"]).for_channels(channels)
    for key, values in (("mean", config.mean), ("std", config.std)):
        if len(values) != channels:
            raise ConfigError(f"backbone.{key}: {list(values)} for a backbone of {channels} channels; give {channels}")
    return Normalization(config.mean, config.std)


def warn_of_origin(path: Path, names: Iterable[str], used: Normalization, backbone: str) -> str:
    """A warning if a checkpoint's publisher seems to normalise images differently; empty if not.

    Args:
        names: the names of the file's tensors, from `tensor_names`.
        used: the normalization that belongs to the backbone's name.
    """
    sign, published = next(_signs(path, names), ("", used))
    published = published.for_channels(len(used.mean))
    if published == used:
        return ""
    return (
        f"backbone.checkpoint: '{path}' seems to want images of mean {list(published.mean)} and std "
        f"{list(published.std)} ({sign}); those of {backbone!r} are in use, {list(used.mean)} and "
        f"{list(used.std)}; give backbone.mean and backbone.std"
    )


def _signs(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Normalization]]:
    """The signs of a checkpoint's origin and the publisher's normalization, the surest sign first."""
    for file, keys in NEIGHBOURS.items():
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # most folders have no such file
            tree = json.loads(path.with_name(file).read_text(encoding="utf-8"))
            tree = tree.get("pretrained_cfg", tree)
            yield f"{file} beside it", Normalization(*(tuple(map(float, tree[key])) for key in keys))
    for name, (pattern, values) in product(names, TENSORS):
        if re.search(pattern, name):
            yield f"its tensor {name!r}", values
    for (pattern, values), word in product(FILES, re.split(r"[^a-z0-9]+", path.name.lower())):
        if re.fullmatch(pattern, word):
            yield f"{word!r} in its name", values


def tensor_names(stored: Mapping[Any, Any], place: str = "") -> Iterable[str]:
    """The names of a file's tensors, each after the names of the dictionaries that hold it."""
    for name, value in stored.items():
        if isinstance(value, Mapping):
            yield from tensor_names(value, f"{place}{name}/")
        elif hasattr(value, "shape"):
            yield f"{place}{name}"
