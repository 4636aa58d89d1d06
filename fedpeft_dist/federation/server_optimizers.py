"""Server optimizers: they step on the pseudo-gradient, which is minus the mean delta.

`sgd` with rate 1 and no momentum is FedAvg (McMahan et al. 2017); with momentum, FedAvgM (Hsu et al. 2019). `adam`,
`yogi` and `adagrad` are FedOpt's (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), without bias correction, as there.
Replicated: every rank steps its own copy on the same numbers.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fedpeft_dist.config import schema


class ServerOptimizer(Protocol):
    state: dict[str, torch.Tensor]
    """What a checkpoint must hold: float32 [P] each. A step replaces them, so that it can be taken back."""

    def step(self, vector: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The next global vector; both are float32 [P]."""


class ServerSgd:
    def __init__(self, config: schema.ServerSgdConfig, num_parameters: int, device: torch.device):
        self.config = config
        self.state = {"momentum": torch.zeros(num_parameters, device=device)} if config.momentum else {}

    def step(self, vector: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        if self.state:
            gradient = self.state["momentum"] * self.config.momentum + gradient
            self.state = {"momentum": gradient}
        return vector - self.config.lr * gradient


class ServerAdaptive:
    """Adam, Yogi and Adagrad differ in how they follow the squared pseudo-gradient."""

    def __init__(self, config: schema.ServerAdaptiveSection, num_parameters: int, device: torch.device):
        self.config = config
        self.state = {
            "mean": torch.zeros(num_parameters, device=device),
            "square": torch.full((num_parameters,), config.tau**2, device=device),
        }

    def step(self, vector: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        config = self.config
        mean = (self.state["mean"] * config.beta1).add_(gradient, alpha=1 - config.beta1)
        square, new = self.state["square"], gradient.square()
        match config:
            case schema.ServerAdagradConfig():
                square = square + new
            case schema.ServerYogiConfig():
                square = square - (1 - config.beta2) * new * torch.sign(square - new)
            case _:
                square = (square * config.beta2).add_(new, alpha=1 - config.beta2)
        self.state = {"mean": mean, "square": square}
        return vector - config.lr * mean / (square.sqrt() + config.tau)


SERVER_OPTIMIZERS = {
    schema.ServerSgdConfig: ServerSgd,
    schema.ServerAdamConfig: ServerAdaptive,
    schema.ServerYogiConfig: ServerAdaptive,
    schema.ServerAdagradConfig: ServerAdaptive,
}


def make_server_optimizer(
    config: schema.ServerOptimizerConfig, num_parameters: int, device: torch.device
) -> ServerOptimizer:
    """The server optimizer that a config names, before its first round."""
    return SERVER_OPTIMIZERS[type(config)](config, num_parameters, device)
