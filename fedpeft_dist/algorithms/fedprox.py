"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg, whose clients stay near the global parameters."""

import torch

from fedpeft_dist.algorithms.algorithm import Algorithm


class FedProx(Algorithm):
    """Adds the gradient of the proximal term mu / 2 * ||theta - start||^2, which is mu * (theta - start)."""

    def add_to_gradient(
        self, grad: torch.Tensor, theta: torch.Tensor, start: torch.Tensor, offsets: torch.Tensor | None
    ) -> None:
        if self.config.mu:
            grad.add_(theta - start, alpha=self.config.mu)
