"""The blocks of a backbone, which of them `method.blocks` names, and the layers in them that methods look for.

A model has a sequence of blocks if it holds them in `blocks`, as timm's plain transformers do. Models in stages, such
as Swin and ConvNeXt, have none.
"""

from collections.abc import Sequence

from torch import nn

from fedpeft_dist.config.errors import ConfigError

ATTRIBUTE = "blocks"
ATTENTIONS = ("attn", "factoratt_crpe", "token_mixer", "xca")
"""The names of a block's attention: in most transformers, CoaT, EfficientFormer and EdgeNeXt."""
MIXERS = ("attn", "conv_dw", "factoratt_crpe", "token_mixer", "xca")
"""The names of the part that mixes tokens in front of a block's MLP: an attention, or ConvNeXt's convolution."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in order; empty if it has no sequence of blocks."""
    blocks = getattr(model, ATTRIBUTE, None)
    is_sequence = isinstance(blocks, nn.Sequential | nn.ModuleList)
    # Stages are sequences themselves.
    return list(blocks) if is_sequence and not any(isinstance(block, nn.Sequential) for block in blocks) else []


def choose_blocks(model: nn.Module, chosen: int | Sequence[int]) -> list[int]:
    """The indices of the blocks that `method.blocks` names, in order.

    Raises:
        ConfigError: the model has no sequence of blocks, or no such block.
    """
    count, kind, given = len(blocks_of(model)), type(model).__name__, chosen
    if not count:
        raise ConfigError(f"method.blocks: {given} needs a backbone with a sequence of blocks, {kind} has none")
    if isinstance(chosen, int):
        if chosen > count:
            raise ConfigError(f"method.blocks: {given} is more than the {count} blocks of {kind}; give 1 to {count}")
        return list(range(count - chosen, count))
    for index in chosen:
        if not -count <= index < count:
            raise ConfigError(f"method.blocks: {kind} has no block {index}; give indices from {-count} to {count - 1}")
    return sorted({index % count for index in chosen})


class Scope:
    """The part of a model that a method trains: some blocks, and what comes after the last block if that is one.

    Args:
        chosen: `method.blocks`; None takes the whole model.

    Raises:
        ConfigError: as `choose_blocks` does.
    """

    def __init__(self, model: nn.Module, chosen: int | Sequence[int] | None):
        self.prefixes: tuple[str, ...] | None = None
        if chosen is None:
            return
        indices = choose_blocks(model, chosen)
        own = [f"{ATTRIBUTE}.{index}" for index in indices]
        if indices[-1] == len(blocks_of(model)) - 1:
            children = [name for name, _ in model.named_children()]
            own += children[children.index(ATTRIBUTE) + 1 :]
        self.prefixes = tuple(f"{name}." for name in own)

    def __contains__(self, name: str) -> bool:
        """Whether the module of this name is in the part."""
        return self.prefixes is None or f"{name}.".startswith(self.prefixes)


def find_mlps(model: nn.Module, scope: Scope) -> dict[str, nn.Module]:
    """The MLPs of blocks that mix tokens, by name, where the MLP's last layer `fc2` is a linear one."""
    blocks = _blocks_with(model, scope, MIXERS)
    found = {f"{name}.mlp": getattr(block, "mlp", None) for name, block in blocks.items()}
    return {name: mlp for name, mlp in found.items() if isinstance(getattr(mlp, "fc2", None), nn.Linear)}


def find_attentions(model: nn.Module, scope: Scope) -> dict[str, nn.Module]:
    """The blocks' attentions, by name, whose last layer `proj` is a linear one."""
    blocks = _blocks_with(model, scope, ATTENTIONS)
    found = {f"{name}.{own}": getattr(block, own, None) for name, block in blocks.items() for own in ATTENTIONS}
    return {name: layer for name, layer in found.items() if isinstance(getattr(layer, "proj", None), nn.Linear)}


def find_branches(model: nn.Module, scope: Scope) -> dict[str, int]:
    """The width of each block's attention and MLP, by their names; empty if a block lacks one of them."""
    attentions, mlps = find_attentions(model, scope), find_mlps(model, scope)
    with_attention, with_mlp = ({name.rpartition(".")[0] for name in found} for found in (attentions, mlps))
    if with_attention != with_mlp:
        return {}
    widths = {name: attention.proj.out_features for name, attention in attentions.items()}
    return widths | {name: mlp.fc2.out_features for name, mlp in mlps.items()}


def _blocks_with(model: nn.Module, scope: Scope, parts: Sequence[str]) -> dict[str, nn.Module]:
    """The modules in the scope that have one of these parts, by name."""
    named = [(name, module) for name, module in model.named_modules() if name in scope]
    return {name: module for name, module in named if any(hasattr(module, part) for part in parts)}
