"""Server optimizers: they step on the pseudo-gradient, which is minus the mean delta.

`sgd` with rate 1 and no momentum is FedAvg (McMahan et al. 2017); with momentum, FedAvgM (Hsu et al. 2019). `adam`,
`yogi` and `adagrad` are FedOpt's (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), without bias correction, as there.
Every rank takes the same step on the same numbers.

Shapes: P trainable parameters.
"""

from collections.abc import Mapping

import torch

from fedpeft_dist.config import schema

Step = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


class ServerSgd:
    """Steps on a pseudo-gradient, float32 [P]; the moments are values, which a step replaces."""

    def __init__(self, config: schema.ServerSgdConfig):
        self.config = config

    def initial_state(self, num_parameters: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {"momentum": torch.zeros(num_parameters, device=device)} if self.config.momentum else {}

    def step(self, vector: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor]) -> Step:
        if state:
            gradient = state["momentum"] * self.config.momentum + gradient
            state = {"momentum": gradient}
        return vector - self.config.lr * gradient, state


class ServerAdaptive(ServerSgd):
    """Adam, Yogi and Adagrad differ in how they follow the squared pseudo-gradient."""

    def initial_state(self, num_parameters: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "mean": torch.zeros(num_parameters, device=device),
            "square": torch.full((num_parameters,), self.config.tau**2, device=device),
        }

    def step(self, vector: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor]) -> Step:
        config = self.config
        mean = (state["mean"] * config.beta1).add_(gradient, alpha=1 - config.beta1)
        square, new = state["square"], gradient.square()
        match config:
            case schema.ServerAdagradConfig():
                square = square + new
            case schema.ServerYogiConfig():
                square = square - (1 - config.beta2) * new * torch.sign(square - new)
            case _:
                square = (square * config.beta2).add_(new, alpha=1 - config.beta2)
        return vector - config.lr * mean / (square.sqrt() + config.tau), {"mean": mean, "square": square}


SERVER_OPTIMIZERS = {
    schema.ServerSgdConfig: ServerSgd,
    schema.ServerAdamConfig: ServerAdaptive,
    schema.ServerYogiConfig: ServerAdaptive,
    schema.ServerAdagradConfig: ServerAdaptive,
}


def make_server_optimizer(config: schema.ServerOptimizerConfig) -> ServerSgd:
    """The server optimizer that a config names."""
    return SERVER_OPTIMIZERS[type(config)](config)
