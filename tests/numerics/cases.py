"""Tiny models, images and clients, and the package's side of a comparison.

Shapes: L lanes, B batch, P trainable parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import timm
import torch
from pydantic import TypeAdapter
from torch import nn

from fedpeft_dist.algorithms.algorithm import Algorithm, Federation
from fedpeft_dist.algorithms.fedprox import FedProx
from fedpeft_dist.algorithms.server_optimizers import make_server_optimizer
from fedpeft_dist.backbones.timm_backbone import Backbone, freeze
from fedpeft_dist.config.schema import ClientConfig, FedProxConfig, MethodConfig, ServerSgdConfig
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.methods import attach_method
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.batches import EpochBatches
from fedpeft_dist.training.gradients import MeanGradient
from fedpeft_dist.training.schedule import ClientTask, Pass, Schedule
from fedpeft_dist.training.trainer import ClientUpdate, RoundStart, Trainer
from tests.tiny import VIT_ARGS, VIT_NAME

SEED, ROUND = 11, 3
CLASSES = 5
CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)

VIT = (VIT_NAME, VIT_ARGS | {"img_size": 16, "depth": 2})

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "head": {"name": "head"},
    "bias": {"name": "bias"},
    "norm": {"name": "norm"},
    "prompt-shallow": {"name": "prompt", "depth": "shallow", "tokens": 3, "dropout": 0.0},
    "prompt-deep": {"name": "prompt", "depth": "deep", "tokens": 3, "dropout": 0.0},
    "adapter-shared": {"name": "adapter", "bottleneck": 7, "shared": True},
    "adapter-per-block": {"name": "adapter", "bottleneck": 10, "shared": False},
    "lora-qkv": {"name": "lora", "rank": 3, "alpha": 6.0, "targets": ["qkv"], "dropout": 0.0},
    "lora-all": {"name": "lora", "rank": 2, "alpha": 5.0, "targets": ["qkv", "proj", "fc1", "fc2"], "dropout": 0.0},
    "partial": {"name": "partial", "blocks": 1},
    "adaptformer": {"name": "adaptformer", "bottleneck": 7, "scale": 0.5},
    "houlsby": {"name": "houlsby", "bottleneck": 5},
    "repadapter": {"name": "repadapter", "bottleneck": 6, "groups": 2, "scale": 0.5},
    "diffit": {"name": "diffit"},
    "convpass": {"name": "convpass", "bottleneck": 3, "scale": 0.5},
    "prefix": {"name": "prefix", "tokens": 3},
}
REPARAMETERIZED: dict[str, dict[str, Any]] = {
    "lora-parts": {
        "name": "lora",
        "rank": 3,
        "alpha": 2.0,
        "rslora": True,
        "targets": ["q", "v", "fc1"],
        "ranks": {"v": 2, "fc1": 5},
        "dropout": 0.0,
    },
    "ssf": {"name": "ssf"},
    "ia3": {"name": "ia3"},
    "dora": {"name": "dora", "rank": 3, "alpha": 4.0, "targets": ["qkv", "fc2"]},
    "vera": {"name": "vera", "rank": 7, "targets": ["qkv", "fc1", "fc2"], "initial": 0.3, "projection_seed": 4},
    "fact-tt": {"name": "fact_tt", "rank": 3, "scale": 2.0},
    "fact-tk": {"name": "fact_tk", "rank": 5, "scale": 0.5},
}
METHODS |= REPARAMETERIZED

# The gradient of a key's bias is zero by symmetry; at AdamW's default eps its rounding errors would become steps.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "adamw": {"name": "adamw", "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1},
}


def with_dropout(method: Mapping[str, Any], probability: float) -> dict[str, Any]:
    """The method with its own dropout on, where it has one."""
    return {**method, "dropout": probability} if "dropout" in method else dict(method)


def make_model(name: str, arguments: Mapping[str, Any], **more: Any) -> nn.Module:
    """A random timm model none of whose parameters or statistics is at the 0 or 1 that it is initialised with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = timm.create_model(name, num_classes=CLASSES, **arguments, **more).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 1.5)
    return model


def make_lane_model(
    model: nn.Module, method: Mapping[str, Any], image_size: int = 16, dtype: torch.dtype = torch.float32
) -> LaneModel:
    """The package's model on a copy of the given one."""
    model = copy.deepcopy(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    backbone = Backbone(model, MEAN, STD, image_size, num_parameters, sha256="")
    lane_model = attach_method(backbone, TypeAdapter(MethodConfig).validate_python(dict(method)), SEED)
    model.to(dtype)
    return lane_model


def start_vector(lane_model: LaneModel, dtype: torch.dtype = torch.float32, noise: float = 0.1) -> torch.Tensor:
    """A global vector [P] away from the initial one, where LoRA and adapters have gradients of zero."""
    vector = lane_model.initial_vector()
    generator = torch.Generator().manual_seed(SEED)
    return (vector + noise * torch.randn(len(vector), generator=generator)).to(dtype)


def make_images(count: int = 40, image_size: int = 16) -> ImageSet:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(0, 256, (count, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, CLASSES, (count,), generator=generator))


def make_store(images: ImageSet, device: torch.device = CPU, resident: bool = True) -> DeviceStore:
    return DeviceStore(images, lambda pixels, keys: pixels, 3, MEAN, STD, device, resident)


def make_runtime(precision: str = "fp32", device: torch.device = CPU) -> Runtime:
    return Runtime(Launch(), device, precision, threads=1)


def make_tasks(sizes: Sequence[int], steps: Sequence[int]) -> list[ClientTask]:
    """Client k holds the next sizes[k] samples and takes steps[k] steps. Nobody holds sample 0, which fills gaps."""
    tasks, first = [], 1
    for client, (size, count) in enumerate(zip(sizes, steps)):
        tasks.append(ClientTask(client, torch.arange(first, first + size), count, size))
        first += size
    return tasks


def make_trainer(
    lane_model: LaneModel,
    images: ImageSet,
    client: ClientConfig,
    num_lanes: int,
    dtype: torch.dtype = torch.float32,
    precision: str = "fp32",
    device: torch.device = CPU,
    gradient_noise: float = 0.0,
) -> Trainer:
    """A trainer such as `Simulation` makes. Call it after everything that needs the model's own float32 values."""
    runtime = make_runtime(precision, device)
    if precision != "fp32" or device != CPU:
        freeze(lane_model.backbone.model, runtime.compute_dtype, device)
    return Trainer(
        lane_model,
        make_store(images, device),
        client,
        runtime,
        schedule=make_schedule(num_lanes, client.batch_size),
        rule=MeanGradient(lane_model.layout, num_lanes, runtime, dtype),
        term=make_algorithm(lane_model.layout.num_parameters, client.proximal).add_to_gradient,
        gradient_noise=gradient_noise,
    )


def make_algorithm(num_parameters: int, proximal: float = 0.0, population: int = 5) -> Algorithm:
    """FedAvg, or FedProx, with a server that adds the mean delta."""
    server = make_server_optimizer(ServerSgdConfig(name="sgd", lr=1.0))
    federation = Federation(num_parameters, population, CPU, server, client_lr=1.0)
    return FedProx(FedProxConfig(name="fedprox", mu=proximal), federation)


def make_schedule(num_lanes: int, batch_size: int) -> Schedule:
    return Schedule(num_lanes, EpochBatches(batch_size, SEED), SEED)


def client_config(optimizer: Mapping[str, Any], batch_size: int, **more: Any) -> ClientConfig:
    return ClientConfig.model_validate({"optimizer": dict(optimizer), "batch_size": batch_size, **more})


def train_lanes(
    trainer: Trainer, tasks: Sequence[ClientTask], vector: torch.Tensor, lr_factor: float = 1.0
) -> dict[int, ClientUpdate]:
    start = RoundStart(ROUND, vector, lr_factor)
    updates = {update.client: update for update in trainer.train(tasks, start)}
    assert set(updates) == {task.client for task in tasks}
    return updates


def passes_of(tasks: Sequence[ClientTask], num_lanes: int, batch_size: int) -> list[Pass]:
    return list(make_schedule(num_lanes, batch_size).passes(tasks, ROUND))


def assert_ragged(passes: Sequence[Pass]) -> None:
    """The schedule has what the comparison is for: refills, idle lanes, and batches of several sizes at once."""
    assert any(one.starting for one in passes[1:])
    batch_sizes = [set(one.mask.sum(dim=1).tolist()) for one in passes]
    assert any(len(sizes - {0}) > 1 for sizes in batch_sizes)
    assert any(0 in sizes for sizes in batch_sizes)


def client_batches(
    task: ClientTask, batch_size: int, round_number: int = ROUND, seed: int = SEED
) -> Iterator[torch.Tensor]:
    """The sample indices of each of a client's steps."""
    return islice(EpochBatches(batch_size, seed).of(task.samples, task.client, round_number), task.num_steps)


def plain_batches(
    images: ImageSet, task: ClientTask, batch_size: int, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised images and labels of each step."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for indices in client_batches(task, batch_size):
        yield ((images.images[indices] / 255 - mean) / std).to(dtype), images.labels[indices]


def assert_same_delta(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Every tensor has moved, and to the same place: to `tolerance` of the largest movement, and absolutely."""
    assert set(actual) == set(expected)
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        assert tensor.abs().max() > 1e-7, f"{name} does not move"
        error = (actual[name] - tensor).abs().max().item()
        assert error <= tolerance * min(scale, 1.0), f"{name} is off by {error:.2e} of {scale:.2e}"
