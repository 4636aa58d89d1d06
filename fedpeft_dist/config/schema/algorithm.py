"""Training: the sections `client` (local training), `algorithm` (how deltas are made and combined) and `server`."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Count, Fraction, NonNegative, Positive, Section

if TYPE_CHECKING:
    from fedpeft_dist.config.schema.run import RunConfig


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

    def problems(self) -> dict[str, bool]:
        message = "nesterov: true needs a momentum above 0; set nesterov: false or momentum: 0.9"
        return {message: self.nesterov and self.momentum == 0.0}


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
    """The local steps of every client in a round, in place of `epochs`; null goes by epochs."""
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


class AlgorithmSection(Section):
    allows_fp16: ClassVar[bool] = True
    vectors_sent: ClassVar[int] = 1
    """V / P: what a client sends in a round, in vectors of P float32 numbers."""
    vectors_received: ClassVar[int] = 1
    """What a client receives in a round, in vectors of P float32 numbers."""

    def conflicts(self, config: "RunConfig") -> dict[str, bool]:
        """The problems of this section with the other sections of a run's config, as in `problems`."""
        proximal = config.client.proximal
        return {
            f"client.proximal: {proximal} is fedprox's algorithm.mu by another name, and goes with algorithm fedavg "
            "alone; give client.proximal: 0.0": proximal > 0.0 and self.name != "fedavg"
        }


class FedAvgConfig(AlgorithmSection):
    """The mean of the deltas, weighted by samples (McMahan et al. 2017, arXiv 1602.05629)."""

    name: Literal["fedavg"]


class FedProxConfig(AlgorithmSection):
    """FedAvg, whose clients stay near the global parameters (Li et al. 2020, arXiv 1812.06127)."""

    name: Literal["fedprox"]
    mu: NonNegative = 0.01
    """Weight of the proximal term: mu * (theta - global) is added to the gradient."""


class ScaffoldConfig(AlgorithmSection):
    """Control variates correct each client's drift (Karimireddy et al. 2020, arXiv 1910.06378); clients count alike."""

    name: Literal["scaffold"]
    allows_fp16: ClassVar[bool] = False
    vectors_sent: ClassVar[int] = 2
    vectors_received: ClassVar[int] = 2

    def conflicts(self, config: "RunConfig") -> dict[str, bool]:
        optimizer, privacy = config.client.optimizer, config.privacy.name
        return super().conflicts(config) | {
            f"privacy.name: {privacy} does not go with algorithm scaffold, whose clients also send their control "
            "variates, which no privacy mechanism here accounts for; give another algorithm.name": privacy != "none",
            f"client.optimizer: {optimizer.name} with momentum or moments does not go with algorithm scaffold, which "
            "reads a client's mean gradient off its delta; give {name: sgd, momentum: 0.0, nesterov: false}": (
                optimizer.name != "sgd" or optimizer.momentum > 0.0
            ),
            "runtime.precision: fp16 does not go with algorithm scaffold, which counts steps that fp16 may skip; give "
            "fp32, bf16 or auto": config.runtime.precision == "fp16",
        }


class RobustSection(AlgorithmSection):
    def conflicts(self, config: "RunConfig") -> dict[str, bool]:
        return super().conflicts(config) | {
            f"privacy.name: user does not go with algorithm {self.name}, for its noise is that of a sum; give "
            "algorithm.name: fedavg": config.privacy.name == "user"
        }


class TrimmedMeanConfig(RobustSection):
    """The mean without the smallest and largest deltas (Yin et al. 2018, arXiv 1803.01498); clients count alike."""

    name: Literal["trimmed_mean"]
    trim: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.2
    """Share of the cohort that is left out at each end, rounded down to a number of clients."""

    def conflicts(self, config: "RunConfig") -> dict[str, bool]:
        cohort = config.federation.cohort
        return super().conflicts(config) | {
            f"algorithm.trim: {self.trim} of a cohort of {cohort} leaves nobody out; give at least {1 / cohort:.4g} "
            "and less than 0.5, with federation.cohort at least 3": not self.num_trimmed(cohort)
        }

    def num_trimmed(self, num_clients: int) -> int:
        """How many of so many clients are left out at each end."""
        return int(round(self.trim * num_clients, 9))  # 0.29 * 100 is a little below 29


class MedianConfig(RobustSection):
    """For each parameter, the median of the deltas (Yin et al. 2018, arXiv 1803.01498). Clients count alike."""

    name: Literal["median"]


AlgorithmConfig = Annotated[
    FedAvgConfig | FedProxConfig | ScaffoldConfig | TrimmedMeanConfig | MedianConfig, Field(discriminator="name")
]


class ServerSgdConfig(Section):
    name: Literal["sgd"]
    lr: Positive = 1.0
    momentum: Fraction = 0.0


class ServerAdaptiveSection(Section):
    """FedOpt's adaptive server optimizers (Reddi et al. 2021, arXiv 2003.00295)."""

    lr: Positive = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1.0e-3


class ServerAdamConfig(ServerAdaptiveSection):
    name: Literal["adam"]


class ServerYogiConfig(ServerAdaptiveSection):
    name: Literal["yogi"]


class ServerAdagradConfig(ServerAdaptiveSection):
    name: Literal["adagrad"]
    beta1: Fraction = 0.0


ServerOptimizerConfig = Annotated[
    ServerSgdConfig | ServerAdamConfig | ServerYogiConfig | ServerAdagradConfig, Field(discriminator="name")
]


class ServerConfig(Section):
    optimizer: ServerOptimizerConfig = ServerSgdConfig(name="sgd")
