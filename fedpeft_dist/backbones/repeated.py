"""The blocks that a model repeats: compiled once for all, or gathered one after another."""

from collections import Counter

from torch import nn


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
