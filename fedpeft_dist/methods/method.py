"""A PEFT method of a config: how it changes a backbone, and how its result goes to plain timm and Hugging Face peft.

A method is one class, one line in METHODS (`methods/__init__.py`) and one section in
`config/schema/method.py`. Everything else asks the class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.schema import MethodConfig
from fedpeft_dist.methods.lane_model import LaneModel

Tensors = Mapping[str, torch.Tensor]
"""Tensors by name: timm's names for a backbone, names on the wire for trained parameters."""


class Method(ABC):
    """A method as one config section sets it."""

    merge: Callable[[Tensors, Tensors], dict[str, torch.Tensor]] | None = None
    """Turns (the backbone before training, the trained parameters) into the plain timm model's tensors. None: the
    method adds modules, such as adapters, that timm does not have."""
    merges_exactly = False
    """Whether `merge` puts trained tensors in place of the backbone's, and computes nothing."""
    to_peft: Callable[[nn.Module, Tensors], tuple[dict[str, Any], Tensors]] | None = None
    """Turns (the backbone's model, the trained parameters) into the method's keys of peft's adapter_config.json and the
    tensors by peft's names, without peft's prefix of a layer, `base_model.model.`. None: Hugging Face peft does not
    know the method."""

    def __init__(self, config: MethodConfig):
        self.config = config

    @abstractmethod
    def build(self, backbone: Backbone) -> LaneModel:
        """Changes the backbone in place into one that the method trains.

        Raises:
            ConfigError: the method does not fit the backbone.
        """
