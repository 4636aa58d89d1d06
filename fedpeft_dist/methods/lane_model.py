"""A backbone with a PEFT method on it, as a function of images and L clients' parameters.

There are two ways to give every client its own parameters. `FoldedLaneModel` runs the frozen layers once over all rows,
and only the method's own modules know about lanes. `VmapLaneModel` maps the whole model over lanes, for full
fine-tuning.

Shapes: L lanes, B batch, K classes, P trainable parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
from timm.layers import DropPath, PatchDropout, activations
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.dropout import KeyedDropPath, SampleKeys, make_dropout, share_keys
from fedpeft_dist.lanes.ops import fold, lane_aligned, unfold
from fedpeft_dist.lanes.parameters import LaneParameters, ParameterLayout

# The CPU kernels of these activations use another formula for a tensor's last elements. So does the kernel of the GELU
# that is approximated by tanh.
PLACE_ROUNDING = (
    nn.SiLU, nn.Sigmoid, nn.LogSigmoid, nn.Mish, nn.Softplus,
    activations.Swish, activations.Sigmoid, activations.Mish, activations.GELUTanh, activations.QuickGELU,
)  # fmt: skip


class LaneModel(Protocol):
    """A backbone with a method, as the trainer and the evaluation use it."""

    backbone: Backbone
    layout: ParameterLayout

    def initial_vector(self) -> torch.Tensor:
        """The trainable parameters before the first round: float32 [P]."""

    def bind(self, parameters: LaneParameters) -> None:
        """Makes the model compute with these rows from now on."""

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [L, B, K] of images [L, B, C, H, W]. Keys, int64 [L, B], turn dropout and drop-path on."""


class LaneModule(nn.Module):
    """A module with trainable tensors of its own.

    The tensors are declared without a lane axis, under their names on the wire. They are bound as plain tensors
    [L, *shape] and never registered, so code that walks over a model's parameters does not move or shard them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.declared: dict[str, tuple[str, torch.Tensor]] = {}
        """Name on the wire and initial value of each attribute."""

    def declare(self, attribute: str, name: str, initial: torch.Tensor) -> None:
        """Declares `self.<attribute>`, called `name` on the wire, with its value before the first round."""
        self.declared[attribute] = (name, initial.detach())

    def bind(self, views: Mapping[str, torch.Tensor]) -> None:
        """Computes with these tensors [L, *shape] from now on. Their keys are the names on the wire."""
        for attribute, (name, _) in self.declared.items():
            setattr(self, attribute, views[name])


class FoldedLaneModel:
    """A frozen backbone that runs over L * B rows. The LaneModules in it hold the trainable tensors."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.keys = make_randomness_keyed(backbone)
        self.initial = {name: value for module in self._modules() for name, value in module.declared.values()}
        self.layout = ParameterLayout({name: value.shape for name, value in self.initial.items()})
        self.num_lanes = 0

    def initial_vector(self) -> torch.Tensor:
        return self.layout.join(self.initial).float().cpu()

    def bind(self, parameters: LaneParameters) -> None:
        self.num_lanes = parameters.num_lanes
        for module in self._modules():
            module.bind(parameters.views)

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        self.keys.rows = None if keys is None else fold(keys)
        return unfold(self.backbone.model(fold(images)), self.num_lanes)

    def _modules(self) -> Iterator[LaneModule]:
        return (module for module in self.backbone.model.modules() if isinstance(module, LaneModule))


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


class VmapLaneModel:
    """A model whose every parameter is trained. The whole model is mapped over the lanes, so any timm model works.

    vmap has no rule for recurrent layers, and none for some convolutions on the meta device. These models run lane by
    lane.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.is_recurrent = any(isinstance(module, nn.RNNBase) for module in backbone.model.modules())
        self.keys = make_randomness_keyed(backbone)
        self.layout = ParameterLayout({name: p.shape for name, p in backbone.model.named_parameters()})
        self.views: Mapping[str, torch.Tensor] = {}
        self.num_lanes = 0

    def initial_vector(self) -> torch.Tensor:
        return self.layout.join(dict(self.backbone.model.named_parameters())).detach().float().cpu()

    def bind(self, parameters: LaneParameters) -> None:
        self.num_lanes, self.views = parameters.num_lanes, parameters.views

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        if self.num_lanes == 1 or self.is_recurrent or images.is_meta:
            lanes = [{name: view[lane] for name, view in self.views.items()} for lane in range(self.num_lanes)]
            rows = [None] * self.num_lanes if keys is None else keys
            return torch.stack([self._one_lane(*own) for own in zip(lanes, images, rows)])
        in_dims = (0, 0, None if keys is None else 0)
        device = images.device.type
        # vmap has no rule for the CPU's fused attention. It would loop over the lanes, with a warning.
        attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
        precision = nullcontext()
        if torch.is_autocast_enabled(device):
            precision = _CastMatrixProducts(torch.get_autocast_dtype(device))
        with attention, precision:
            return torch.vmap(self._one_lane, in_dims=in_dims)(dict(self.views), images, keys)

    def _one_lane(self, views: Mapping[str, torch.Tensor], images: torch.Tensor, keys: torch.Tensor | None):
        self.keys.rows = keys
        return torch.func.functional_call(self.backbone.model, views, (images,))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replaces the module called `name`, and returns its parent."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, leaf, module)
    return parent


def make_randomness_keyed(backbone: Backbone) -> SampleKeys:
    """Replaces the backbone's own dropout and drop-path layers by keyed ones, and removes those with probability 0.

    Layers that all samples share get no dropout, because a mask there would belong to no single sample.

    Returns:
        The keys that all keyed layers of the model use from now on, with the method's layers.

    Raises:
        ConfigError: dropout that cannot be keyed, because it is inside the fused attention, drops patches, or has no
            layer of its own.
    """
    model, shared = backbone.model, backbone.shared_layers
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if getattr(model, "drop_rate", 0.0) and not any(module.p for module in dropouts):
        raise ConfigError(f"backbone.model_args: drop_rate of {type(model).__name__} cannot be keyed; give 0.0")
    for name, module in list(model.named_modules()):
        if isinstance(module, PatchDropout):
            raise ConfigError(f"backbone.model_args: patch dropout ({name}) cannot be keyed; give patch_drop_rate: 0.0")
        if isinstance(module, nn.Dropout):
            if name.endswith("attn_drop") and module.p:
                raise ConfigError(
                    f"backbone.model_args: dropout {module.p} at {name} is inside the fused attention; "
                    "give attn_drop_rate: 0.0 (proj_drop_rate and drop_path_rate are supported)"
                )
            replace_module(model, name, make_dropout(0.0 if module in shared else module.p, name))
        elif isinstance(module, DropPath):
            probability = 0.0 if module in shared else module.drop_prob or 0.0
            keyed = KeyedDropPath(probability, module.scale_by_keep, name) if probability else nn.Identity()
            replace_module(model, name, keyed)
    _align_activations(model)
    model.eval()  # new modules start in training mode
    stop_caching(model)
    keys = SampleKeys()
    share_keys(model, keys)
    return keys


class AlignedActivation(nn.Module):
    """Pads the input of an activation, so that the rounding of an element does not depend on its place."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_aligned(self.activation, x, num_lanes=1)


def _align_activations(model: nn.Module) -> None:
    """Wraps the frozen activations whose rounding depends on an element's place (see `lane_aligned`)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PLACE_ROUNDING) or getattr(module, "approximate", None) == "tanh":
            replace_module(model, name, AlignedActivation(module))


def stop_caching(model: nn.Module) -> None:
    """Makes timm's attention layers look up their biases at every call.

    In eval mode the layers keep the biases of the first call, so no gradient would reach the biases. The flag of the
    attention layer alone decides; its children stay in eval mode.
    """
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}
            module.training = True
