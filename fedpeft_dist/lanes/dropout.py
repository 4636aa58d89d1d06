"""Dropout and drop-path. Their masks are functions of the sample's key, not of a generator's history.

Shapes: B batch, R = L * B rows of L lanes.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
from timm.layers import DropPath, PatchDropout
from torch import nn

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.random import fold_in, uniform


@dataclass
class SampleKeys:
    """The keys that all stochastic modules of a model share."""

    rows: torch.Tensor | None = None
    """A key for each row, int64 [R]; None turns the modules off."""


class KeyedModule(nn.Module):
    """A module that drops at random. Its name makes its masks differ from those of other modules.

    A subclass drops parts of x in `drop(x, keys)`, with the module's own keys, int64 [R].
    """

    def __init__(self, probability: float, name: str):
        super().__init__()
        self.probability = probability
        self.site = int.from_bytes(name.encode(), "big") % (2**61 - 1)
        self.keys = SampleKeys()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.keys.rows is None else self.drop(x, fold_in(self.keys.rows, self.site))


class KeyedDropout(KeyedModule):
    """Dropout of single elements."""

    def drop(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        # A windowed layer cuts each sample into several leading entries, which stay next to each other.
        elements = torch.arange(x.numel() // len(keys), device=x.device)
        draws = uniform(fold_in(keys.unsqueeze(1), elements)).view(x.shape)
        return torch.where(draws >= self.probability, x / (1 - self.probability), 0.0)


class KeyedDropPath(KeyedModule):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops a residual branch for a whole sample."""

    def __init__(self, probability: float, scale_by_keep: bool, name: str):
        super().__init__(probability, name)
        self.scale = 1 / (1 - probability) if scale_by_keep else 1.0

    def drop(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        keep = (uniform(keys) >= self.probability).view(-1, *[1] * (x.dim() - 1))
        return torch.where(keep, x * self.scale, 0.0)


def make_dropout(probability: float, name: str) -> nn.Module:
    """A keyed dropout for the module called `name`, or the identity if the probability is 0."""
    return KeyedDropout(probability, name) if probability else nn.Identity()


def key_dropout(model: nn.Module, shared: Set[nn.Module]) -> SampleKeys:
    """Replaces a model's dropout and drop-path layers by keyed ones, and removes those with probability 0.

    Args:
        shared: layers whose result all samples share. They get no dropout, because no sample's key can decide it.

    Returns:
        The keys that all keyed layers of the model use from now on, with the method's layers.

    Raises:
        ConfigError: dropout that cannot be keyed, because it is inside the fused attention, drops patches, or has no
            layer of its own.
    """
    named = list(model.named_modules())
    if getattr(model, "drop_rate", 0.0) and not any(isinstance(m, nn.Dropout) and m.p for _, m in named):
        raise ConfigError(f"backbone.model_args: drop_rate of {type(model).__name__} cannot be keyed; give 0.0")
    for name, module in named:
        if isinstance(module, PatchDropout):
            raise ConfigError(f"backbone.model_args: patch dropout ({name}) cannot be keyed; give patch_drop_rate: 0.0")
        if isinstance(module, nn.Dropout):
            if name.endswith("attn_drop") and module.p:
                raise ConfigError(
                    f"backbone.model_args: dropout {module.p} at {name} is inside the fused attention; "
                    "give attn_drop_rate: 0.0 (proj_drop_rate and drop_path_rate are supported)"
                )
            model.set_submodule(name, make_dropout(0.0 if module in shared else module.p, name))
        elif isinstance(module, DropPath):
            live = module.drop_prob and module not in shared
            keyed = KeyedDropPath(module.drop_prob, module.scale_by_keep, name) if live else nn.Identity()
            model.set_submodule(name, keyed)
    keys = SampleKeys()
    for module in model.modules():
        if isinstance(module, KeyedModule):
            module.keys = keys
    return keys
