"""Federated algorithms: one file each. ALGORITHMS maps each algorithm's config class to its class."""

from fedpeft_dist.algorithms.algorithm import Algorithm, Federation
from fedpeft_dist.algorithms.fedprox import FedProx
from fedpeft_dist.algorithms.scaffold import Scaffold
from fedpeft_dist.algorithms.trimmed_mean import Median, TrimmedMean
from fedpeft_dist.config import schema
from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER, Traffic

ALGORITHMS: dict[type, type[Algorithm]] = {
    schema.FedAvgConfig: Algorithm,
    schema.FedProxConfig: FedProx,
    schema.ScaffoldConfig: Scaffold,
    schema.TrimmedMeanConfig: TrimmedMean,
    schema.MedianConfig: Median,
}


def find_algorithm(config: schema.RunConfig) -> tuple[type[Algorithm], schema.AlgorithmConfig]:
    """The class of the config's algorithm, and its section; `client.proximal` is FedProx by another name."""
    section = config.algorithm
    if isinstance(section, schema.FedAvgConfig) and config.client.proximal:
        section = schema.FedProxConfig(name="fedprox", mu=config.client.proximal)
    return ALGORITHMS[type(section)], section


def make_algorithm(config: schema.RunConfig, federation: Federation) -> Algorithm:
    """The algorithm that a config names."""
    algorithm, section = find_algorithm(config)
    return algorithm(section, federation)


def traffic(config: schema.RunConfig, num_parameters: int) -> Traffic:
    """What a client sends and receives in a round of a config with P = num_parameters."""
    size = BYTES_PER_PARAMETER * num_parameters
    return Traffic(config.algorithm.vectors_sent * size, config.algorithm.vectors_received * size)
