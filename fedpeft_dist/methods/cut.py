"""Cuts a model in two: a frozen prefix, whose result for an image never changes, and a suffix, which is trained.

The cut is the input of one module: a block of the model's sequence of blocks, the final norm, or the classifier.
Everything before it is a function of the normalised image alone, so its result (the features) may be computed once and
kept.

Shapes: L lanes, B batch, C channels, H x W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import classifier_names
from fedpeft_dist.lanes.dropout import KeyedModule
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.blocks import blocks_of
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModel, LaneModule
from fedpeft_dist.runtime.accelerator import is_device_fault
from fedpeft_dist.runtime.process import Runtime

TRIAL = 3
"""Images of the trial that compares a cut model with the whole one."""
DISTANCE = 0.01
"""Standard deviation of the noise on the initial parameters in the trial."""


class NoCutError(Exception):
    """A model cannot be cut. The message says why; it is empty where the method trains from the first block on."""


@dataclass(frozen=True)
class Cut:
    """A place where a model can be cut."""

    module: nn.Module
    """The module whose input is the features."""
    suffix: Callable[[torch.Tensor], torch.Tensor]
    """From features [L * B, ...] to scores [L * B, K]."""


class _CutReachedError(Exception):
    """Ends a forward pass at the cut, with the features."""


class SuffixModel(LaneModel):
    """The part of a lane model after a cut. It takes features where the whole model takes images."""

    def __init__(self, whole: FoldedLaneModel, cut: Cut):
        self.whole, self.cut = whole, cut
        self.backbone, self.initial, self.layout, self.keys = whole.backbone, whole.initial, whole.layout, whole.keys
        self.num_lanes = 0

    def bind(self, parameters: LaneParameters) -> None:
        super().bind(parameters)
        self.whole.bind(parameters)

    @torch.no_grad()
    def prefix(self, images: torch.Tensor) -> torch.Tensor:
        """The features [L, B, ...] of images [L, B, C, H, W]."""

        def stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _CutReachedError(*inputs)

        self.keys.rows = None
        with self.cut.module.register_forward_pre_hook(stop):
            try:
                self.backbone.model(images.flatten(0, 1).to(self.dtype))
            except _CutReachedError as reached:
                (features,) = reached.args
                return features.unflatten(0, images.shape[:2])
        raise AssertionError("the model does not pass its cut")

    def logits(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [L, B, K] of features [L, B, ...]; keys as of the whole model."""
        self.keys.rows = None if keys is None else keys.flatten()
        return self.cut.suffix(images.flatten(0, 1)).unflatten(0, (self.num_lanes, -1))


def cut_model(model: LaneModel, runtime: Runtime) -> SuffixModel:
    """Cuts a model, on the run's device, as late as its trained modules allow.

    Raises:
        NoCutError: there is no place to cut it at, or the model cut in two computes something else than the whole one.
    """
    if not isinstance(model, FoldedLaneModel):
        raise NoCutError
    parameters = _random_parameters(model, runtime, seed=0)
    model.bind(parameters)
    generator, size = torch.Generator().manual_seed(0), model.backbone.image_size
    images = torch.randn(1, TRIAL, model.backbone.channels, size, size, generator=generator).to(runtime.device)
    cut = SuffixModel(model, _find_cut(model, images, runtime))
    cut.bind(parameters)
    keys = torch.arange(TRIAL, device=runtime.device).unsqueeze(0)
    other = _random_parameters(model, runtime, seed=1)  # a prefix that depends on trained parameters shows
    with torch.no_grad(), runtime.autocast():
        try:
            features = cut.prefix(images)
            cut.bind(other)
            found = cut.logits(features, keys)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:  # as each family is written
            if is_device_fault(error):
                raise
            raise NoCutError(f"{_kind(model)} does more than run one block after another") from error
        if not torch.equal(found, model.logits(images, keys)):
            raise NoCutError(f"{_kind(model)} cut in two computes something else than as a whole")
    return cut


def _find_cut(model: FoldedLaneModel, images: torch.Tensor, runtime: Runtime) -> Cut:
    """The last place before the first trained module."""
    places, called = _places(model.backbone.model), []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.append(module))
        for module in model.backbone.model.modules()
        if module in places or isinstance(module, LaneModule | KeyedModule)
    ]
    try:
        with torch.no_grad(), runtime.autocast():
            model.logits(images)
    finally:
        for hook in hooks:
            hook.remove()
    first = next(index for index, module in enumerate(called) if isinstance(module, LaneModule))
    before = [index for index, module in enumerate(called[: first + 1]) if module in places]
    blocks = blocks_of(model.backbone.model)
    if not before or (blocks and called[before[-1]] is blocks[0]):
        raise NoCutError("" if places else f"{_kind(model)} has no sequence of blocks, and not one classifier")
    if any(isinstance(module, KeyedModule) for module in called[: before[-1]]):
        raise NoCutError(f"dropout or drop-path is on in front of the first trained layer of {_kind(model)}")
    return Cut(called[before[-1]], places[called[before[-1]]])


def _places(model: nn.Module) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """The modules in front of which a model may be cut, with what follows each cut."""
    places: dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]] = {}
    blocks, norm, head = blocks_of(model), getattr(model, "norm", None), getattr(model, "forward_head", None)
    if isinstance(norm, nn.Module) and head is not None:
        layers = [*blocks, norm]
        for index, layer in enumerate(layers):
            after = nn.Sequential(*layers[index:])
            places[layer] = lambda x, after=after: head(after(x))
    names = classifier_names(model)
    if len(names) == 1:
        classifier = model.get_submodule(names[0])
        places[classifier] = classifier
    return places


def _random_parameters(model: LaneModel, runtime: Runtime, seed: int) -> LaneParameters:
    """One lane with noise on the initial parameters."""
    parameters = LaneParameters(model.layout, 1, runtime.device, with_grad=False)
    row = model.layout.pad(model.initial_vector())
    row += DISTANCE * torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))
    parameters.load(0, row)
    return parameters


def _kind(model: LaneModel) -> str:
    return type(model.backbone.model).__name__
