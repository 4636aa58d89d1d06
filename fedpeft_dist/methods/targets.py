"""The linear layers of a block that `method.targets` names, and the queries, keys and values of a fused layer.

Shapes: L lanes, D inputs, E outputs, r rank.
"""

from collections.abc import Iterable, Sequence

import torch
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer, vision_transformer_relpos
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.methods.blocks import Scope

# The places of a target in a block: `proj` is the attention's, never the patch embedding's.
PLACES = {
    "qkv": ("attn.qkv", "token_mixer.qkv", "xca.qkv"),
    "q": ("attn.qkv", "attn.q_proj"),
    "k": ("attn.qkv", "attn.k_proj"),
    "v": ("attn.qkv", "attn.v_proj"),
    "proj": ("attn.proj", "token_mixer.proj", "xca.proj"),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
PARTS = ("q", "k", "v")
"""The thirds of a fused layer's outputs, in order."""
IN_THIRDS = (
    vision_transformer.Attention, eva.EvaAttention, eva.AttentionRope, beit.Attention,
    swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention, vision_transformer_relpos.RelPosAttention,
)  # fmt: skip
"""The attention layers whose qkv gives all queries, then all keys, then all values. Others order them by heads."""


def find_targets(
    backbone: Backbone, targets: Iterable[str], blocks: int | Sequence[int] | None
) -> dict[str, tuple[str, ...]]:
    """The targets in each linear layer that has any, by the layer's name: several only where they are parts of it.

    Raises:
        ConfigError: a target is in no layer, or is a part of a layer that is not in thirds.
    """
    model, found = backbone.model, {}
    kind, scope = type(model).__name__, Scope(model, blocks)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name in scope and layer not in backbone.shared_layers:
            found[name] = tuple(target for target in targets if is_place(name, target))
    for target in targets:
        if not any(target in own for own in found.values()):
            sought = f"{target!r} matches no linear layer ({' or '.join(PLACES[target])})"
            raise ConfigError(f"method.targets: {sought} in {kind}")
    for name, own in found.items():
        if parts_of(name, own) and type(model.get_submodule(name.rpartition(".")[0])) not in IN_THIRDS:
            raise ConfigError(
                f"method.targets: {own[0]!r} does not fit {kind}, whose {name} orders its outputs by heads"
            )
    return {name: own for name, own in found.items() if own}


def is_place(name: str, target: str) -> bool:
    """Whether the layer of this name is, or holds, the target."""
    return f".{name}".endswith(tuple(f".{place}" for place in PLACES[target]))


def parts_of(name: str, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets of a layer that are parts of it; empty if its target is the whole layer."""
    return tuple(target for target in targets if target in PARTS and name.endswith("qkv"))


def rows_of(part: str, outputs: int) -> slice:
    """The outputs of a fused layer that a part has."""
    third, index = outputs // 3, PARTS.index(part)
    return slice(index * third, (index + 1) * third)


def pad_part(matrix: torch.Tensor, part: str) -> torch.Tensor:
    """A part's own [..., E / 3, r] with zeros for the other parts: [..., E, r]."""
    third, index = matrix.shape[-2], PARTS.index(part)
    return nn.functional.pad(matrix, (0, 0, index * third, (2 - index) * third))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in another's place, and has the attention call it."""
    model.set_submodule(name, layer)
    attention = model.get_submodule(name.rpartition(".")[0])
    if name.endswith("qkv") and hasattr(attention, "qkv_bias_separate"):
        attention.qkv_bias_separate = True  # BEiT, EVA and SwinV2 would read the weight by themselves


def check_layers_are_called(model: nn.Module, layers: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: the model reads a layer's weight by itself, so peft could not replace the layer.
    """
    reads = any(getattr(module, "q_bias", None) is not None for module in model.modules())
    if reads and any(name.endswith("qkv") for name in layers):
        raise ConfigError(
            f"--format peft: {type(model).__name__} reads the weight of qkv itself and would pass peft's layer by; "
            "give --format timm or safetensors"
        )
