"""Compiles a model's repeated blocks by torch.compile: one compilation serves all blocks of a kind."""

from collections import Counter

from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks in place, at their first call; without repeated blocks, the whole model.

    PyTorch keeps what it has compiled in files, so that other processes of this machine take it from there.
    """
    for block in repeated_blocks(model) or [model]:
        block.compile(dynamic=False)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that stand beside others of their class in a sequence, in order."""
    found = []
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential | nn.ModuleList):
            kinds = Counter(type(child) for child in sequence)
            found += [
                child for child in sequence if kinds[type(child)] > 1 and next(child.children(), None) is not None
            ]
    return [block for block in found if not any(inner is not block and inner in found for inner in block.modules())]
