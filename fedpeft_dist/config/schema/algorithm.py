"""The `algorithm` section: what clients add to their gradients and send, and how the server combines that."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fedpeft_dist.config.schema.client import SgdConfig
from fedpeft_dist.config.schema.types import NonNegative, Section

if TYPE_CHECKING:
    from fedpeft_dist.config.schema.run import RunConfig


class AlgorithmSection(Section):
    allows_fp16: ClassVar[bool] = True

    def check(self, config: "RunConfig") -> None:
        """
        Raises:
            ValueError: the algorithm does not go with another section of the config.
        """


class FedAvgConfig(AlgorithmSection):
    """The mean of the deltas, weighted by samples (McMahan et al. 2017, arXiv 1602.05629)."""

    name: Literal["fedavg"]


class FedProxConfig(AlgorithmSection):
    """FedAvg, whose clients stay near the global parameters (Li et al. 2020, arXiv 1812.06127)."""

    name: Literal["fedprox"]
    mu: NonNegative = 0.01
    """Weight of the proximal term: mu * (theta - global) is added to the gradient."""

    def check(self, config: "RunConfig") -> None:
        if config.client.proximal:
            raise ValueError(
                f"client.proximal: {config.client.proximal} is algorithm fedprox by another name; give "
                "algorithm.mu, and client.proximal: 0.0"
            )


class ScaffoldConfig(AlgorithmSection):
    """Control variates correct each client's drift (Karimireddy et al. 2020, arXiv 1910.06378); clients count alike."""

    name: Literal["scaffold"]
    allows_fp16: ClassVar[bool] = False

    def check(self, config: "RunConfig") -> None:
        _check_no_proximal(self.name, config)
        if config.privacy.name != "none":
            raise ValueError(
                f"privacy.name: {config.privacy.name} does not go with algorithm scaffold, whose clients also "
                "send their control variates, which no privacy mechanism here accounts for; give another algorithm.name"
            )
        optimizer = config.client.optimizer
        if not isinstance(optimizer, SgdConfig) or optimizer.momentum:
            raise ValueError(
                f"client.optimizer: {optimizer.name} with momentum or moments does not go with algorithm scaffold, "
                "which reads a client's mean gradient off its delta; give {name: sgd, momentum: 0.0, nesterov: false}"
            )
        if config.runtime.precision == "fp16" and not self.allows_fp16:
            raise ValueError(
                "runtime.precision: fp16 does not go with algorithm scaffold, which counts steps that fp16 may skip; "
                "give fp32, bf16 or auto"
            )


class RobustSection(AlgorithmSection):
    def check(self, config: "RunConfig") -> None:
        _check_no_proximal(self.name, config)
        if config.privacy.name == "user":
            raise ValueError(
                f"privacy.name: user does not go with algorithm {self.name}, for its noise is that of a sum; give "
                "algorithm.name: fedavg"
            )


class TrimmedMeanConfig(RobustSection):
    """For each parameter, the mean without the smallest and the largest deltas (Yin et al. 2018, arXiv 1803.01498).

    Clients count alike.
    """

    name: Literal["trimmed_mean"]
    trim: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.2
    """Share of the cohort that is left out at each end, rounded down to a number of clients."""

    def check(self, config: "RunConfig") -> None:
        super().check(config)
        cohort = config.federation.cohort
        if not self.num_trimmed(cohort):
            raise ValueError(
                f"algorithm.trim: {self.trim} of a cohort of {cohort} leaves nobody out; give at least "
                f"{1 / cohort:.4g} and less than 0.5, with federation.cohort at least 3"
            )

    def num_trimmed(self, num_clients: int) -> int:
        """How many of so many clients are left out at each end."""
        return int(round(self.trim * num_clients, 9))  # 0.29 * 100 is a little below 29


class MedianConfig(RobustSection):
    """For each parameter, the median of the deltas (Yin et al. 2018, arXiv 1803.01498). Clients count alike."""

    name: Literal["median"]


AlgorithmConfig = Annotated[
    FedAvgConfig | FedProxConfig | ScaffoldConfig | TrimmedMeanConfig | MedianConfig, Field(discriminator="name")
]


def _check_no_proximal(name: str, config: "RunConfig") -> None:
    if config.client.proximal:
        raise ValueError(
            f"client.proximal: {config.client.proximal} is algorithm fedprox by another name, and does not go with "
            f"algorithm {name}; give client.proximal: 0.0"
        )
