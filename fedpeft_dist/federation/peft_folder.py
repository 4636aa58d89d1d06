"""Reads an adapter of Hugging Face peft as a method's own tensors: the way back from the method's `to_peft`.

A method says only how its tensors become peft's. That is a renaming, and a shift and a scaling of single numbers, so
that three known inputs show where each number goes. Methods therefore need no second function.

Shapes: P trainable parameters.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedpeft_dist.backbones.timm_backbone import classifier_names
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import MethodConfig
from fedpeft_dist.methods import make_method
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.methods.method import Tensors
from fedpeft_dist.tracking.run_directory import read_json

ADAPTER_CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
MORE_KEYS = ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora")
"""Keys of peft that change what an adapter computes, and that a method need not name while they are empty."""


def read_adapter(folder: Path, config: MethodConfig, model: LaneModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the method's names, with the classifier if the adapter has one, in any shape.

    Raises:
        ConfigError: the files cannot be read, or the adapter is of another method, other settings or other shapes.
    """
    told, method = f"method.init: '{folder}'", make_method(config)
    stored_keys = read_json(folder / ADAPTER_CONFIG, "peft_type")
    if method.to_peft is None:
        raise ConfigError(f"{told} is a peft adapter, and peft does not know method {config.name!r}; give a run")
    try:
        stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{told}: {WEIGHTS} cannot be read ({error})") from None

    def peft(vector: torch.Tensor) -> Tensors:
        return method.to_peft(model.backbone.model, model.layout.split(vector))[1]

    size = model.layout.num_parameters
    keys = method.to_peft(model.backbone.model, model.layout.split(torch.zeros(size, dtype=torch.float64)))[0]
    _check_keys(told, stored_keys, keys)
    zero, one = (peft(torch.full((size,), value, dtype=torch.float64)) for value in (0.0, 1.0))
    places = peft(torch.arange(size, dtype=torch.float64))
    heads = tuple(f"{name}." for name in classifier_names(model.backbone.model))
    vector, found = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
    for name in (name for name in zero if not name.startswith(heads)):
        constant, slope = zero[name].double(), one[name].double() - zero[name].double()
        value = _taken(told, name, stored, constant)
        is_trained = slope != 0
        if not torch.equal(value[~is_trained].float(), constant[~is_trained].float()):
            raise ConfigError(f"{told}: {name!r} holds frozen numbers that differ from this run's")
        own = ((places[name].double() - constant)[is_trained] / slope[is_trained]).round().long()
        vector[own], found[own] = (value - constant)[is_trained] / slope[is_trained], True
    unknown = [name for name in stored if name not in zero and not name.startswith(heads)]
    if unknown:
        raise ConfigError(f"{told} has {unknown[0]!r}, one of {len(unknown)} such tensors that this run does not train")
    tensors = {name: tensor for name, tensor in model.layout.split(vector).items() if not name.startswith(heads)}
    complete = model.layout.split(found)
    assert all(complete[name].all() for name in tensors), "the method's to_peft leaves numbers out"
    return tensors | {name: tensor for name, tensor in stored.items() if name.startswith(heads)}


def _taken(told: str, name: str, stored: Tensors, expected: torch.Tensor) -> torch.Tensor:
    """The adapter's tensor of that name, in float64."""
    if name not in stored:
        raise ConfigError(f"{told} lacks {name!r}, which this run trains")
    if stored[name].shape != expected.shape:
        there, here = (" x ".join(map(str, tensor.shape)) for tensor in (stored[name], expected))
        raise ConfigError(f"{told}: {name!r} is {there} there and {here} here; give the same method")
    return stored[name].double()


def _check_keys(told: str, stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuses an adapter that computes something else with the same tensors."""
    for key in {**own, **dict.fromkeys(MORE_KEYS)}:
        # Which modules are adapted is seen by the tensors; dropout and the initial values do not change their meaning.
        if key.endswith("modules") or "init" in key or "dropout" in key:
            continue
        theirs, ours = stored.get(key) or None, own.get(key) or None
        if theirs != ours:
            raise ConfigError(f"{told} was trained with other settings: {key} ({theirs} there, {ours} here)")
