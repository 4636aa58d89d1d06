"""Compiles a model's repeated blocks by torch.compile: one compilation serves all blocks of a kind."""

import torch
from torch import nn

from fedpeft_dist.backbones.repeated import repeated_blocks
from fedpeft_dist.methods.lane_model import LaneModule

VARIANTS = 64
"""Compilations of one block's code. PyTorch's own limit is 8, after which it would compute the block uncompiled."""


def compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks in place, at their first call; without repeated blocks, the whole model.

    The blocks in front of the first trained one stay as they are, so that what they give for an image is the same
    whether it is kept or computed anew. A block within a trained module, such as shallow prompts, is a trained one.
    PyTorch keeps what it has compiled in files, so that other processes of this machine take it from there.
    """
    torch._dynamo.reset()  # what earlier runs of this process have compiled counts towards the limit
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    blocks = repeated_blocks(model) or [model]
    trained_parts = {part for m in model.modules() if isinstance(m, LaneModule) for part in m.modules()}
    trained = (n for n, block in enumerate(blocks) if not trained_parts.isdisjoint(block.modules()))
    for block in blocks[next(trained, len(blocks)) :]:
        block.compile(dynamic=False)
