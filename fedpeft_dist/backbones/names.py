"""Names of backbones: timm's names, with or without a pre-training tag, and the embedded backbone's."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import timm

from fedpeft_dist.backbones.errors import one_line
from fedpeft_dist.config.errors import ConfigError

GLYPH_VIT = "glyph_vit"


def check_name(name: str) -> None:
    """Checks that a backbone of this name exists.

    Raises:
        ConfigError: timm has no such model, or no such pre-training of the model.
    """
    if name == GLYPH_VIT:
        return
    if not timm.is_model(name):
        names = [*timm.list_models(), GLYPH_VIT]
        near = difflib.get_close_matches(name.split(".")[0], names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"backbone.name: {name!r} is no timm model; {hint}")
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        known = names_with_weights(name)
        hint = f"; known: {', '.join(known)}" if known else ""
        raise ConfigError(f"backbone.name: {name!r}: {one_line(error).rstrip('.')}{hint}") from None


def names_with_weights(name: str) -> list[str]:
    """The names under which timm has weights of the same architecture."""
    return timm.list_models(name.partition(".")[0], pretrained=True)


def layers_in(pretrained_cfg: Mapping[str, Any], key: Literal["classifier", "first_conv"]) -> tuple[str, ...]:
    """Names of the classifier layers, or of the layers that take the image, from timm's config of a model."""
    names = pretrained_cfg.get(key)
    return (names,) if isinstance(names, str) else tuple(names or ())
