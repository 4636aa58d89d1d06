"""timm models as frozen backbones: by name, with timm's weights, a local checkpoint's, or none."""

from __future__ import annotations

import difflib
import hashlib
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import adapt_input_conv, load_checkpoint, load_state_dict
from torch import nn

from fedpeft_dist.backbones.glyph_vit import build_glyph_vit
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig

logger = logging.getLogger(__name__)

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".npz")


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
        ConfigError: an unknown name, arguments the model does not take, a checkpoint that is missing or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed reseeds CUDA too
        model = _create(config, num_classes, image_size, device)
    if config.checkpoint is not None and device != "meta":
        _load_checkpoint(model, Path(config.checkpoint))
    channels = getattr(model, "in_chans", None) or _first_convolution(model).in_channels
    mean, std = (_per_channel(model.pretrained_cfg[key], channels) for key in ("mean", "std"))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = "" if device == "meta" else _hash_tensors(model)
    return Backbone(model.eval(), mean, std, image_size, num_parameters, digest)


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


def _create(config: BackboneConfig, num_classes: int, image_size: int, device: str) -> nn.Module:
    arguments = dict(config.model_args)
    load_own = config.pretrained and config.checkpoint is None and device != "meta"
    try:
        if config.name == "glyph_vit":
            if image_size != 32:
                arguments.setdefault("img_size", image_size)
            return build_glyph_vit(num_classes, pretrained=load_own, device=device, **arguments)
        if not timm.is_model(config.name):
            names = [*timm.list_models(), "glyph_vit"]
            near = difflib.get_close_matches(config.name.split(".")[0], names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
            raise ConfigError(f"backbone.name: {config.name!r} is no timm model; {hint}")
        default = timm.models.get_pretrained_cfg(config.name, allow_unregistered=True)
        if default is not None and default.fixed_input_size and default.input_size[-1] != image_size:
            arguments.setdefault("img_size", image_size)
        with torch.device(device):
            return timm.create_model(config.name, pretrained=load_own, num_classes=num_classes, **arguments)
    except ConfigError:
        raise
    except Exception as error:  # timm and PyTorch refuse a name or an argument in many ways, and so does a download
        if not load_own or isinstance(error, (TypeError, ValueError, AssertionError)):
            raise ConfigError(f"backbone: {config.name} cannot be made with {arguments}: {_one_line(error)}") from error
        raise ConfigError(
            f"backbone.pretrained: the weights of {config.name!r} cannot be had ({_one_line(error)}); "
            "give backbone.checkpoint a local file, or pretrained: false"
        ) from error


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads a local file; only the classifier may be missing from it or be of another shape."""
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ConfigError(f"backbone.checkpoint: '{path}' must end in one of {', '.join(CHECKPOINT_SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"backbone.checkpoint: '{path}': no such file")
    try:
        if path.suffix == ".npz":
            load_checkpoint(model, str(path))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is in the error
            state = load_state_dict(str(path), weights_only=True)
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = adapt(state, model) if adapt is not None else state
        own = model.state_dict()
        heads = tuple(f"{name}." for name in classifier_names(model))
        state = {k: v for k, v in state.items() if k not in own or _fits(k, v, own[k], heads)}
        _adapt_channels(state, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:  # each format fails in its own many ways, safetensors and pickle by classes of their own
        raise ConfigError(f"backbone.checkpoint: '{path}' cannot be loaded ({_one_line(error)})") from error
    missing = [key for key in missing if not key.startswith(heads)]
    if missing:
        raise ConfigError(
            f"backbone.checkpoint: '{path}' lacks {len(missing)} of the model's tensors, {missing[0]!r} among them"
        )
    if unexpected:
        logger.info("%s: %d tensors have no place in the model and are left out", path, len(unexpected))


def _fits(name: str, theirs: torch.Tensor, own: torch.Tensor, heads: tuple[str, ...]) -> bool:
    """False for a classifier of another number of classes, which the model's new one replaces."""
    return not name.startswith(heads) or theirs.shape == own.shape


def _adapt_channels(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Sums or repeats the first convolution's weights over colours, where the model takes other ones, as timm does."""
    first = model.pretrained_cfg.get("first_conv")
    name = f"{first}.weight"
    if not isinstance(first, str) or name not in state:
        return
    channels = model.get_submodule(first).in_channels
    if state[name].shape[1] != channels:
        state[name] = adapt_input_conv(channels, state[name])


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier layers, as timm's model config tells them."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _hash_tensors(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + "..."
