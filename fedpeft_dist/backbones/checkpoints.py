"""Loads weights from a file into a model: only a classifier may stay random, and the whole encoder is used.

timm's builder makes the model with its weights, and `loading_with` replaces timm's loader by one of this package. So
the loader gets the filter that the model's entry point names, which may differ from the filter of the model's class.
"""

import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import _builder, adapt_input_conv, clean_state_dict
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fedpeft_dist.backbones.fitting import LOOSE_FRESH, OTHER_MODEL, Filter, Fit, Target, layers_in
from fedpeft_dist.backbones.normalization import tensor_names
from fedpeft_dist.backbones.weight_files import UnfitWeightsError, check_content, one_line, read_weights
from fedpeft_dist.backbones.wrappings import find_encoder

ARCHIVE = ".npz"  # numpy arrays in the layout of JAX, which some timm models read with code of their own
CLASSIFIERS = ("head/", "pre_logits/")
POOLING = "MAPHead_0/"  # timm skips it for models that it loads loosely
STACKED = "/encoderblock/"  # one array for all blocks
MOCO_SMALL, MOCO_SMALL_HEADS = "vit_small", 12


@dataclass
class WeightsFile:
    """A file of weights for a model that timm builds."""

    path: Path
    is_published: bool
    """Whether the file is timm's own. Then timm decides by the number of classes whether the classifier is loaded."""
    names: tuple[str, ...] = ()
    """Names of the file's tensors, from `tensor_names`, after the file is read."""
    mapped: bool = False
    """Whether tensors stay in the file until they are used."""

    def load(
        self, model: nn.Module, pretrained_cfg: Mapping[str, Any], filter_fn: Filter | None, strict: bool, **values: Any
    ) -> None:
        """Fills a model. The arguments are those of timm's `load_pretrained`.

        Raises:
            UnfitWeightsError: the file cannot be read, or it does not fit the model.
        """
        heads = tuple(f"{name}." for name in layers_in(pretrained_cfg, "classifier"))
        before = _versions(model)
        try:
            if self.path.name.lower().endswith(ARCHIVE):
                _load_archive(model, self.path, strict)
            else:
                with _disable_current_modes():  # the file's tensors are real, while the model's may be deferred
                    stored = read_weights(self.path, self.mapped)
                    self.names = tuple(tensor_names(stored))
                    found = find_encoder(stored, Target(model, heads, filter_fn, strict))
                    _check_attention_heads(stored, model)
                own = model.state_dict().keys()
                state = {name: tensor for name, tensor in found.items() if name in own}
                if self.is_published:
                    cfg = {**pretrained_cfg, "source": "", "state_dict": state}
                    _builder_load(model, cfg, filter_fn=None, strict=False, **values)
                else:
                    _fill(model, state, heads)
        except UnfitWeightsError:
            raise
        except Exception as error:  # each format fails in many ways, with classes of its own
            raise UnfitWeightsError(f"cannot be loaded ({one_line(error)})") from error
        fresh = heads if strict else heads + LOOSE_FRESH
        unwritten = [name for name, version in _versions(model).items() if version == before.get(name)]
        Fit({}, model, missing=[name for name in unwritten if not name.startswith(fresh)]).check()


_builder_load = _builder.load_pretrained


@contextmanager
def loading_with(loader: Callable[..., None]) -> Iterator[None]:
    """Lets timm's builder fill new models with this loader, which gets the model's own filter."""
    calls = []

    def load(*arguments: Any, **values: Any) -> None:
        calls.append(arguments)
        loader(*arguments, **values)

    _builder.load_pretrained = load
    try:
        yield
    finally:
        _builder.load_pretrained = _builder_load
    if not calls:
        raise UnfitWeightsError("cannot be loaded (the model is not built by timm's builder, which loads weights)")


def _fill(model: nn.Module, state: dict[str, torch.Tensor], heads: tuple[str, ...]) -> None:
    """Loads a state. Skips a classifier of another shape, and adapts the first layer to the model's channels."""
    own = model.state_dict()
    state = {k: v for k, v in state.items() if not (k.startswith(heads) and v.shape != own[k].shape)}
    for name in layers_in(model.pretrained_cfg, "first_conv"):
        weight = f"{name}.weight"
        if weight in state and state[weight].ndim == 4 and state[weight].shape[1] != own[weight].shape[1]:
            state[weight] = adapt_input_conv(own[weight].shape[1], state[weight])
    model.load_state_dict(state, strict=False)


def _check_attention_heads(stored: Mapping[str, Any], model: nn.Module) -> None:
    """Refuses MoCo v3's small ViT in timm's. No tensor's shape shows their different numbers of attention heads."""
    state = stored.get("state_dict")
    names = clean_state_dict(state) if stored.get("arch") == MOCO_SMALL and isinstance(state, Mapping) else {}
    own = next((module.num_heads for module in model.modules() if hasattr(module, "num_heads")), MOCO_SMALL_HEADS)
    if own != MOCO_SMALL_HEADS and any(name.startswith("base_encoder.") for name in names):
        raise UnfitWeightsError(
            f"is MoCo v3's {MOCO_SMALL} with {MOCO_SMALL_HEADS} attention heads, the model has {own}; "
            f"give backbone.model_args: {{num_heads: {MOCO_SMALL_HEADS}}}"
        )


def _versions(model: nn.Module) -> dict[str, int]:
    """Number of in-place writes to each tensor that may be random."""
    return {name: tensor._version for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _load_archive(model: nn.Module, path: Path, strict: bool) -> None:
    """Lets a model read an archive, and checks that the model reads every array of the encoder."""
    check_content(path)
    if not hasattr(model, "load_pretrained"):
        raise UnfitWeightsError(f"cannot be loaded ({type(model).__name__} of timm reads no {ARCHIVE} files)")
    with np.load(path) as archive:
        names = archive.files
    with _noting_reads() as read:
        try:
            model.load_pretrained(str(path))
        except KeyError as error:
            advice = _archive_advice(names, str(error))
            raise UnfitWeightsError(f"cannot be loaded ({one_line(error)}); give {advice}") from error
    root = os.path.join(os.path.commonpath(read), "")  # the archive may hold other towers
    spare = CLASSIFIERS if strict else (*CLASSIFIERS, POOLING)
    for name in sorted(set(names) - read.keys()):
        if name.startswith(root) and not name.removeprefix(root).startswith(spare):
            raise UnfitWeightsError(f"has more than the model, {name!r} among it; give {_archive_advice(names, name)}")
    for name, length in read.items():
        if STACKED in name and length != len(model.blocks):
            raise UnfitWeightsError(
                f"has {length} blocks, as in {name!r}, and the model {len(model.blocks)}; "
                f"give backbone.model_args: {{depth: {length}}}, or another backbone.name"
            )


def _archive_advice(names: Iterable[str], name: str) -> str:
    """The config key that would help, given the archive's names and the name that is left over or missing."""
    if "/encoderblock_" in name:
        argument = f"depth: {len(set(re.findall(r'/encoderblock_([0-9]+)/', ' '.join(names))))}"
    elif POOLING in name:
        argument = f"global_pool: {'map' if name in names else 'token'}"
    elif "/encoder_norm/" in name:
        argument = "fc_norm: false"
    else:
        return OTHER_MODEL
    return f"backbone.model_args: {{{argument}}}, or another backbone.name"


@contextmanager
def _noting_reads() -> Iterator[dict[str, int]]:
    """Collects the name of each array that is read from an archive, and the length of its first axis."""
    read: dict[str, int] = {}
    plain = np.lib.npyio.NpzFile.__getitem__

    def note(archive: Any, name: str) -> Any:
        array = plain(archive, name)
        read[name] = len(array) if array.ndim else 1
        return array

    np.lib.npyio.NpzFile.__getitem__ = note
    try:
        yield read
    finally:
        np.lib.npyio.NpzFile.__getitem__ = plain
