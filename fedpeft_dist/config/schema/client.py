"""The `client` section: local training."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpeft_dist.config.schema.types import Count, Fraction, NonNegative, Positive, Section


class ConstantSchedule(Section):
    name: Literal["constant"]


class CosineSchedule(Section):
    name: Literal["cosine"]
    final: Fraction = 0.0
    """The factor that would follow the last round's; it is approached, so that no round trains for nothing."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Rounds over which the factor climbs linearly to 1."""


class ExponentialSchedule(Section):
    name: Literal["exponential"]
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99


ScheduleConfig = Annotated[ConstantSchedule | CosineSchedule | ExponentialSchedule, Field(discriminator="name")]


class SgdConfig(Section):
    name: Literal["sgd"]
    lr: Positive = 0.01
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 1.0e-4

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SgdConfig":
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov: true needs a momentum above 0; set nesterov: false or momentum: 0.9")
        return self


class AdamWConfig(Section):
    name: Literal["adamw"]
    lr: Positive = 1.0e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1.0e-8
    weight_decay: NonNegative = 0.01


ClientOptimizerConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class ClientConfig(Section):
    epochs: Count = 10
    steps: Count | None = None
    """Where given, every client takes this many local steps in place of `epochs`."""
    batch_size: Count = 64
    """A client with fewer samples takes all of them in every step; what exceeds the largest client costs nothing."""
    proximal: NonNegative = 0.0
    """FedProx's mu (arXiv 1812.06127): adds mu * (theta - global) to the gradient."""
    clip_norm: Positive | None = None
    """Clip each client's gradient to this Euclidean norm at every local step."""
    schedule: ScheduleConfig = ConstantSchedule(name="constant")
    """A factor on the client's learning rate, by round."""
    optimizer: ClientOptimizerConfig = SgdConfig(name="sgd")

    def num_steps(self, num_samples: int) -> int:
        """Local steps that a client with that many samples takes in a round."""
        if self.steps is not None:
            return self.steps if num_samples else 0
        return self.epochs * math.ceil(num_samples / self.batch_size)
