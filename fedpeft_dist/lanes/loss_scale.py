"""fp16's dynamic loss scale, one per lane.

The scale and its counter are a client's state. Both are reset for every client, so a client's result does not depend
on the client before it in the lane. A lane whose gradient overflows skips its own step and halves its own scale.

Shapes: L lanes, W columns of the parameter matrix.
"""

import torch

INITIAL_SCALE = 2.0**12
"""Scale of a client's first step. It is lower than usual, because a client that must lower it loses steps in every
round."""
GROWTH_INTERVAL = 200
"""Steps without an overflow after which a lane's scale doubles."""


class LaneLossScale:
    """The factor of each lane's loss, by which its gradient is divided again."""

    def __init__(self, num_lanes: int, device: torch.device | str = "cpu"):
        self.scale = torch.full((num_lanes,), INITIAL_SCALE, device=device)
        self.good_steps = torch.zeros(num_lanes, dtype=torch.int64, device=device)

    def reset(self, lane: int) -> None:
        self.scale[lane] = INITIAL_SCALE
        self.good_steps[lane] = 0

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
