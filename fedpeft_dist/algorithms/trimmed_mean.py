"""Robust means (Yin et al. 2018, arXiv 1803.01498): some clients may send anything without carrying the mean away.

Shapes: M cohort, V numbers that a client sends.
"""

import torch

from fedpeft_dist.algorithms.algorithm import Algorithm


class TrimmedMean(Algorithm):
    """The coordinate-wise trimmed mean (definition 2): floor(trim * M) clients are left out at each end."""

    gathers = True
    counts_alike = True

    def combine(self, sent: torch.Tensor) -> torch.Tensor:
        cut = self.config.num_trimmed(len(sent))
        return sent.sort(dim=0).values[cut : len(sent) - cut].double().mean(dim=0).float()


class Median(Algorithm):
    """The coordinate-wise median (definition 1); of an even number, the mean of the middle two."""

    gathers = True
    counts_alike = True

    def combine(self, sent: torch.Tensor) -> torch.Tensor:
        middle = sent.sort(dim=0).values[(len(sent) - 1) // 2 : len(sent) // 2 + 1]
        return middle.double().mean(dim=0).float()
