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
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
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


def attach(model: nn.Module, method: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Puts a method into a plain ViT, in place, and returns the trained parameters by their names on the wire."""
    model.requires_grad_(False)
    names = {
        "full": lambda name: True,
        "head": lambda name: False,
        "bias": lambda name: name.endswith(".bias"),
        "norm": lambda name: "norm" in name,
        "partial": lambda name: name.startswith(("norm.", *_last_blocks(model, method))),
    }
    added = {"lora": add_lora, "adapter": add_adapter, "prompt": add_prompts}
    if method["name"] in added:
        own = dict(added[method["name"]](model, method))
    else:
        own = {name: p for name, p in model.named_parameters() if names[method["name"]](name)}
    own |= {f"head.{name}": p for name, p in model.head.named_parameters()}
    return {name: parameter.requires_grad_() for name, parameter in own.items()}


class Lora(nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.a = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.a.T * self.scale) @ self.b.T


class AdaptedMlp(nn.Module):
    """An MLP with a residual adapter on its output."""

    def __init__(self, mlp: nn.Module, adapter: nn.ModuleDict):
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(x)
        return y + self.adapter["up"](nn.functional.gelu(self.adapter["down"](y)))


class Prompted(nn.Module):
    """A block with learned tokens after the class token."""

    def __init__(self, block: nn.Module, tokens: int, width: int, dropout: float):
        super().__init__()
        self.block, self.dropout = block, dropout
        self.tokens = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = nn.functional.dropout(self.tokens.expand(len(x), -1, -1), self.dropout)
        y = self.block(torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1))
        return torch.cat([y[:, :1], y[:, 1 + tokens.shape[1] :]], dim=1)


def add_lora(model: nn.Module, method: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    targets = tuple(method.get("targets", ["qkv"]))
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, nn.Linear) and name.endswith(targets):
            lora = Lora(module, method.get("rank", 8), method.get("alpha", 16.0))
            model.set_submodule(name, lora)
            yield f"{name}.lora_A.weight", lora.a
            yield f"{name}.lora_B.weight", lora.b


def add_adapter(model: nn.Module, method: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    width, inner = model.embed_dim, method["bottleneck"]
    adapter = nn.ModuleDict({"down": nn.Linear(width, inner), "up": nn.Linear(inner, width)})
    for block in model.blocks:
        block.mlp = AdaptedMlp(block.mlp, adapter)
    yield from adapter.named_parameters(prefix="adapter")


def add_prompts(model: nn.Module, method: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    dropout = method.get("dropout", 0.1)
    blocks = [Prompted(block, method.get("tokens", 10), model.embed_dim, dropout) for block in model.blocks]
    model.blocks = nn.Sequential(*blocks)
    for index, block in enumerate(blocks):
        yield f"blocks.{index}.prompt", block.tokens


def _last_blocks(model: nn.Module, method: Mapping[str, Any]) -> list[str]:
    return [f"blocks.{index}." for index in range(len(model.blocks) - method.get("blocks", 0), len(model.blocks))]


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


if __name__ == "__main__":
    main()
