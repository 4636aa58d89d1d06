"""What a rank computes with: the device, the precision and the group, in the `Runtime` that everyone else receives."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.runtime.launch import Launch, find_launch
from fedpeft_dist.runtime.meeting import meet
from fedpeft_dist.runtime.network import interface_towards
from fedpeft_dist.runtime.peers import Peers

ARRIVAL_SECONDS = 300
"""That ranks wait for each other when a group is formed; they may start at different times."""
LONGEST_WAIT_HOURS = 6
"""That a rank may wait for another's share of a round; one that is dead is found much sooner, by its peers."""
FAR_AWAY = "192.0.2.1"
"""An address that no machine has: its way out is the default route."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """What a rank computes with."""

    launch: Launch
    device: torch.device
    precision: str
    threads: int
    peers: Peers | None = None
    """None in a process that is alone."""

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def autocast(self) -> torch.autocast:
        """The context for every forward pass; does nothing in fp32."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)


def resolve_device(config: RuntimeConfig, launch: Launch) -> tuple[torch.device, str]:
    """The device and the precision that `auto` stands for.

    Raises:
        ConfigError: a device or a precision that this machine lacks.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("runtime.device: 'cuda', but PyTorch finds no CUDA device here; give cpu or auto")
    on_cuda = has_cuda and config.device != "cpu"
    if not on_cuda:
        if config.precision == "fp16":
            raise ConfigError("runtime.precision: 'fp16' needs a CUDA device; on the CPU give fp32, bf16 or auto")
        return torch.device("cpu"), "fp32" if config.precision == "auto" else config.precision
    # A task that srun has bound to a GPU sees no other, and calls it the first.
    is_bound = launch.is_step and torch.cuda.device_count() == 1
    if launch.local_world_size > torch.cuda.device_count() and not is_bound:
        raise ConfigError(
            f"runtime.device: {launch.local_world_size} ranks on a machine with {torch.cuda.device_count()} CUDA "
            "device(s), and each needs its own; start fewer ranks, or give runtime.device: cpu"
        )
    device = torch.device("cuda", 0 if is_bound else launch.local_rank)
    precision = "bf16" if config.precision == "auto" else config.precision
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if config.precision == "auto":
            return device, "fp16"
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"runtime.precision: 'bf16' is beyond {name}; give fp16, fp32 or auto")
    return device, precision


def fit_to_machine(config: RuntimeConfig) -> RuntimeConfig:
    """For what was trained elsewhere: the device that is here, and the precision, too, where this one lacks it."""
    config = config.model_copy(update={"device": "auto"})
    try:
        resolve_device(config, find_launch())
    except ConfigError:
        return config.model_copy(update={"precision": "auto"})
    return config


@contextmanager
def start(config: RuntimeConfig) -> Iterator[Runtime]:
    """Sets this process up (device, threads, determinism, process group) and tears the group down at the end."""
    launch = find_launch()
    device, precision = resolve_device(config, launch)
    torch.set_num_threads(config.threads)
    _be_deterministic(device)
    # Gradients accumulate into views of one matrix on purpose; PyTorch warns that their strides are unusual.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    if not launch.address:
        yield Runtime(launch, device, precision, config.threads)
        return
    # Also in a group of one, so that torchrun on one GPU runs what it runs on many.
    launch, peers, store = _meet_peers(launch)
    try:
        peers.start()  # first of all: a rank that dies while the group is formed would be waited for, too
        with peers.naming_the_lost():
            _form_group(launch, device, store)
        yield Runtime(launch, device, precision, config.threads, peers)
    except BaseException as error:
        peers.leave(error)
        # A group of several stays as it is: taking it down may wait for a rank that is gone.
        if launch.world_size == 1 and dist.is_initialized():  # another may come in this process
            with suppress(RuntimeError):  # as the first error may bring along
                dist.destroy_process_group()
        raise
    peers.leave()
    dist.destroy_process_group()


def _be_deterministic(device: torch.device) -> None:
    # MKL's batched products round by the alignment of their operands, so that a lane's result would depend on its
    # number; STRICT forbids it, at no measurable cost. Read at MKL's first use, which must come after this.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def _meet_peers(launch: Launch) -> tuple[Launch, Peers, dist.Store]:
    """Returns the launch as all ranks see it, and the store that their group is formed in, too."""
    if launch.local_world_size < launch.world_size:
        interface = interface_towards(launch.address)
        if interface == "lo":  # which a machine's own name often means to itself, and which is no way to the others
            interface = interface_towards(FAR_AWAY)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    rank, world_size = launch.rank, launch.world_size
    store = _connect(launch, is_server=rank == 0 and not launch.agent_store, seconds=ARRIVAL_SECONDS)
    # Another job's ranks that take this store for theirs meet nobody here.
    here = dist.PrefixStore(f"fedpeft/{launch.slurm_job}", store)
    meeting = meet(here, rank, world_size, launch.restart, ARRIVAL_SECONDS)
    launch = replace(launch, restart=meeting.restart)
    if launch.agent_store:  # torchrun calls most launches "none"; the first group's token lives as long as the agent
        launch = replace(launch, job=here.compare_set("launch", "", meeting.token).decode())

    def connect() -> dist.Store:
        return dist.PrefixStore(f"fedpeft/{meeting.token}", _connect(launch, is_server=False, seconds=30))

    return launch, Peers(connect, launch), dist.PrefixStore(f"fedpeft/{meeting.token}", store)


def _form_group(launch: Launch, device: torch.device, store: dist.Store) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(hours=LONGEST_WAIT_HOURS),
        device_id=device if device.type == "cuda" else None,
    )


def _connect(launch: Launch, is_server: bool, seconds: float) -> dist.Store:
    # An agent's store is there before its ranks; one that is not has gone with its agent, and nobody will come.
    patience = timedelta(seconds=20 if launch.agent_store else ARRIVAL_SECONDS)
    store = dist.TCPStore(launch.address, launch.port, launch.world_size, is_master=is_server, timeout=patience)
    store.set_timeout(timedelta(seconds=seconds))
    return store
