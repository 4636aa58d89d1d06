"""A backbone with a PEFT method on it, as a function of images and L clients' parameters.

There are two ways to give every client its own parameters. `FoldedLaneModel` runs the frozen layers once over all rows,
and only the method's own modules know about lanes. `VmapLaneModel` maps the whole model over lanes, for full
fine-tuning.

Shapes: L lanes, B batch, K classes, P trainable parameters.
"""

from collections.abc import Mapping, Set
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fedpeft_dist.backbones.deferred import made
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.lanes.dropout import KeyedModule, key_dropout
from fedpeft_dist.lanes.ops import align_activations
from fedpeft_dist.lanes.parameters import LaneParameters, ParameterLayout
from fedpeft_dist.lanes.patches import multiply_patches


class LaneModule(nn.Module):
    """A module with trainable tensors of its own.

    The tensors are declared without a lane axis, under their names on the wire. They are bound as plain tensors
    [L, *shape] and never registered, so code that walks over a model's parameters does not move or shard them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.declared: dict[str, tuple[str, torch.Tensor]] = {}
        """Name on the wire and initial value of each attribute."""
        self.cast: set[str] = set()
        """Names on the wire of the tensors that are bound in the run's compute type."""

    def declare(self, attribute: str, name: str, initial: torch.Tensor, cast: bool = True) -> None:
        """Declares `self.<attribute>`, called `name` on the wire, with its value before the first round.

        Args:
            cast: bind it in the run's compute type, as autocast would give it to a matrix product.
        """
        self.declared[attribute] = (name, made(initial).detach())
        if cast:
            self.cast.add(name)

    def bind(self, views: Mapping[str, torch.Tensor]) -> None:
        """Computes with these tensors [L, *shape] from now on. Their keys are the names on the wire."""
        for attribute, (name, _) in self.declared.items():
            setattr(self, attribute, views[name])

    def register(self) -> None:
        """Makes the bound tensors parameters of this module, with memory of their own; not to be bound again."""
        for attribute in self.declared:
            # Not by setattr, which refuses an attribute that the module passes on to its frozen layer.
            self._parameters[attribute] = nn.Parameter(self.__dict__.pop(attribute).detach().clone())


class LaneModel:
    """A backbone with a method, as the trainer and the evaluation use it.

    Args:
        initial: the trained tensors before the first round, without a lane axis, by their names on the wire.
        cast: the names of those that are bound in the run's compute type.
    """

    def __init__(self, backbone: Backbone, initial: Mapping[str, torch.Tensor], cast: Set[str] = frozenset()):
        self.backbone, self.initial, self.num_lanes = backbone, initial, 0
        self.layout = ParameterLayout({name: value.shape for name, value in initial.items()}, frozenset(cast))
        self.keys = key_dropout(backbone.model, backbone.shared_layers)
        align_activations(backbone.model)
        backbone.model.eval()  # new modules start in training mode
        stop_caching(backbone.model)

    def initial_vector(self) -> torch.Tensor:
        """The trainable parameters before the first round: float32 [P]."""
        return self.layout.join(self.initial).detach().float().cpu()

    @property
    def is_random(self) -> bool:
        """Whether a pass with keys drops anything at random."""
        return any(isinstance(module, KeyedModule) for module in self.backbone.model.modules())

    def bind(self, parameters: LaneParameters) -> None:
        """Makes the model compute with these rows from now on, as they are now in the compute type."""
        parameters.refresh()
        self.num_lanes, self.views, self.dtype = parameters.num_lanes, parameters.views, parameters.theta.dtype

    def prefix(self, images: torch.Tensor) -> torch.Tensor:
        """What `logits` takes, [L, B, ...], for images [L, B, C, H, W]; the images themselves but in methods/cut.py."""
        return images

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [L, B, K] of images [L, B, C, H, W]. Keys, int64 [L, B], turn dropout and drop-path on."""
        raise NotImplementedError


class FoldedLaneModel(LaneModel):
    """A frozen backbone that runs over L * B rows. The LaneModules in it hold the trainable tensors."""

    def __init__(self, backbone: Backbone):
        self.lane_modules = [module for module in backbone.model.modules() if isinstance(module, LaneModule)]
        initial = dict(own for module in self.lane_modules for own in module.declared.values())
        super().__init__(backbone, initial, set().union(*(module.cast for module in self.lane_modules)))

    def bind(self, parameters: LaneParameters) -> None:
        super().bind(parameters)
        for module in self.lane_modules:
            module.bind(self.views)

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        self.keys.rows = None if keys is None else keys.flatten()
        return self.backbone.model(images.flatten(0, 1).to(self.dtype)).unflatten(0, (self.num_lanes, -1))


class VmapLaneModel(LaneModel):
    """A model whose every parameter is trained. The whole model is mapped over the lanes, so any timm model works.

    vmap has no rule for recurrent layers, and none for some convolutions on the meta device. These models run lane by
    lane. So do large models whose layers compute by oneDNN.
    """

    def __init__(self, backbone: Backbone):
        super().__init__(backbone, dict(backbone.model.named_parameters()))
        multiply_patches(backbone.model)
        self.lane_by_lane = any(isinstance(module, nn.RNNBase) for module in backbone.model.modules())

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        images = images.to(self.dtype)
        if self.num_lanes == 1 or self.lane_by_lane or images.is_meta:
            lanes = [dict(zip(self.views, own)) for own in zip(*(view.unbind() for view in self.views.values()))]
            rows = [None] * self.num_lanes if keys is None else keys
            return torch.stack([self._one_lane(*own) for own in zip(lanes, images, rows)])
        device, precision = images.device.type, nullcontext()
        if torch.is_autocast_enabled(device):
            precision = _CastMatrixProducts(torch.get_autocast_dtype(device))
        # vmap has no rule for the CPU's fused attention. It would loop over the lanes, with a warning.
        with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext(), precision:
            in_dims = (0, 0, None if keys is None else 0)
            return torch.vmap(self._one_lane, in_dims=in_dims)(dict(self.views), images, keys)

    def _one_lane(self, views: Mapping[str, torch.Tensor], images: torch.Tensor, keys: torch.Tensor | None):
        self.keys.rows = keys
        return torch.func.functional_call(self.backbone.model, views, (images,))


MATRIX_PRODUCTS = tuple(
    getattr(nn.functional, name) for name in ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d")
)


class _CastMatrixProducts(TorchFunctionMode):
    """Casts the functions that autocast skips under vmap: linear layers, convolutions and batch norm."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in MATRIX_PRODUCTS:
            arguments = [a.to(self.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
        if function is nn.functional.batch_norm:  # under vmap, the input must have the type of the statistics
            arguments = [arguments[0].float(), *arguments[1:]]
        return function(*arguments, **(keywords or {}))


def stop_caching(model: nn.Module) -> None:
    """Makes timm's attention layers look up their biases at every call.

    In eval mode the layers keep the biases of the first call, so no gradient would reach the biases. The flag of the
    attention layer alone decides; its children stay in eval mode.
    """
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}
            module.training = True
