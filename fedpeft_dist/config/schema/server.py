"""The `server` section: how the global parameters follow the mean delta."""

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Fraction, Positive, Section


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
