"""Client optimizers over the rows of the parameter matrix, the clipping of gradients, and fp16's dynamic loss scale.

Each row is a client with its own step count. A row that is not active in a step keeps its parameters and moments to the
bit, without weight decay: values are chosen with `where`, never multiplied by 0.

Shapes: L lanes, W columns of the parameter matrix.
"""

import math

import torch

from fedpeft_dist.config.schema import AdamWConfig, ClientOptimizerConfig, SgdConfig

INITIAL_SCALE = 2.0**12
"""Loss scale of a client's first step. It is lower than usual, because a client that must lower it loses steps in every
round."""
GROWTH_INTERVAL = 200
"""Steps without an overflow after which a lane's loss scale doubles."""
MAX_TABLE = 1_000_000
"""Largest number of steps in a table. Only a beta very close to 1 needs a longer one."""


class LaneSgd:
    """torch.optim.SGD's update for each row: momentum without dampening, Nesterov, L2 weight decay."""

    def __init__(self, config: SgdConfig, theta: torch.Tensor):
        self.config = config
        self.momentum = torch.zeros_like(theta) if config.momentum else None

    def reset(self, lane: int) -> None:
        """Clears a lane's history for its next client."""
        if self.momentum is not None:
            self.momentum[lane].zero_()

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: float) -> None:
        """Updates the active rows (bool [L, 1]) of theta [L, W] in place. May overwrite grad."""
        config = self.config
        if config.weight_decay:
            grad.add_(theta, alpha=config.weight_decay)
        if self.momentum is not None:  # what follows is written over grad, to save memory
            momentum = torch.add(grad, self.momentum, alpha=config.momentum, out=None if config.nesterov else grad)
            _keep_where(active, self.momentum, momentum)
            if config.nesterov:
                grad.add_(momentum, alpha=config.momentum)
        _keep_where(active, theta, torch.sub(theta, grad, alpha=lr, out=grad))


class LaneAdamW:
    """torch.optim.AdamW's update for each row (Loshchilov and Hutter 2019, arXiv 1711.05101).

    The bias corrections 1 - beta^t come from tables that are computed once in float64. A power of a tensor over lanes
    might round by the position of the lane.
    """

    def __init__(self, config: AdamWConfig, theta: torch.Tensor):
        self.config = config
        self.mean, self.square = torch.zeros_like(theta), torch.zeros_like(theta)
        self.steps = torch.zeros(theta.shape[0], 1, dtype=torch.int64, device=theta.device)
        self.mean_corrections = _bias_corrections(config.beta1).to(theta)
        self.root_corrections = _bias_corrections(config.beta2).sqrt().to(theta)

    def reset(self, lane: int) -> None:
        for history in (self.mean, self.square, self.steps):
            history[lane].zero_()

    def step(self, theta: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, lr: float) -> None:
        config = self.config
        self.steps += active
        mean = torch.lerp(self.mean, grad, 1 - config.beta1)
        square = (self.square * config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        _keep_where(active, self.mean, mean)
        _keep_where(active, self.square, square)
        # The tables begin with step 1. Later steps than theirs get the last entry.
        mean_correction, root_correction = (
            table[(self.steps - 1).clamp(0, len(table) - 1)] for table in (self.mean_corrections, self.root_corrections)
        )
        step_size, root = lr / mean_correction, square.sqrt() / root_correction
        decayed = theta * (1 - lr * config.weight_decay)
        _keep_where(active, theta, decayed - step_size * mean / (root + config.eps))


def make_lane_optimizer(config: ClientOptimizerConfig, theta: torch.Tensor) -> LaneSgd | LaneAdamW:
    """The optimizer that a config names, with state for every row of theta."""
    return {SgdConfig: LaneSgd, AdamWConfig: LaneAdamW}[type(config)](config, theta)


class LaneLossScale:
    """The factor of each lane's loss in fp16, by which its gradient is divided again.

    The scale and its counter are a client's state. Both are reset for every client, so a client's result does not
    depend on the client before it in the lane. A lane whose gradient overflows skips its own step and halves its scale.
    """

    def __init__(self, num_lanes: int, device: torch.device | str = "cpu"):
        self.scale = torch.full((num_lanes,), INITIAL_SCALE, device=device)
        self.good_steps = torch.zeros(num_lanes, dtype=torch.int64, device=device)

    def reset(self, lane: int) -> None:
        self.scale[lane].fill_(INITIAL_SCALE)
        self.good_steps[lane].zero_()

    def unscale(self, grad: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Divides each row of grad [L, W] by its scale, in place, and updates the scales of the active lanes.

        Args:
            active: bool [L, 1], the lanes that take a step.

        Returns:
            bool [L, 1]: the active lanes whose gradient is finite.
        """
        grad.div_(self.scale.to(grad.dtype).unsqueeze(1))
        finite = torch.isfinite(grad).all(dim=1)
        active = active.squeeze(1)
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= GROWTH_INTERVAL
        scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
        self.scale = torch.where(active, scale, self.scale)
        self.good_steps = torch.where(active, torch.where(grow, 0, good), self.good_steps)
        return (active & finite).unsqueeze(1)


def clip_rows(grad: torch.Tensor, max_norm: float) -> None:
    """Scales each row of grad in place to a Euclidean norm of at most max_norm, as `clip_grad_norm_` does."""
    norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    grad.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))


def _keep_where(active: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    torch.where(active, new, old, out=old)


def _bias_corrections(beta: float) -> torch.Tensor:
    """1 - beta^t for t = 1, 2, ... until the value is 1 in float64: float64 [steps]."""
    length = 1 if beta == 0 else min(math.ceil(math.log(2**-54) / math.log(beta)), MAX_TABLE)
    return 1 - beta ** torch.arange(1, length + 1, dtype=torch.float64)
