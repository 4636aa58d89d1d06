"""timm models as frozen backbones, with timm's weights, a local checkpoint's, or none."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from fedpeft_dist.backbones.checkpoints import WeightsFile, loading_with
from fedpeft_dist.backbones.deferred import deferring, made
from fedpeft_dist.backbones.fitting import layers_in
from fedpeft_dist.backbones.glyph_vit import GLYPH_VIT, PRETRAINED_CFG, build_glyph_vit
from fedpeft_dist.backbones.hub import PretrainedWeights, check_name
from fedpeft_dist.backbones.normalization import normalization_of, warn_of_origin
from fedpeft_dist.backbones.repeated import repeated_blocks
from fedpeft_dist.backbones.weight_files import UnfitWeightsError, check_checkpoint, one_line
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig


@dataclass(frozen=True)
class Backbone:
    """A timm model in eval mode, and how its images are prepared."""

    model: nn.Module
    mean: tuple[float, ...]
    """Mean of each channel, for images scaled to 0 .. 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    image_size: int
    num_parameters: int
    """Parameters of the whole model with its head, before a method changes it. Full fine-tuning would send these."""
    sha256: str
    """SHA-256 of all tensors, with the head; empty on the meta device. Trained parameters fit this backbone only."""
    interpolation: str = "bicubic"
    """How images are resized: as in the pre-training, or bicubic if that is neither bicubic nor bilinear."""
    warning: str = ""
    """A line for the user if the weights may need another normalization; empty if not."""
    plain: nn.Module | None = None
    """The model before a method changes it, with the same tensors. Plain PyTorch trains this one."""
    shared_layers: frozenset[nn.Module] = frozenset()
    """Layers whose result all samples share. Their dropout stays off, because no sample's key can decide it."""
    blocks: tuple[nn.Module, ...] = ()
    """The model's repeated blocks, in order, as they were before a method changed what is in them."""

    @property
    def channels(self) -> int:
        return len(self.mean)


def build_backbone(
    config: BackboneConfig, num_classes: int, image_size: int, seed: int, device: str = "cpu", deferred: bool = False
) -> Backbone:
    """Makes the model with a classifier for num_classes, and loads its weights. Downloads nothing.

    The model is made on the CPU under its own seed, so every rank gets the same head and the global generator does not
    change. Batch-norm layers stay in eval mode: clients share the backbone's statistics, and no client changes them.

    Args:
        image_size: height and width of an image in pixels, for models with a fixed input size (ViT, Swin).
        device: "meta" makes only the shapes, and loads nothing.
        deferred: leave the matrices of the repeated blocks to `made` (backbones/deferred.py), one by one.

    Raises:
        ConfigError: the name is unknown, the model does not take the arguments, or the weights are not on this machine
            or do not fit.
    """
    with torch.random.fork_rng(devices=[]), deferring() if deferred else nullcontext() as mode:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA, too
        model, weights = _create(config, num_classes, image_size, device, deferred)
    blocks = repeated_blocks(model)
    if mode is not None:
        try:
            mode.settle(model, blocks)
        except NotImplementedError as error:  # values that follow from a deferred tensor's
            raise ConfigError(
                f"runtime.sharding: backbone.name: {config.name} cannot be made block by block ({one_line(error)}); "
                "give another model, or sharding: {size: 1, offload: none}"
            ) from error
    first_conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", None) or first_conv.in_channels
    images = normalization_of(config, model.pretrained_cfg, channels)
    uncertain = config.checkpoint is not None and config.mean is None and weights is not None
    return Backbone(
        model.eval(),
        *images,
        image_size=image_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sha256="" if device == "meta" else _hash_tensors(model),
        interpolation="bilinear" if model.pretrained_cfg.get("interpolation") == "bilinear" else "bicubic",
        warning=warn_of_origin(weights.path, weights.names, images, config.name) if uncertain else "",
        blocks=tuple(blocks),
    )


def freeze(model: nn.Module, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Moves a model to its device, turns gradients off, and casts its parameters.

    Autocast would cast linear layers and convolutions at every step, so they are kept in the compute type. Norms,
    tokens and position tables stay in float32. Deferred tensors stay where they are.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and compute_dtype != torch.float32:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(compute_dtype)
    move(model, device)


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves a model's tensors to a device, but for deferred ones, which have no values yet; returns the model."""
    return model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def model_arguments(config: BackboneConfig, image_size: int) -> dict[str, Any]:
    """The model's arguments: `model_args`, and the image size if the model's input size is fixed."""
    arguments, default = dict(config.model_args), _default_cfg(config)
    if default.get("fixed_input_size") and default["input_size"][-1] != image_size:
        arguments.setdefault("img_size", image_size)
    return arguments


def prefetch_weights(config: BackboneConfig) -> str | None:
    """Downloads the weights that a run of this backbone starts from, unless they are on this machine already.

    Returns:
        The weights' path; None if there is nothing to download: a local checkpoint, the embedded backbone, no weights.

    Raises:
        ConfigError: the name is unknown, timm has no weights for the model, or the download fails.
    """
    check_name(config.name)
    return str(_pretrained_weights(config).locate(download=True)) if starts_from_timm(config) else None


def starts_from_timm(config: BackboneConfig) -> bool:
    """Whether the weights are timm's, neither a local file's nor the package's."""
    return config.pretrained and config.checkpoint is None and config.name != GLYPH_VIT


def _default_cfg(config: BackboneConfig) -> Mapping[str, Any]:
    """timm's config of the model, before the model is made."""
    return PRETRAINED_CFG if config.name == GLYPH_VIT else _pretrained_weights(config).source


def _pretrained_weights(config: BackboneConfig) -> PretrainedWeights:
    """The place of timm's weights for the model. `model_args` can give another place, as in timm."""
    arguments = config.model_args
    name, _, tag = config.name.partition(".")
    source = arguments.get("pretrained_cfg") or tag or None
    try:
        resolved = timm.models.resolve_pretrained_cfg(name, source, arguments.get("pretrained_cfg_overlay"))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"backbone.model_args: no pretrained_cfg for timm ({one_line(error)})") from error
    return PretrainedWeights(config.name, resolved.to_dict(), arguments.get("cache_dir"))


def _create(
    config: BackboneConfig, num_classes: int, image_size: int, device: str, mapped: bool
) -> tuple[nn.Module, WeightsFile | None]:
    """The model, and the file that its weights come from."""
    check_name(config.name)
    weights = None
    if config.checkpoint is not None and device != "meta":
        weights = WeightsFile(check_checkpoint(Path(config.checkpoint)), is_published=False, mapped=mapped)
    elif starts_from_timm(config) and device != "meta":
        weights = WeightsFile(_pretrained_weights(config).locate(), is_published=True, mapped=mapped)
    arguments = config.model_args
    try:
        arguments = model_arguments(config, image_size)
        if config.name == GLYPH_VIT:
            packaged = config.pretrained and config.checkpoint is None and device != "meta"
            model = build_glyph_vit(num_classes, packaged, device, **arguments)
            if weights is not None:
                weights.load(model, model.pretrained_cfg, checkpoint_filter_fn, strict=True)
            return model, weights
        if weights is None:
            with torch.device(device):
                return timm.create_model(config.name, num_classes=num_classes, **arguments), None
        with loading_with(weights.load):
            return timm.create_model(config.name, pretrained=True, num_classes=num_classes, **arguments), weights
    except ConfigError:
        raise
    except UnfitWeightsError as error:
        told = f"backbone.checkpoint: '{weights.path}' {error}"
        if weights.is_published:
            told = f"backbone.pretrained: the weights of {config.name!r} in '{weights.path}' {error}; "
            told += "else give backbone.checkpoint a local file, or pretrained: false"
        raise ConfigError(told) from error
    except Exception as error:  # timm and PyTorch refuse arguments in many ways
        given = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
        raise ConfigError(f"backbone: {config.name} cannot be made with {given}: {one_line(error)}") from error


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's classifier layers, from timm's config."""
    return layers_in(model.pretrained_cfg, "classifier")


def classifiers_of(config: BackboneConfig) -> tuple[str, ...]:
    """Names of the classifier layers of a model that is not made yet.

    Raises:
        ConfigError: the name is unknown.
    """
    check_name(config.name)
    return layers_in(_default_cfg(config), "classifier")


def _hash_tensors(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(name.encode())
        digest.update(made(tensor).detach().contiguous().numpy().data)
    return digest.hexdigest()
