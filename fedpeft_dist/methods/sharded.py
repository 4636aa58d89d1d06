"""Spreads the frozen weights of a lane model over a group of ranks."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft_dist.backbones.deferred import made, replace
from fedpeft_dist.backbones.repeated import repeated_blocks
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.runtime.sharding import ShardedBlocks


def check_sharding(model: LaneModel, name: str) -> None:
    """
    Raises:
        ConfigError: a model of this backbone cannot be spread over ranks.
    """
    whole = model.backbone.model
    if any(isinstance(module, _BatchNorm) for module in whole.modules()):
        raise ConfigError(
            f"runtime.sharding: backbone.name: {name} has BatchNorm layers, as small convolutional networks have; give "
            "a transformer, or sharding: {size: 1, offload: none}"
        )
    if not any(large_tensors(model.backbone)):
        raise ConfigError(
            f"runtime.sharding: backbone.name: {name} with this method has no repeated blocks of frozen weights; give "
            "sharding: {size: 1, offload: none}"
        )


def large_tensors(backbone: Backbone) -> list[list[nn.Parameter]]:
    """The backbone's own frozen matrices, block by block.

    Vectors, such as biases and norms, stay on every rank. So does what a method adds, which several blocks may share.
    """
    own = {id(parameter) for parameter in backbone.plain.parameters() if parameter.dim() >= 2}
    return [[tensor for tensor in block.parameters() if id(tensor) in own] for block in backbone.blocks]


def shard_model(model: LaneModel, runtime: Runtime) -> ShardedBlocks:
    """Makes the deferred weights block by block, and keeps this rank's part of them. Every rank must call it.

    The model and the plain one beside it gather a block when it is needed.
    """
    backbone = model.backbone
    sharded = ShardedBlocks(large_tensors(backbone), runtime.mesh, runtime.device)
    for number, tensors in enumerate(sharded.blocks):
        for tensor in tensors:
            replace(tensor, made(tensor).detach().to(runtime.device))
        sharded.partition(number)
    sharded.watch(backbone.blocks)
    sharded.watch(repeated_blocks(backbone.plain))
    return sharded
