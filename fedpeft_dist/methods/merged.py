"""The plain backbone with one vector of trained parameters merged into its weights, for evaluation.

It computes what timm's own model does, without lanes.

Shapes: L lanes, B batch, K classes, C channels, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.methods.method import Method
from fedpeft_dist.methods.structure import copy_model
from fedpeft_dist.runtime.process import Runtime


def can_merge(method: Method, runtime: Runtime, are_plain: bool = True) -> bool:
    """Whether to evaluate a merged model.

    In 16 bits, a product that is added to a weight may vanish. To an 8-bit weight, nothing can be added. A method that
    leaves the first blocks frozen is evaluated as it trains, so that scores have the same bits whether features of the
    frozen blocks are kept or not.

    Args:
        are_plain: each rank has all weights, and none of them in 8 bits. Otherwise a merge can only put trained tensors
            in the place of others.
    """
    leaves_blocks = method.config.name == "head" or getattr(method.config, "blocks", None) is not None
    exact = method.merges_exactly or (runtime.precision == "fp32" and are_plain)
    return method.merge is not None and exact and not leaves_blocks


class MergedModel(LaneModel):
    """A model of one lane, whose parameters are merged whenever they are bound.

    Args:
        model: with its method, frozen on the run's device.
        prepare: changes the plain model's layers as those of the run are changed.
    """

    def __init__(self, model: LaneModel, method: Method, runtime: Runtime, prepare: Callable[[nn.Module], None]):
        self.method, self.layout, self.backbone, self.initial = method, model.layout, model.backbone, model.initial
        self.plain = copy_model(model.backbone.plain)
        freeze(self.plain, runtime.compute_dtype, runtime.device)
        self.base = dict(self.plain.named_parameters())
        self.own: dict[str, nn.Parameter] = {}
        """The parameters that a merge changes, with memory of their own."""
        trained = self.layout.split(model.initial_vector().to(runtime.device))
        for name, merged in method.merge(self.base, trained).items():
            if merged is not self.base[name]:
                self.own[name] = nn.Parameter(merged.clone(), requires_grad=False)
                layer, _, attribute = name.rpartition(".")
                setattr(self.plain.get_submodule(layer), attribute, self.own[name])
        freeze(self.plain, runtime.compute_dtype, runtime.device)
        prepare(self.plain)

    def bind(self, parameters: LaneParameters) -> None:
        self.num_lanes, self.dtype = parameters.num_lanes, parameters.theta.dtype
        trained = self.layout.split(self.layout.unpad(parameters.theta[0]))
        merged = self.method.merge(self.base, trained)
        for name, parameter in self.own.items():
            parameter.data.copy_(merged[name])

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [1, B, K] of images [1, B, C, H, W]; there is no dropout."""
        assert keys is None
        return self.plain(images.flatten(0, 1).to(self.dtype)).unsqueeze(0)
