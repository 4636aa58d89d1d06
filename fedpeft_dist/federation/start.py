"""The parameters before the first round: the method's own, or those of the folder that `method.init` names.

The folder is an earlier run's directory, a safetensors export, or an adapter of Hugging Face peft. Every trained tensor
must be there under its name and in its shape, and nothing else. Only a classifier may be missing or have other classes.
It then starts anew, and the run's log says so.

Shapes: P trainable parameters.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from fedpeft_dist.backbones.timm_backbone import classifier_names
from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.schema import BackboneConfig, MethodConfig, RunConfig
from fedpeft_dist.federation.peft_folder import ADAPTER_CONFIG, WEIGHTS, read_adapter
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.methods.method import Tensors
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory

FREE = {"init", "dropout"}
"""Keys of a method that do not change what its trained tensors mean."""


@dataclass(frozen=True)
class Start:
    """The parameters before the first round."""

    vector: torch.Tensor
    """float32 [P], on the CPU."""
    sha256: str = ""
    """Digest of the vector; the empty text for the method's own values."""
    note: str = ""
    """A line on where the parameters come from; empty for the method's own values."""


@dataclass(frozen=True)
class Saved:
    """The trained parameters of an earlier run, and what they belong to."""

    tensors: Tensors
    backbone_sha256: str
    method: MethodConfig
    backbone: BackboneConfig


def find_start(config: RunConfig, model: LaneModel) -> Start:
    """
    Raises:
        ConfigError: the folder of `method.init` cannot be read, or is of another method, backbone or shape.
    """
    if config.method.init is None:
        return Start(model.initial_vector())
    folder, saved = Path(config.method.init), None
    told, heads = f"method.init: '{folder}'", _heads(model)
    if (folder / ADAPTER_CONFIG).is_file():
        tensors = read_adapter(folder, config.method, model)
    else:
        saved = _read_saved(folder, config.method.name)
        tensors = dict(saved.tensors)
    reasons = _renew_head(tensors, heads)
    if reasons and heads.keys() == model.layout.shapes.keys():
        raise ConfigError(f"{told} holds nothing to start from: {reasons[0]}; leave method.init out")
    _check_tensors(told, tensors, model)
    if saved is not None:
        _check_settings(told, saved, config, model)
    vector = model.layout.join(tensors).float().cpu()
    if not vector.isfinite().all():
        raise ConfigError(f"{told} holds parameters that are not finite; give another folder")
    note = f"starts from '{folder}'"
    if reasons:
        note += f", but with a fresh head: {'; '.join(reasons)}"
    if config.privacy.name != "none":
        note += "; the privacy guarantee does not cover the data that the folder was trained on"
    return Start(vector, hashlib.sha256(vector.numpy().data).hexdigest(), note)


def _read_saved(folder: Path, method: str) -> Saved:
    """The parameters of a run's directory or of its safetensors export.

    Raises:
        ConfigError: the folder is neither, the run has not finished, or it was trained by another method.
    """
    told, directory = f"method.init: '{folder}'", RunDirectory(folder)
    is_run = directory.config_file.is_file()
    if is_run and (state := directory.read_state() or {}).get("state") != COMPLETE:
        raise ConfigError(f"{told} is a run that is {state.get('state', 'not begun')}; give a complete one")
    if not is_run and not directory.trainable_file.is_file():
        reason = "holds nothing to start from" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"{told} {reason}; give a complete run's directory, a safetensors export, or a peft adapter "
            f"({ADAPTER_CONFIG} and {WEIGHTS})"
        )
    tensors, metadata = directory.read_trainable()
    try:
        if is_run:
            stored = directory.stored_config()
            sections = stored.method, stored.backbone
        else:
            section = TypeAdapter(MethodConfig).validate_json(metadata["method"])
            sections = section, BackboneConfig.model_validate_json(metadata["backbone"])
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"{told} does not say how it was trained ({one_line(error, 200)})") from None
    if sections[0].name != method:
        raise ConfigError(f"{told} was trained by method {sections[0].name!r}, not {method!r}; give another folder")
    return Saved(tensors, metadata["backbone_sha256"], *sections)


def _check_settings(told: str, saved: Saved, config: RunConfig, model: LaneModel) -> None:
    """Refuses parameters that mean something else here.

    Raises:
        ConfigError: the method had other settings, or the backbone was another one.
    """
    theirs, ours = (method.model_dump(mode="json", exclude=FREE) for method in (saved.method, config.method))
    tensors = {name for name, t in model.backbone.plain.state_dict().items() if t.is_floating_point()}
    is_whole = tensors <= model.layout.shapes.keys()  # nothing of the backbone stays
    # The digest is that of the classifier before training, too. So it differs with the seed and the classes.
    is_known = is_whole or saved.backbone_sha256 == model.backbone.sha256
    if not is_known:
        theirs |= {f"backbone.{key}": value for key, value in saved.backbone.model_dump(mode="json").items()}
        ours |= {f"backbone.{key}": value for key, value in config.backbone.model_dump(mode="json").items()}
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        changes = ", ".join(f"{key} ({theirs.get(key)} there, {ours[key]} here)" for key in differing)
        raise ConfigError(f"{told} was trained with other settings: {changes}; give the same, or another folder")
    if not is_known and not config.backbone.pretrained and config.backbone.checkpoint is None:
        raise ConfigError(
            f"{told} was trained on a backbone of random weights, with another seed or other classes; give the seed "
            "and the classes that it had, or pre-trained weights"
        )


def _heads(model: LaneModel) -> Tensors:
    """The tensors of the classifier before training, by name."""
    heads = tuple(f"{name}." for name in classifier_names(model.backbone.model))
    return {name: tensor for name, tensor in model.initial.items() if name.startswith(heads)}


def _renew_head(tensors: dict[str, torch.Tensor], heads: Tensors) -> list[str]:
    """Puts the whole fresh classifier in the place of one that is missing or has other classes, and says why."""
    reasons = []
    for name, fresh in heads.items():
        if name not in tensors:
            reasons.append(f"{name} is not there")
        elif tensors[name].shape != fresh.shape:
            reasons.append(f"{name} is {_size(tensors[name])} there and {_size(fresh)} here")
    tensors.update(heads if reasons else {})
    return reasons


def _check_tensors(told: str, tensors: Tensors, model: LaneModel) -> None:
    """
    Raises:
        ConfigError: a trained tensor is missing, unknown or of another shape.
    """
    shapes = model.layout.shapes
    missing, unknown = ([n for n in a if n not in b] for a, b in ((shapes, tensors), (tensors, shapes)))
    if missing:
        raise ConfigError(f"{told} lacks {missing[0]!r}, one of {len(missing)} such tensors that this run trains")
    if unknown:
        raise ConfigError(f"{told} has {unknown[0]!r}, one of {len(unknown)} such tensors that this run does not train")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            own = " x ".join(map(str, shape))
            raise ConfigError(f"{told}: {name!r} is {_size(tensors[name])} there and {own} here; give the same method")


def _size(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
