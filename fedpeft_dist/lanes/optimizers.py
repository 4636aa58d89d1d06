"""Client optimizers over the rows of the parameter matrix, and what is done to gradients before them.

Each row is a client with its own step count. A row that is not active in a step keeps its parameters, moments and decay
to the bit: values are chosen with `where`, never multiplied by 0.

Shapes: L lanes, W columns of the parameter matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fedpeft_dist.config.schema import AdamWConfig, ClientOptimizerConfig, SgdConfig


class LaneOptimizer(Protocol):
    def reset(self, lane: int) -> None:
        """Forgets a lane's history: its next client starts afresh."""

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: Sequence[float]) -> None:
        """Updates theta [L, W] in place where active (bool [L, 1]); grad may be overwritten; one rate per lane."""


class LaneSgd:
    """torch.optim.SGD's update (momentum without dampening, Nesterov, L2 weight decay), a row a client."""

    def __init__(self, config: SgdConfig, theta: torch.Tensor):
        self.config = config
        self.momentum = torch.zeros_like(theta) if config.momentum else None

    def reset(self, lane: int) -> None:
        if self.momentum is not None:
            self.momentum[lane].zero_()

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: Sequence[float]) -> None:
        config = self.config
        if config.weight_decay:
            grad.add_(theta, alpha=config.weight_decay)
        update = grad
        if self.momentum is not None:
            momentum = torch.add(grad, self.momentum, alpha=config.momentum)
            _keep_where(active, self.momentum, momentum)
            update = grad.add_(momentum, alpha=config.momentum) if config.nesterov else momentum
        _keep_where(active, theta, theta - _per_lane(lr, theta) * update)


class LaneAdamW:
    """torch.optim.AdamW's update (Loshchilov and Hutter 2019, arXiv 1711.05101), a row a client.

    The bias corrections 1 - beta^t are computed in Python for each lane: a lane-sized power on the device may round by
    its position in the tensor.
    """

    def __init__(self, config: AdamWConfig, theta: torch.Tensor):
        self.config = config
        self.mean = torch.zeros_like(theta)
        self.square = torch.zeros_like(theta)
        self.steps = [0] * theta.shape[0]

    def reset(self, lane: int) -> None:
        self.mean[lane].zero_()
        self.square[lane].zero_()
        self.steps[lane] = 0

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: Sequence[float]) -> None:
        config = self.config
        for lane, is_active in enumerate(active.flatten().tolist()):
            self.steps[lane] += is_active
        steps = [max(step, 1) for step in self.steps]
        mean = torch.lerp(self.mean, grad, 1 - config.beta1)
        square = (self.square * config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        _keep_where(active, self.mean, mean)
        _keep_where(active, self.square, square)
        root_correction = _per_lane([(1 - config.beta2**t) ** 0.5 for t in steps], theta)
        step_size = _per_lane([rate / (1 - config.beta1**t) for rate, t in zip(lr, steps)], theta)
        decay = _per_lane([1 - rate * config.weight_decay for rate in lr], theta)
        _keep_where(active, theta, theta * decay - step_size * mean / (square.sqrt() / root_correction + config.eps))


def make_lane_optimizer(config: ClientOptimizerConfig, theta: torch.Tensor) -> LaneOptimizer:
    """The optimizer that a config names, with state for the rows of theta."""
    return {SgdConfig: LaneSgd, AdamWConfig: LaneAdamW}[type(config)](config, theta)


def add_proximal(grad: torch.Tensor, theta: torch.Tensor, start: torch.Tensor, mu: float) -> None:
    """Adds the gradient of FedProx's mu / 2 * ||theta - start||^2 (arXiv 1812.06127); start is the round's row [W]."""
    grad.add_(theta - start, alpha=mu)


def clip_rows(grad: torch.Tensor, max_norm: float) -> None:
    """Scales each row of grad in place to a Euclidean norm of at most max_norm, as `clip_grad_norm_` does."""
    norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    grad.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))


def _keep_where(active: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    torch.where(active, new, old, out=old)


def _per_lane(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
