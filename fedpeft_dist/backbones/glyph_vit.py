"""The embedded backbone: a small vision transformer that travels with the package, for use without internet.

An ordinary timm VisionTransformer for 32 x 32 grey images with bright ink: 4 x 4 patches and a class
token make 17 tokens of width 128, through 6 blocks. `fedpeft_dist.pretrain` makes its weights;
docs/glyph_vit.md tells how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

WEIGHTS_FILE = Path(__file__).with_name("glyph_vit.safetensors")
IMAGE_SIZE = 32

TIMM_NAME = "vit_tiny_patch16_224"
"""A registered timm model that is this one when it is made with ARCHITECTURE."""
ARCHITECTURE: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "global_pool": "avg",
}

PRETRAINED_CFG: dict[str, Any] = {
    "architecture": "glyph_vit",
    "input_size": (1, IMAGE_SIZE, IMAGE_SIZE),
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.5,),
    "std": (0.5,),
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


def build_glyph_vit(
    num_classes: int,
    pretrained: bool,
    device: torch.device | str | None = None,
    **model_args: Any,
) -> VisionTransformer:
    """The backbone with a fresh head of `num_classes` outputs (0: none): [N, 1, 32, 32] -> [N, num_classes].

    `pretrained` loads the packaged weights into everything but the head. `model_args` go to timm's
    VisionTransformer and may override ARCHITECTURE. `device="meta"` builds without memory, and so without
    weights. Fresh parameters come from torch's generator: the caller forks and seeds it. Raises ValueError
    where `pretrained` meets the meta device, or a model that the packaged weights do not fit.
    """
    model = VisionTransformer(**{**ARCHITECTURE, **model_args}, num_classes=num_classes, device=device)
    model.pretrained_cfg = model.default_cfg = {**PRETRAINED_CFG, "num_classes": num_classes}
    if pretrained:
        _load_weights(model)
    return model


def _load_weights(model: VisionTransformer) -> None:
    if model.pos_embed.is_meta:
        raise ValueError("backbone.pretrained: the meta device holds no weights; build with pretrained=False")
    packaged = load_file(WEIGHTS_FILE)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    for name in sorted(own.keys() | packaged.keys()):
        mine, theirs = (tuple(side[name].shape) if name in side else "absent" for side in (own, packaged))
        if mine != theirs:
            raise ValueError(
                f"backbone.model_args: the packaged weights do not fit this model: {name} is {mine} here and "
                f"{theirs} in {WEIGHTS_FILE.name}; leave model_args empty or set backbone.pretrained to false"
            )
    model.load_state_dict(packaged, strict=False)  # only the head is missing, as checked above
