"""What a federated algorithm may define. `Algorithm` itself is FedAvg; every other one overrides the parts it changes.

    part                                       where                       for example
    a constant for each client's gradient      offset                      SCAFFOLD, FedDyn
    a term in each client's gradient           add_to_gradient             FedProx, SCAFFOLD, FedDyn
    what a client sends                        send                        SCAFFOLD; QSGD, top-k
    what a client keeps between rounds         row_size, next_row          SCAFFOLD; FedDyn, Ditto, top-k residuals
    how much a client counts                   weight                      SCAFFOLD, trimmed mean
    sum, or gather the cohort's vectors        gathers, combine            trimmed mean, median; Krum, FlexLoRA
    the next global vector                     step, initial_state         FedAvgM, FedAdam; SCAFFOLD, FedDyn

The section in config/schema says how many vectors clients send and receive, which bytes are counted by.

Two parts have no method yet, because no algorithm here needs one. Columns that a client keeps for itself (FedPer,
Ditto) live in its row; `Trainer._load` would start the client from them, and `send` leaves zeros in their place. A
backbone that changes (FLoRA) would be a tensor of `State.algorithm`, merged where `Setup` freezes the model.

Whatever a part returns must follow from its arguments alone: every rank computes the same, and a round that is dropped
leaves no trace.

Shapes: M cohort, P trainable parameters, V numbers that a client sends, S numbers that a client keeps.
"""

from dataclasses import dataclass, replace

import torch

from fedpeft_dist.algorithms.server_optimizers import ServerSgd
from fedpeft_dist.algorithms.state import State
from fedpeft_dist.config import schema
from fedpeft_dist.training.trainer import ClientUpdate


@dataclass(frozen=True)
class Federation:
    """What an algorithm may need to know of the run."""

    num_parameters: int
    """P."""
    population: int
    """N, the clients that have samples."""
    device: torch.device
    server: ServerSgd
    client_lr: float
    """The client optimizer's learning rate, before the schedule's factor."""


class Algorithm:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): the mean of the deltas, weighted by samples."""

    gathers = False
    """Whether every rank gets all vectors that clients send (`combine`). False: only their exact weighted mean."""
    counts_alike = False
    """Whether each client has weight 1 in the mean, whatever its number of samples."""
    row_size = 0
    """S / P: what a client keeps between rounds, in vectors of P float32 numbers; zeros at first."""

    def __init__(self, config: schema.AlgorithmConfig, federation: Federation):
        self.config, self.federation = config, federation

    def weight(self, update: ClientUpdate) -> int:
        return 1 if self.counts_alike else update.weight

    def initial_state(self) -> dict[str, torch.Tensor]:
        """The algorithm's own tensors before the first round."""
        return {}

    def offset(self, row: torch.Tensor, state: State) -> torch.Tensor | None:
        """A constant [P] for each gradient of a client in this round, for `add_to_gradient`; row is its own [S]."""
        return None

    def add_to_gradient(
        self, grad: torch.Tensor, theta: torch.Tensor, start: torch.Tensor, offsets: torch.Tensor | None
    ) -> None:
        """Changes grad [L, W] in place, at each local step; a row is a client.

        Args:
            theta: [L, W], the clients' parameters.
            start: [W], the global parameters.
            offsets: [L, W], what `offset` gave; None if it gives none.
        """

    def send(self, update: ClientUpdate, row: torch.Tensor, state: State, lr_factor: float) -> torch.Tensor:
        """What a client sends: [V], on the device."""
        return update.delta

    def next_row(self, update: ClientUpdate, row: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """What the client keeps until its next round: [S]."""
        return row

    def combine(self, sent: torch.Tensor) -> torch.Tensor:
        """The vectors of the accepted clients, float32 [M, V] in the order of their numbers, as one: float32 [V]."""
        raise NotImplementedError

    def step(self, state: State, combined: torch.Tensor, num_clients: int) -> State:
        """The state with another vector, and with other tensors of the server's.

        Args:
            combined: float32 [V].
            num_clients: how many clients it comes from.
        """
        vector, server = self.federation.server.step(state.vector, -combined, state.server)
        return replace(state, vector=vector, server=server)
