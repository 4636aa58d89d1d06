"""What a config takes of each rank's memory and time before it is queued, and which sharding and lanes fit.

Shapes: L lanes, B batch, k ranks of a group, N clients.
"""

from dataclasses import dataclass

import torch

from fedpeft_dist.algorithms import traffic
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data import count_classes, load_dataset, make_source
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.partition import Partition, SharedPoolPartition
from fedpeft_dist.data.store import DEVICE_SHARE
from fedpeft_dist.federation.balance import Balance, balance_of
from fedpeft_dist.federation.footprint import Footprint, Outline
from fedpeft_dist.federation.setup import make_clients
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.memory import available_host_memory
from fedpeft_dist.runtime.process import resolve_device
from fedpeft_dist.training.lane_count import FEW, MEMORY_SHARE, MORE

GROUPS = (1, 2, 4, 8, 16, 32, 64)
"""Ranks of the groups that are looked at."""


@dataclass(frozen=True)
class Option:
    """One way to keep the frozen weights. Bytes of a rank, unless a field says otherwise."""

    size: int
    """k; 1 keeps them whole on every rank."""
    quantize: str
    weights: int
    """A rank's part of the blocks' matrices, and all other weights."""
    gathered: int
    """The two blocks that are whole at a time; 0 where all are."""
    gathered_per_pass: int
    """Received from the group in a pass forward and backward."""
    lanes: int
    """Lanes that fit beside them, at most as many as a rank needs; 0: not even one."""


@dataclass(frozen=True)
class Fit:
    """A config on so many ranks. Bytes of a rank, unless a field says otherwise."""

    device: str
    precision: str
    ranks: int
    memory: int
    """All that a rank has."""
    clients_from: str
    """Where the clients' sizes come from."""
    batch_size: int
    """B of a rank: the config's, at most the largest client, divided where a group shares its lanes."""
    needed_lanes: int
    """Clients that a rank trains in a round, rounded up."""
    lanes: int
    """L of the footprint: the config's, or as many as fit; at least 1."""
    backbone_parameters: int
    trainable_parameters: int
    images: int
    """Images that the device keeps; 0 where they are streamed or unknown."""
    option: Option
    """As the config keeps the weights."""
    footprint: Footprint
    total: int
    uplink_per_round: int
    """Of all clients of a round together."""
    downlink_per_round: int
    reduced_per_round: int
    """Given into the all-reduce at the end of a round."""
    gathered_per_round: int
    """Received from the group while a round is trained."""
    balance: Balance
    options: list[Option]
    proposal: dict[str, int | str]
    """Keys of the config, and their values. Empty if not even a batch of one sample fits."""


class Plan:
    """Weighs the ways to keep a config's weights on so many ranks.

    Args:
        ranks: of the run.
        gpu_memory: GiB of each rank's GPU; None takes the device of this machine.

    Raises:
        ConfigError: the ranks make no whole groups, the backbone cannot be made, or the method does not fit it.
    """

    def __init__(self, config: RunConfig, ranks: int, gpu_memory: float | None):
        self.config, self.ranks = config, ranks
        self.sharding = config.runtime.sharding
        if ranks % self.sharding.size:
            raise ConfigError(
                f"--ranks {ranks}: makes no whole groups of runtime.sharding.size: {self.sharding.size} ranks; give a "
                "multiple"
            )
        self.device, self.precision, self.memory = find_device(config, gpu_memory)
        self.outline = Outline(config, count_classes(config.data), self.precision, is_cuda=self.device == "cuda")
        self.partition, self.clients_from, images = find_clients(config)
        batch_size = min(config.client.batch_size, self.partition.largest_total(1))
        self.batch_size = -(-batch_size // self.sharding.size) if self.sharding.lanes == "shared" else batch_size
        self.few, self.more = (self.outline.measure(lanes, self.batch_size) for lanes in (FEW, MORE))
        room = DEVICE_SHARE * (self.memory - self.outline.weights)
        self.images = images if self.device == "cpu" or images <= room else 0

    def footprint(self, lanes: int) -> Footprint:
        """With L lanes: each part is a linear function of L."""
        few, more = vars(self.few), vars(self.more)
        return Footprint(**{name: few[name] + (lanes - FEW) * (more[name] - few[name]) for name in few})

    def needed_lanes(self, size: int) -> int:
        trainers = self.ranks // size if self.sharding.lanes == "shared" else self.ranks
        return -(-self.config.federation.cohort // trainers)

    def option(self, size: int, quantize: str) -> Option:
        is_offloaded = self.sharding.offload != "none"
        is_sharded = size > 1 or is_offloaded
        weights, blocks = self.outline.weights_as(quantize, is_sharded)
        gathered = 2 * blocks.largest if is_sharded else 0
        weights -= blocks.forward - (0 if is_offloaded else -(-blocks.forward // size))
        per_pass = (blocks.forward + blocks.backward) * (size - 1) // size
        one = self.footprint(1)
        room = self.room(weights + gathered)
        lanes = 0 if one.step > room else 1 + int((room - one.step) // (self.footprint(2).step - one.step))
        return Option(size, quantize, weights, gathered, per_pass, min(lanes, self.needed_lanes(size)))

    def room(self, weights: int) -> float:
        """What is left for lanes, or for the evaluation: the share that `runtime.lanes: auto` takes, too."""
        return MEMORY_SHARE * (self.memory - weights - self.few.server - self.images)

    def options(self) -> list[Option]:
        """All groups of 2, 4, 8, ... ranks that the ranks make, with whole and with 8-bit weights.

        A group that shares its lanes divides their batch, so the config's size is the only one that is known.
        """
        if self.config.method.name == "full":
            return [self.option(1, "none")]
        sizes = [size for size in GROUPS if self.ranks % size == 0]
        if self.sharding.lanes == "shared":
            sizes = [self.sharding.size]
        return [self.option(size, quantize) for quantize in ("none", "int8") for size in sizes]

    def propose(self, options: list[Option]) -> dict[str, int | str]:
        """The smallest group in which a lane fits, with the config's own weights if that is possible.

        Without room for one lane's batch, the largest batch that fits beside the smallest weights. The evaluation's
        batch is smaller than the config's where that would not fit.
        """
        one, own, batch_size = self.footprint(1), self.sharding.quantize, self.config.client.batch_size
        fitting = [option for option in options if option.lanes]
        if fitting:
            best = min(fitting, key=lambda option: (option.quantize != own, option.size))
        else:
            best = min(options, key=lambda option: option.weights + option.gathered)
        room, evaluated = self.room(best.weights + best.gathered), self.config.runtime.evaluate_batch
        if not fitting:
            batch_size = int(self.batch_size * (room - one.lanes) / one.activations)
        if one.evaluation > room:
            evaluated = int(evaluated * room / one.evaluation)
        if batch_size < 1 or evaluated < 1:
            return {}
        return {
            "runtime.sharding.size": best.size,
            "runtime.sharding.quantize": best.quantize,
            "runtime.lanes": max(1, best.lanes),
            "client.batch_size": batch_size,
            "runtime.evaluate_batch": evaluated,
        }


def compute_fit(config: RunConfig, ranks: int = 1, gpu_memory: float | None = None) -> Fit:
    """From shapes, the partition and the plans of rounds; the arguments and errors are those of `Plan`."""
    plan = Plan(config, ranks, gpu_memory)
    sharding, layout = plan.sharding, plan.outline.model.layout
    option, options = plan.option(sharding.size, sharding.quantize), plan.options()
    lanes = config.runtime.lanes if config.runtime.lanes != "auto" else max(1, option.lanes)
    footprint, sent = plan.footprint(lanes), traffic(config, layout.num_parameters)
    balance = balance_of(config, Participation(config, plan.partition, sent), ranks, lanes)
    return Fit(
        device=plan.device,
        precision=plan.precision,
        ranks=ranks,
        memory=plan.memory,
        clients_from=plan.clients_from,
        batch_size=plan.batch_size,
        needed_lanes=plan.needed_lanes(sharding.size),
        lanes=lanes,
        backbone_parameters=plan.outline.model.backbone.num_parameters,
        trainable_parameters=layout.num_parameters,
        images=plan.images,
        option=option,
        footprint=footprint,
        total=footprint.total - footprint.weights + option.weights + option.gathered + plan.images,
        uplink_per_round=sent.uplink * config.federation.cohort,
        downlink_per_round=sent.downlink * config.federation.cohort,
        reduced_per_round=8 * layout.num_parameters * config.algorithm.vectors_sent if ranks > 1 else 0,
        gathered_per_round=round(option.gathered_per_pass * balance.longest),
        balance=balance,
        options=options,
        proposal=plan.propose(options),
    )


def find_device(config: RunConfig, gpu_memory: float | None) -> tuple[str, str, int]:
    """The device, the precision and the bytes of a rank.

    Args:
        gpu_memory: GiB of its GPU, or of its part of the machine if the config wants the CPU; None takes this
            machine's.
    """
    runtime = config.runtime
    if gpu_memory is None:
        device, precision = resolve_device(runtime, Launch())
        if device.type == "cuda":
            return "cuda", precision, torch.cuda.get_device_properties(device).total_memory
        return "cpu", precision, available_host_memory()
    kind = "cpu" if runtime.device == "cpu" else "cuda"
    fastest = "fp32" if kind == "cpu" else "bf16"
    return kind, fastest if runtime.precision == "auto" else runtime.precision, int(gpu_memory * 2**30)


def find_clients(config: RunConfig) -> tuple[Partition, str, int]:
    """The clients, in words where their sizes come from, and the bytes of all images.

    Where the data set is not on this machine, its known number of samples is dealt out, with as many of each class.
    """
    try:
        dataset = load_dataset(config.data, derive_seed(config.seed, "data"))
    except ConfigError:
        source, most = make_source(config.data), config.data.max_train
        if source.num_train is None or config.data.clients is None:
            clients = config.data.clients or config.federation.cohort
            same = SharedPoolPartition(clients, samples_per_client=config.client.batch_size, pool=1)
            return (
                same,
                "no data set on this machine: all clients hold one batch, so the balance is not the real one",
                0,
            )
        count = source.num_train if most is None else min(most, source.num_train)
        labels = torch.arange(count) % source.num_classes()
        train = ImageSet(torch.empty(count, 0), labels)
        clients = make_clients(config, train)[0]
        return clients, f"no data set on this machine: a draw of {count:,} samples, equally many of each class", 0
    images = sum(len(split) * split.images[0].nbytes for split in (dataset.train, dataset.test))
    return make_clients(config, dataset.train)[0], "the run's own partition", images
