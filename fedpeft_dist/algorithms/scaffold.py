"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1): control variates against client drift.

A client steps on its gradient plus c - c_i, where c is the server's control variate and c_i its own. After K steps with
learning rate lr it takes option II of the paper:

    c_i' = c_i - c - delta / (K * lr)

It sends its delta and the change c_i' - c_i. The server adds the mean delta to its parameters, and |S| / N of the mean
change to c, for a cohort S of a population of N clients. All control variates start at zero, and clients count alike.

Shapes: P trainable parameters.
"""

from dataclasses import replace

import torch

from fedpeft_dist.algorithms.algorithm import Algorithm
from fedpeft_dist.algorithms.state import State
from fedpeft_dist.training.trainer import ClientUpdate


class Scaffold(Algorithm):
    counts_alike = True
    row_size = 1

    def initial_state(self) -> dict[str, torch.Tensor]:
        return {"control": torch.zeros(self.federation.num_parameters, device=self.federation.device)}

    def offset(self, row: torch.Tensor, state: State) -> torch.Tensor:
        return state.algorithm["control"] - row

    def add_to_gradient(
        self, grad: torch.Tensor, theta: torch.Tensor, start: torch.Tensor, offsets: torch.Tensor | None
    ) -> None:
        grad.add_(offsets)

    def send(self, update: ClientUpdate, row: torch.Tensor, state: State, lr_factor: float) -> torch.Tensor:
        lr = self.federation.client_lr * lr_factor
        change = -state.algorithm["control"] - update.delta / (update.num_steps * lr)
        return torch.cat([update.delta, change])

    def next_row(self, update: ClientUpdate, row: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        return row + sent[len(row) :]

    def step(self, state: State, combined: torch.Tensor, num_clients: int) -> State:
        delta, change = combined.chunk(2)
        control = state.algorithm["control"] + num_clients / self.federation.population * change
        return replace(super().step(state, delta, num_clients), algorithm={"control": control})
