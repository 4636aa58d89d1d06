"""A contestant: a loop in plain PyTorch over the same model, data and starting point, written as one would write it.

Its argument is JSON: the file that `ours.federation_file` wrote, the workload's fields, and `kind`:

    clients   FedAvg with one client after another, in batches of B
    batch     one model on batches of 8 x B, as if eight clients' data were one; no federation at all

The file needs PyTorch and timm alone, so that the peers' environments can use it.

Shapes: B batch, N clients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import timm
import torch
from bare_methods import attach
from contest import Contestant, claim_output, serve
from safetensors.torch import load_file, save_file
from torch import nn
from workloads import CLASSES, IMAGE_SIZE, SGD, Workload


def main() -> None:
    answers, argument = claim_output(), json.loads(sys.argv[1])
    federation = Federation(Workload(**argument["workload"]), argument["file"])
    loop = Loop(federation)
    rounds = {"clients": loop.train_clients, "batch": loop.train_batches}[argument["kind"]]
    serve(answers, rounds, lambda path: save_file(federation.tensors(), path))


def contestant(workload: Workload, file: str, kind: str, threads: int) -> Contestant:
    argument = {"workload": vars(workload), "file": file, "kind": kind}
    return Contestant("bare.py", argument, threads)


class Federation:
    """The model and the data of a workload, from a file."""

    def __init__(self, workload: Workload, file: str):
        self.workload, tensors = workload, load_file(file)
        self.images, self.labels, self.clients = tensors["images"], tensors["labels"], tensors["clients"]
        backbone = workload.backbone()
        self.model = timm.create_model(
            backbone["name"], num_classes=CLASSES, img_size=IMAGE_SIZE, **backbone["model_args"]
        ).eval()
        self.model.load_state_dict(_below("backbone", tensors))
        self.trained = attach(self.model, workload.method)
        start = _below("trained", tensors)
        assert set(start) == set(self.trained), set(start) ^ set(self.trained)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(start[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}


class Loop:
    """Local training in plain PyTorch."""

    def __init__(self, federation: Federation):
        self.federation, self.workload = federation, federation.workload
        self.trained = list(federation.trained.values())
        self.generator, self.samples = torch.Generator().manual_seed(1), 0
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trained, **SGD, fused=True)

    def step(self, samples: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        federation = self.federation
        self.samples += len(samples)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(federation.model(federation.images[samples]), federation.labels[samples])
        loss.backward()
        optimizer.step()

    def train_client(self, samples: torch.Tensor) -> None:
        """The local epochs of one client, with an optimizer of its own."""
        optimizer = self.new_optimizer()
        for _ in range(self.workload.epochs):
            for batch in self.shuffled(samples).split(self.workload.batch):
                self.step(batch, optimizer)

    def train_clients(self, number: int) -> int:
        """So many rounds of FedAvg."""
        workload, clients, before = self.workload, self.federation.clients, self.samples
        for _ in range(number):
            start = [parameter.detach().clone() for parameter in self.trained]
            total = [torch.zeros_like(parameter) for parameter in self.trained]
            for client in self.shuffled(torch.arange(len(clients)))[: workload.cohort].tolist():
                self.load(start)
                self.train_client(clients[client])
                torch._foreach_add_(total, [parameter.detach() for parameter in self.trained])
            torch._foreach_div_(total, workload.cohort)
            self.load(total)
        return self.samples - before

    def train_batches(self, number: int) -> int:
        """As many samples as so many rounds have, in large batches."""
        workload = self.workload
        steps = number * max(1, workload.cohort * workload.samples * workload.epochs // workload.large_batch)
        size = min(workload.large_batch, len(self.federation.images))
        for _ in range(steps):
            self.step(self.shuffled(torch.arange(len(self.federation.images)))[:size], self.optimizer)
        return steps * size

    def load(self, tensors: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.trained, tensors)

    def shuffled(self, items: torch.Tensor) -> torch.Tensor:
        return items[torch.randperm(len(items), generator=self.generator)]


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


if __name__ == "__main__":
    main()
