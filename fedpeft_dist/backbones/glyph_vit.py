"""The embedded backbone: a small vision transformer that comes with the package, for use without internet.

It is an ordinary timm VisionTransformer for grey 32 x 32 images with bright ink. 4 x 4 patches and a class token make
17 tokens of width 128, which pass 6 blocks. `fedpeft_dist.pretrain` makes the weights; docs/glyph_vit.md explains how.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

GLYPH_VIT = "glyph_vit"
"""The backbone's name in a config."""
WEIGHTS_FILE = Path(__file__).with_name("glyph_vit.safetensors")
IMAGE_SIZE = 32

TIMM_NAME = "vit_tiny_patch16_224"
"""A registered timm model that equals this one if it is made with ARCHITECTURE."""
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
    "architecture": GLYPH_VIT,
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
    num_classes: int, pretrained: bool, device: torch.device | str | None = None, **model_args: Any
) -> VisionTransformer:
    """The backbone with a fresh head: images [B, 1, 32, 32] to scores [B, num_classes].

    Fresh parameters come from torch's global generator, which the caller forks and seeds.

    Args:
        num_classes: outputs of the head; 0 builds no head.
        pretrained: load the packaged weights into everything but the head.
        device: "meta" builds without memory, and so without weights.
        model_args: arguments of timm's VisionTransformer, which may override ARCHITECTURE.

    Raises:
        ValueError: `pretrained` on the meta device, or with a model that the packaged weights do not fit.
    """
    model = VisionTransformer(**{**ARCHITECTURE, **model_args}, num_classes=num_classes, device=device)
    model.pretrained_cfg = model.default_cfg = {**PRETRAINED_CFG, "num_classes": num_classes}
    if not pretrained:
        return model
    if device is not None and torch.device(device).type == "meta":
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
    model.load_state_dict(packaged, strict=False)  # the check above allows only the head to be missing
    return model
