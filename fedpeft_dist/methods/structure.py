"""Checks by shapes alone whether a method fits a backbone, before any weight is read.

All checks run on the meta device, in a fraction of a second for a model of any size. `training/lane_check.py` compares
values at the start of a run.

Shapes: L lanes, B batch, K classes, C channels, H x W pixels.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.backbones.weight_files import one_line
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel, LaneModule, stop_caching

FEW, MORE = 2, 3
"""Two batch sizes. The leading size of a tensor that holds samples is proportional to the batch size."""


def copy_model(model: nn.Module, on_meta: bool = False) -> nn.Module:
    """A copy of the modules that shares all tensors or, on the meta device, has tensors without values."""
    memo = {id(t): t.to("meta") if on_meta else t for t in model.buffers()}
    memo |= {id(p): nn.Parameter(p.to("meta"), requires_grad=False) if on_meta else p for p in model.parameters()}
    copied = copy.deepcopy(model, memo)
    stop_caching(copied)
    return copied


def check_backbone(backbone: Backbone, name: str) -> frozenset[str]:
    """Checks that a backbone on the meta device, before a method changes it, classifies each image by itself.

    Returns:
        What `find_shared_layers` finds, from the same runs.

    Raises:
        ConfigError: the backbone does not take images of this size, gives no score for each class, or compares the
            samples of a batch with each other.
    """
    model, sizes, scores = copy_model(backbone.model, on_meta=True), [], []

    def run(batch: int) -> None:
        with torch.no_grad(), _OutputSizes() as outputs:
            scores.append(model(_images(backbone, batch)))
        sizes.append(outputs.sizes)

    try:
        shared = _without_sample_axis(dict(model.named_modules()), run)
    except Exception as error:  # models refuse image sizes in many ways
        size = f"data.image_size: {backbone.image_size}"
        raise ConfigError(f"{size} does not fit backbone.name: {name} ({one_line(error)})") from error
    if not isinstance(scores[0], torch.Tensor) or scores[0].dim() != 2:
        raise ConfigError(f"backbone.name: {name} gives no score for each class; give a model that classifies images")
    if any(few * MORE**2 == more * FEW**2 for few, more in zip(*sizes) if few):
        raise ConfigError(
            f"backbone.name: {name} compares the samples of a batch with each other, so that clients would mix; "
            "give another model"
        )
    return shared


def find_shared_layers(backbone: Backbone) -> frozenset[str]:
    """Names of the layers whose input has no sample axis, such as an MLP that turns coordinates into position biases.

    The backbone may be on any device; only shapes are computed.
    """
    model = copy_model(backbone.model, on_meta=True)
    return _without_sample_axis(dict(model.named_modules()), lambda batch: model(_images(backbone, batch)))


def check_structure(model: LaneModel, method: str) -> None:
    """Runs a model with a method, on the meta device, as the evaluation does, then as local training does.

    Raises:
        ConfigError: the model does not run on several lanes, has a trained layer that all samples share, or a trained
            tensor that the scores do not depend on.
    """
    backbone = model.backbone
    misfit = f"method.name: {method!r} does not fit {type(backbone.model).__name__}"
    layers = {name: m for name, m in backbone.model.named_modules() if isinstance(m, LaneModule)}
    parameters = LaneParameters(model.layout, FEW, "meta")
    keys = torch.zeros(FEW, MORE, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():  # this run also fills the backbone's caches
            model.bind(LaneParameters(model.layout, 1, "meta", with_grad=False))
            shared = _without_sample_axis(layers, lambda batch: model.logits(_images(backbone, batch).unsqueeze(0)))
        tables = [name for layer in layers if layer in shared for name, _ in layers[layer].declared.values()]
        if tables:
            raise ConfigError(f"{misfit}: {tables[0]} works on a table that all samples share")
        with torch.enable_grad():
            model.bind(parameters)
            scores = model.logits(_images(backbone, FEW * MORE).unflatten(0, (FEW, MORE)), keys)
            gradients = torch.autograd.grad(scores.sum(), list(parameters.views.values()), allow_unused=True)
    except ConfigError:
        raise
    except Exception as error:  # a backbone may fail on a replaced layer in any way
        raise ConfigError(f"{misfit}: it cannot run with several lanes ({one_line(error)})") from error
    idle = [name for name, gradient in zip(parameters.views, gradients) if gradient is None]
    if idle:
        raise ConfigError(f"{misfit}: the scores do not depend on {idle[0]}, one of {len(idle)} such tensors")


class _OutputSizes(TorchDispatchMode):
    """Records the number of elements of every operation's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        return output


def _images(backbone: Backbone, batch: int) -> torch.Tensor:
    size = backbone.image_size
    return torch.empty(batch, backbone.channels, size, size, device="meta")


def _without_sample_axis(layers: Mapping[str, nn.Module], run: Callable[[int], object]) -> frozenset[str]:
    """The layers that get a tensor whose leading size does not grow with the batch size, the argument of `run`."""
    runs: list[dict[str, list[torch.Size]]] = []

    def note(name: str, layer: nn.Module, inputs: tuple[object, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            runs[-1][name].append(inputs[0].shape)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, name)))
        for batch in (FEW, MORE):
            runs.append(defaultdict(list))
            run(batch)

    def grows(few: torch.Size, more: torch.Size) -> bool:
        return few[1:] == more[1:] and few[0] * MORE == more[0] * FEW

    few, more = runs
    shared = [name for name in few if not all(grows(*pair) for pair in zip(few[name], more[name]) if pair[0])]
    return frozenset(shared)
