"""Local checkpoint files: a state dict found in whatever a training script wrapped it in, and loaded into a model.

Beside timm's own layout, alone or in a training script's dictionary, these are known:

    MAE       {"model": encoder}, and the longer files that hold the decoder and the mask token beside it
    MoCo v3   {"state_dict": base_encoder.*, momentum_encoder.*, predictor.*, "arch", "optimizer", ...}: its base
              encoder without its head, an MLP that belongs to the pre-training
    augreg    .npz files in the layout of JAX, read by timm's ViTs themselves

Files are read without running code: a pickle that holds more than tensors and plain values is refused.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, clean_state_dict, load_checkpoint
from torch import nn

from fedpeft_dist.backbones.errors import one_line
from fedpeft_dist.config.errors import ConfigError

logger = logging.getLogger(__name__)

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".npz")
# Where training scripts keep the state dict, the most wanted first.
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
MOCO_ENCODER = "base_encoder."
MOCO_SMALL, MOCO_SMALL_HEADS = "vit_small", 12


def load_local_checkpoint(model: nn.Module, path: Path, classifiers: tuple[str, ...]) -> None:
    """Loads a file into the model; only a classifier may be missing from it, or be of another shape.

    Args:
        classifiers: names of the model's classifier layers, which stay fresh where the file has none that fits.

    Raises:
        ConfigError: no such file, or one that cannot be read, or that lacks or contradicts some of the model's tensors.
    """
    if not path.name.endswith(CHECKPOINT_SUFFIXES):
        raise ConfigError(f"backbone.checkpoint: '{path}' must end in one of {', '.join(CHECKPOINT_SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"backbone.checkpoint: '{path}': no such file")
    heads = tuple(f"{name}." for name in classifiers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is in the error
            if path.suffix == ".npz":
                load_checkpoint(model, str(path))
                return
            stored = _read(path)
            state = _encoder_state(stored, heads)
            _check_attention_heads(stored, state, model, path)
            state = _fit(state, model, heads)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except ConfigError:
        raise
    except Exception as error:  # each format fails in its own many ways, safetensors and pickle by classes of their own
        raise ConfigError(f"backbone.checkpoint: '{path}' cannot be loaded ({one_line(error)})") from error
    missing = [key for key in missing if not key.startswith(heads)]
    if missing:
        raise ConfigError(
            f"backbone.checkpoint: '{path}' lacks {len(missing)} of the model's tensors, {missing[0]!r} among them"
        )
    if unexpected:
        logger.info("%s: %d tensors have no place in the model and are left out", path, len(unexpected))


def _read(path: Path) -> Mapping[str, Any]:
    """What the file holds, as it is."""
    if path.suffix == ".safetensors":
        return load_file(path)
    # Training scripts like to store their parsed arguments, which are harmless.
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, Mapping):
        raise ValueError(f"it holds a {type(stored).__name__}, not tensors by name")
    return stored


def _encoder_state(stored: Mapping[str, Any], heads: tuple[str, ...]) -> dict[str, Any]:
    """The backbone's own tensors, by name, out of what a pre-training left."""
    key = next((key for key in STATE_KEYS if isinstance(stored.get(key), Mapping)), None)
    state = clean_state_dict(stored if key is None else stored[key])
    if _is_moco(state):
        state = {k.removeprefix(MOCO_ENCODER): v for k, v in state.items() if k.startswith(MOCO_ENCODER)}
        return {k: v for k, v in state.items() if not k.startswith(heads)}
    if any(k.startswith("decoder_") for k in state):
        return {k: v for k, v in state.items() if k != "mask_token" and not k.startswith("decoder_")}
    return state


def _is_moco(state: Mapping[str, Any]) -> bool:
    return any(k.startswith(MOCO_ENCODER) for k in state)


def _check_attention_heads(stored: Mapping[str, Any], state: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Tells MoCo v3's small ViT from timm's: the number of attention heads shows in no tensor's shape."""
    if stored.get("arch") != MOCO_SMALL or not _is_moco(clean_state_dict(stored.get("state_dict", {}))):
        return
    own = next((module.num_heads for module in model.modules() if hasattr(module, "num_heads")), None)
    if own not in (None, MOCO_SMALL_HEADS):
        raise ConfigError(
            f"backbone.checkpoint: '{path}' is MoCo v3's {MOCO_SMALL} with {MOCO_SMALL_HEADS} attention heads, the "
            f"model has {own}; give backbone.model_args: {{num_heads: {MOCO_SMALL_HEADS}}}"
        )


def _fit(state: dict[str, Any], model: nn.Module, heads: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The state in the model's own layout, image size and colours, without a classifier of other classes."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = adapt(state, model) if adapt is not None else state
    own = model.state_dict()
    state = {k: v for k, v in state.items() if not (k in own and k.startswith(heads) and v.shape != own[k].shape)}
    _adapt_channels(state, model)
    return state


def _adapt_channels(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Sums or repeats the first convolution's weights over colours, where the model takes other ones, as timm does."""
    first = model.pretrained_cfg.get("first_conv")
    name = f"{first}.weight"
    if not isinstance(first, str) or name not in state:
        return
    channels = model.get_submodule(first).in_channels
    if state[name].shape[1] != channels:
        state[name] = adapt_input_conv(channels, state[name])
