"""timm models as frozen backbones: by name, with timm's own weights, a local checkpoint's, or none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from fedpeft_dist.backbones.checkpoints import WeightsFile, check_checkpoint, loading_with
from fedpeft_dist.backbones.errors import UnfitWeightsError, one_line
from fedpeft_dist.backbones.glyph_vit import PRETRAINED_CFG, build_glyph_vit
from fedpeft_dist.backbones.hub import PretrainedWeights
from fedpeft_dist.backbones.names import GLYPH_VIT, check_name, classifiers_in
from fedpeft_dist.backbones.normalization import Normalization, published_normalization
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig

INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Backbone:
    """A timm model in eval mode, and how its images are to be normalised."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, for images scaled to 0 .. 1."""
    image_size: int
    num_parameters: int
    """Of the whole model with its head, before any method changes it: what full fine-tuning would send."""
    sha256: str
    """Of all its tensors, head included; empty on the meta device. What was trained goes with this backbone only."""
    interpolation: str = "bicubic"
    """How images are resized for it: as it was pre-trained, or bicubic where that is neither bicubic nor bilinear."""
    warning: str = ""
    """For the user, where the images may not be normalised as the weights want them."""
    plain: nn.Module | None = None
    """The model before a method changes it, over the same tensors. Plain PyTorch trains this one."""
    shared_layers: frozenset[nn.Module] = frozenset()
    """Layers that compute something all samples share. Their dropout stays off: no sample's key can decide it."""

    @property
    def channels(self) -> int:
        return len(self.mean)


def build_backbone(
    config: BackboneConfig, num_classes: int, image_size: int, seed: int, device: str = "cpu"
) -> Backbone:
    """Makes the model with a classifier for num_classes and loads its weights.

    It is made on the CPU under a seed of its own, so that every rank gets the same head and the global generator is
    left alone. Batch-norm layers stay in eval mode: clients share the backbone's statistics and none changes them.

    Args:
        image_size: side of the input in pixels, handed to the models whose input size is fixed (ViT, Swin).
        device: "meta" makes the shapes alone, and loads nothing.

    Raises:
        ConfigError: an unknown name, arguments the model does not take, weights that are not on this machine or do not
            fit. Nothing is ever downloaded here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed reseeds CUDA too
        model, weights = _create(config, num_classes, image_size, device)
    channels = getattr(model, "in_chans", None) or _first_convolution(model).in_channels
    images = _normalization(config, model, channels)
    warning = "" if config.mean is not None or weights is None else _warn_of_origin(config, weights, images)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = "" if device == "meta" else _hash_tensors(model)
    interpolation = model.pretrained_cfg.get("interpolation")
    if interpolation not in INTERPOLATIONS:
        interpolation = INTERPOLATIONS[0]
    return Backbone(model.eval(), *images, image_size, num_parameters, digest, interpolation, warning)


def freeze(model: nn.Module, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Moves a model to its device, without gradients, and its parameters to the type they are used in.

    Linear layers and convolutions, which autocast would cast at every step, are kept in the compute type; the rest
    (norms, tokens, position tables) in float32.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and compute_dtype != torch.float32:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(compute_dtype)
    model.to(device)


def model_arguments(config: BackboneConfig, image_size: int) -> dict[str, Any]:
    """What the model is made with, beside its classes: `model_args` and, where its input size is fixed, that size."""
    arguments = dict(config.model_args)
    default = PRETRAINED_CFG if config.name == GLYPH_VIT else _pretrained_weights(config).source
    if default.get("fixed_input_size") and default["input_size"][-1] != image_size:
        arguments.setdefault("img_size", image_size)
    return arguments


def prefetch_weights(config: BackboneConfig) -> str | None:
    """Downloads the weights that a run of this backbone starts from, where they are not on this machine already.

    Returns:
        Where they lie; None where there is nothing to download: a local checkpoint, the embedded backbone, no weights.

    Raises:
        ConfigError: an unknown name, a model that timm has no weights for, or a download that failed.
    """
    check_name(config.name)
    if config.name == GLYPH_VIT or not config.pretrained or config.checkpoint is not None:
        return None
    return str(_pretrained_weights(config).download())


def _pretrained_weights(config: BackboneConfig) -> PretrainedWeights:
    """Where timm has its weights for the model; what `model_args` say about that has the last word, as in timm."""
    arguments = config.model_args
    name, _, tag = config.name.partition(".")
    source = arguments.get("pretrained_cfg") or tag or None
    try:
        resolved = timm.models.resolve_pretrained_cfg(name, source, arguments.get("pretrained_cfg_overlay"))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"backbone.model_args: no pretrained_cfg for timm ({one_line(error)})") from error
    return PretrainedWeights(config.name, resolved.to_dict(), arguments.get("cache_dir"))


def _create(
    config: BackboneConfig, num_classes: int, image_size: int, device: str
) -> tuple[nn.Module, WeightsFile | None]:
    """The model, and the file that it was filled from."""
    check_name(config.name)
    weights = None if device == "meta" else _weights_file(config)
    arguments = dict(config.model_args)
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
        assert weights is not None
        if config.checkpoint is not None:
            raise ConfigError(f"backbone.checkpoint: '{weights.path}' {error}") from error
        raise ConfigError(
            f"backbone.pretrained: the weights of {config.name!r} in '{weights.path}' {error}; "
            "else give backbone.checkpoint a local file, or pretrained: false"
        ) from error
    except Exception as error:  # timm and PyTorch refuse an argument in many ways
        given = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
        raise ConfigError(f"backbone: {config.name} cannot be made with {given}: {one_line(error)}") from error


def _weights_file(config: BackboneConfig) -> WeightsFile | None:
    """The file that a real model is filled from; None where it stays fresh, or the package carries its weights."""
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        check_checkpoint(path)
        return WeightsFile(path, is_published=False)
    if not config.pretrained or config.name == GLYPH_VIT:
        return None
    return WeightsFile(_pretrained_weights(config).require(), is_published=True)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier layers, as timm's model config tells them."""
    return classifiers_in(model.pretrained_cfg)


def classifiers_of(config: BackboneConfig) -> tuple[str, ...]:
    """The same, before the model is made.

    Raises:
        ConfigError: an unknown name.
    """
    check_name(config.name)
    default = PRETRAINED_CFG if config.name == GLYPH_VIT else _pretrained_weights(config).source
    return classifiers_in(default)


def _hash_tensors(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def _normalization(config: BackboneConfig, model: nn.Module, channels: int) -> Normalization:
    """The config's, or the pre-training's that the model's name stands for."""
    if config.mean is None or config.std is None:
        return Normalization(*(_per_channel(model.pretrained_cfg[key], channels) for key in ("mean", "std")))
    for key, values in (("mean", config.mean), ("std", config.std)):
        if len(values) != channels:
            raise ConfigError(f"backbone.{key}: {list(values)} for a backbone of {channels} channels; give {channels}")
    return Normalization(config.mean, config.std)


def _warn_of_origin(config: BackboneConfig, weights: WeightsFile, images: Normalization) -> str:
    """Tells where a checkpoint's publisher normalises images otherwise than the run does."""
    found = None if weights.is_published else published_normalization(weights.path, weights.names)
    if found is None:
        return ""
    sign, published = found[0], Normalization(*(_per_channel(values, len(images.mean)) for values in found[1]))
    if published == images:
        return ""
    return (
        f"backbone.checkpoint: '{weights.path}' seems to want images of mean {list(published.mean)} and std "
        f"{list(published.std)} ({sign}); those of {config.name!r} are in use, {list(images.mean)} and "
        f"{list(images.std)}; give backbone.mean and backbone.std"
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
