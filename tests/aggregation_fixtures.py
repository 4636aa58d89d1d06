"""One rank's part of a round of FedAvg: clients' updates, and the aggregation that takes them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedpeft_dist.algorithms.algorithm import Algorithm, Federation
from fedpeft_dist.algorithms.server_optimizers import make_server_optimizer
from fedpeft_dist.algorithms.state import State
from fedpeft_dist.config.schema import FedAvgConfig, ServerSgdConfig
from fedpeft_dist.federation.aggregation import Aggregation, MeanRule
from fedpeft_dist.training.trainer import ClientUpdate


def make_aggregation(size: int, largest_total_weight: int, rule: MeanRule) -> Aggregation:
    """The aggregation of the first round, for vectors of the given size."""
    server = make_server_optimizer(ServerSgdConfig(name="sgd"))
    federation = Federation(size, population=64, device=torch.device("cpu"), server=server, client_lr=0.1)
    algorithm = Algorithm(FedAvgConfig(name="fedavg"), federation)
    return Aggregation(algorithm, State(0, torch.zeros(size), {}, {}), 1.0, largest_total_weight, rule)


def make_update(
    delta: torch.Tensor | Sequence[float], weight: int = 1, loss: float = 1.0, client: int = 0, num_samples: int = 0
) -> ClientUpdate:
    delta = torch.as_tensor(delta, dtype=torch.float32)
    return ClientUpdate(client, weight, delta, torch.tensor(loss), num_samples, num_steps=1)
