"""Dropout and drop-path. Their masks are functions of the sample's key, not of a generator's history.

Shapes: L lanes, B batch, R = L * B rows.
"""

from dataclasses import dataclass

import torch
from torch import nn

from fedpeft_dist.lanes.random import fold_in, uniform


@dataclass
class SampleKeys:
    """The keys that all stochastic modules of a model share."""

    rows: torch.Tensor | None = None
    """A key for each row, int64 [R]; None turns the modules off."""


class KeyedDropout(nn.Module):
    """Dropout of single elements. The module's name makes its masks differ from those of other modules."""

    def __init__(self, probability: float, name: str):
        super().__init__()
        self.probability, self.site = probability, _site(name)
        self.keys = SampleKeys()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.keys.rows
        if rows is None:
            return x
        # A windowed layer cuts each sample into several leading entries, which stay next to each other.
        per_row = x.numel() // rows.shape[0]
        elements = torch.arange(per_row, device=x.device)
        draws = uniform(fold_in(fold_in(rows, self.site).unsqueeze(1), elements)).view(x.shape)
        return torch.where(draws >= self.probability, x / (1 - self.probability), torch.zeros((), dtype=x.dtype))


class KeyedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops a residual branch for a whole sample."""

    def __init__(self, probability: float, scale_by_keep: bool, name: str):
        super().__init__()
        self.probability, self.site = probability, _site(name)
        self.keys = SampleKeys()
        self.scale = 1 / (1 - probability) if scale_by_keep else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.keys.rows
        if rows is None:
            return x
        keep = uniform(fold_in(rows, self.site)) >= self.probability
        keep = keep.view(-1, *[1] * (x.dim() - 1))
        return torch.where(keep, x * self.scale, torch.zeros((), dtype=x.dtype))


def make_dropout(probability: float, name: str) -> nn.Module:
    """A keyed dropout for the module called `name`, or the identity if the probability is 0."""
    return KeyedDropout(probability, name) if probability else nn.Identity()


def share_keys(model: nn.Module, keys: SampleKeys) -> None:
    """Makes every keyed module of a model use these keys."""
    for module in model.modules():
        if isinstance(module, (KeyedDropout, KeyedDropPath)):
            module.keys = keys


def _site(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(name.encode(), "big") % (2**61 - 1)
