"""Client optimizers over the rows of the parameter matrix, and the changes to gradients before a step.

Each row is a client with its own step count. A row that is not active in a step keeps its parameters and moments to the
bit, without weight decay: values are chosen with `where`, never multiplied by 0.

Shapes: L lanes, W columns of the parameter matrix.
"""

import math
from typing import Protocol

import torch

from fedpeft_dist.config.schema import AdamWConfig, ClientOptimizerConfig, SgdConfig


class LaneOptimizer(Protocol):
    def reset(self, lane: int) -> None:
        """Clears a lane's history for its next client."""

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: float) -> None:
        """Updates the active rows (bool [L, 1]) of theta [L, W] in place. May overwrite grad."""


class LaneSgd:
    """torch.optim.SGD's update for each row: momentum without dampening, Nesterov, L2 weight decay."""

    def __init__(self, config: SgdConfig, theta: torch.Tensor):
        self.config = config
        self.momentum = torch.zeros_like(theta) if config.momentum else None

    def reset(self, lane: int) -> None:
        if self.momentum is not None:
            self.momentum[lane].zero_()

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: float) -> None:
        config = self.config
        if config.weight_decay:
            grad.add_(theta, alpha=config.weight_decay)
        update = grad
        if self.momentum is not None:
            momentum = torch.add(grad, self.momentum, alpha=config.momentum)
            _keep_where(active, self.momentum, momentum)
            update = grad.add_(momentum, alpha=config.momentum) if config.nesterov else momentum
        _keep_where(active, theta, torch.sub(theta, update, alpha=lr))


class LaneAdamW:
    """torch.optim.AdamW's update for each row (Loshchilov and Hutter 2019, arXiv 1711.05101).

    The bias corrections 1 - beta^t come from tables that are computed once in float64. A power of a tensor over lanes
    might round by the position of the lane.
    """

    def __init__(self, config: AdamWConfig, theta: torch.Tensor):
        self.config = config
        self.mean = torch.zeros_like(theta)
        self.square = torch.zeros_like(theta)
        self.steps = torch.zeros(theta.shape[0], 1, dtype=torch.int64, device=theta.device)
        self.mean_corrections = _bias_corrections(config.beta1).to(theta)
        self.root_corrections = _bias_corrections(config.beta2).sqrt().to(theta)

    def reset(self, lane: int) -> None:
        self.mean[lane].zero_()
        self.square[lane].zero_()
        self.steps[lane] = 0

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: float) -> None:
        config = self.config
        self.steps += active
        mean = torch.lerp(self.mean, grad, 1 - config.beta1)
        square = (self.square * config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        _keep_where(active, self.mean, mean)
        _keep_where(active, self.square, square)
        step_size = lr / _look_up(self.mean_corrections, self.steps)
        root = square.sqrt() / _look_up(self.root_corrections, self.steps)
        decayed = theta * (1 - lr * config.weight_decay)
        _keep_where(active, theta, decayed - step_size * mean / (root + config.eps))


def make_lane_optimizer(config: ClientOptimizerConfig, theta: torch.Tensor) -> LaneOptimizer:
    """The optimizer that a config names, with state for every row of theta."""
    return {SgdConfig: LaneSgd, AdamWConfig: LaneAdamW}[type(config)](config, theta)


def clip_rows(grad: torch.Tensor, max_norm: float) -> None:
    """Scales each row of grad in place to a Euclidean norm of at most max_norm, as `clip_grad_norm_` does."""
    norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    grad.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))


def _keep_where(active: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    torch.where(active, new, old, out=old)


MAX_TABLE = 1_000_000
"""Largest number of steps in a table. Only a beta very close to 1 needs a longer one."""


def _bias_corrections(beta: float) -> torch.Tensor:
    """1 - beta^t for t = 1, 2, ... until the value is 1 in float64: float64 [steps]."""
    length = 1 if beta == 0 else min(math.ceil(math.log(2**-54) / math.log(beta)), MAX_TABLE)
    return 1 - beta ** torch.arange(1, length + 1, dtype=torch.float64)


def _look_up(table: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The table's entry for each lane's step, counted from 1. Later steps get the last entry."""
    return table[(steps - 1).clamp(0, len(table) - 1)]
