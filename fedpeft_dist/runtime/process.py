"""The `Runtime` that everyone else receives: the device, the precision and the group that a rank computes with."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import timm
import torch
import torch.distributed as dist

import fedpeft_dist
from fedpeft_dist.config.errors import ConfigError, FirstToldError, ToldElsewhereError
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.runtime.accelerator import give_peers_time, gpu_place, prepare_cuda
from fedpeft_dist.runtime.launch import Launch, find_launch
from fedpeft_dist.runtime.meeting import interface_towards, meet
from fedpeft_dist.runtime.memory import keep_freed_memory
from fedpeft_dist.runtime.mesh import Mesh
from fedpeft_dist.runtime.peers import Peers

ARRIVAL_SECONDS = 300
"""Seconds to wait for all ranks to join; they may start at different times."""
FORMING_SECONDS = 300
"""Seconds that forming a group may take once all ranks are there. A blocked network would let it wait for ever."""
REFUSAL_SECONDS = 5
"""Seconds that rank 0 waits for the others to learn that the run is refused."""
LONGEST_WAIT_HOURS = 6
"""Hours that a rank may wait for another's share of a round. Peers find a dead rank much sooner."""
FAR_AWAY = "192.0.2.1"
"""An address that no machine has, so that the system sends to it by the default route."""
COLLECT_AFTER = 700
"""Python's own threshold for the collection of young objects. Importing raises it (`__main__.py`)."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The device, the precision and the group of a rank."""

    launch: Launch
    device: torch.device
    precision: str
    threads: int
    peers: Peers | None = None
    """The other ranks; None in a process that no launcher started."""
    mesh: Mesh | None = None
    """The ranks that share frozen weights; None if each has all of them."""

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_trainers(self) -> int:
        """The parts that a round's clients are dealt in: one for each rank, or for each group that shares lanes."""
        return self.mesh.num_groups if self.mesh is not None and self.mesh.is_shared else self.world_size

    @property
    def trainer(self) -> int:
        """Which of these parts this rank trains."""
        return self.mesh.group_number if self.mesh is not None and self.mesh.is_shared else self.rank

    @property
    def counts(self) -> bool:
        """Whether this rank reports what it has trained, and no other rank of its group does so."""
        return self.mesh is None or not self.mesh.is_shared or self.mesh.place == 0

    def agree(self, flag: bool) -> bool:
        """Whether a flag is set on any of the ranks that this one computes in step with."""
        return flag if self.mesh is None else self.mesh.agree(flag)[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def autocast(self) -> torch.autocast:
        """The context of every forward pass; it does nothing in fp32."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)


def resolve_device(config: RuntimeConfig, launch: Launch) -> tuple[torch.device, str]:
    """The device and the precision that `auto` stands for; raises ConfigError for one that this machine lacks."""
    if config.device == "cpu" or not torch.cuda.is_available():
        if config.device == "cuda":
            raise ConfigError("runtime.device: 'cuda', but PyTorch finds no CUDA device here; give cpu or auto")
        if config.precision == "fp16":
            raise ConfigError("runtime.precision: 'fp16' needs a CUDA device; on the CPU give fp32, bf16 or auto")
        return torch.device("cpu"), "fp32" if config.precision == "auto" else config.precision
    # A task that srun has bound to a GPU sees no other GPU, and numbers its own 0.
    is_bound = launch.is_step and torch.cuda.device_count() == 1
    if launch.local_world_size > torch.cuda.device_count() and not is_bound:
        raise ConfigError(
            f"runtime.device: {launch.local_world_size} ranks on a machine with {torch.cuda.device_count()} CUDA "
            "device(s), and each needs its own; start fewer ranks, or give runtime.device: cpu"
        )
    device = torch.device("cuda", 0 if is_bound else launch.local_rank)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"runtime.precision: 'bf16' is beyond {name}; give fp16, fp32 or auto")
    return device, ("bf16" if has_bf16 else "fp16") if config.precision == "auto" else config.precision


def library_versions() -> dict[str, str]:
    """The versions of the libraries that a run's rounding may depend on, by name."""
    return {module.__name__: module.__version__ for module in (fedpeft_dist, torch, timm, np)}


def fit_to_machine(config: RuntimeConfig) -> RuntimeConfig:
    """The settings to evaluate a run that was trained elsewhere: this machine's device, and a precision it has."""
    config = config.model_copy(update={"device": "auto", "products": "auto"})
    try:
        resolve_device(config, find_launch())
    except ConfigError:
        return config.model_copy(update={"precision": "auto"})
    return config


@contextmanager
def start(config: RuntimeConfig) -> Iterator[Runtime]:
    """Sets up this process (device, threads, determinism, process group) and closes the group at the end."""
    launch = find_launch()
    device, precision = resolve_device(config, launch)
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    gc.set_threshold(COLLECT_AFTER)
    # MKL's batched products round by the alignment of their operands, so that a lane's result would depend on its
    # number. STRICT forbids it, at no measurable cost. MKL reads this variable at its first use.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    on_cuda = device.type == "cuda"
    if on_cuda:
        prepare_cuda(device)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    if not launch.address:
        yield Runtime(launch, device, precision, config.threads)
        return
    # A single rank forms a group, too, so that torchrun runs the same code on one GPU as on many.
    launch, peers, store = _meet_peers(launch, gpu_place(device))
    give_peers_time(peers.longest_search)
    try:
        peers.start()  # before the group is formed, because a rank may also die while others wait for it there
        unformed = f"the group of {launch.world_size} ranks has not formed in {FORMING_SECONDS} s"
        with peers.naming_the_lost(), peers.limit(FORMING_SECONDS, unformed):
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timedelta(hours=LONGEST_WAIT_HOURS),
                device_id=device if on_cuda else None,
            )
        yield Runtime(launch, device, precision, config.threads, peers)
    except BaseException as error:
        peers.leave(error)
        # Closing a group of several ranks might wait for a lost rank. After a group of one, this process may start
        # another one.
        if launch.world_size == 1 and dist.is_initialized():
            with suppress(RuntimeError):  # a consequence of the first error
                dist.destroy_process_group()
        raise
    peers.leave()
    dist.destroy_process_group()


def _meet_peers(launch: Launch, place: str) -> tuple[Launch, Peers, dist.Store]:
    """Waits for all ranks; returns the launch they agree on, the ranks, and the store to form their group in.

    `place` is the rank's GPU. Raises ConfigError for a GPU that two ranks have.
    """
    if launch.local_world_size < launch.world_size:
        interface = interface_towards(launch.address)
        if interface == "lo":  # a machine's own name often means the loopback, which leads to no other machine
            interface = interface_towards(FAR_AWAY)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # this name, not all that begin with it

    def connect(seconds: float = 30, is_server: bool = False) -> dist.Store:
        # An agent starts its store before its ranks. If the store is missing, the agent has gone, and nobody will come.
        patience = timedelta(seconds=20 if launch.agent_store else ARRIVAL_SECONDS)
        store = dist.TCPStore(launch.address, launch.port, launch.world_size, is_master=is_server, timeout=patience)
        store.set_timeout(timedelta(seconds=seconds))
        return store

    store = connect(ARRIVAL_SECONDS, is_server=launch.rank == 0 and not launch.agent_store)
    # Ranks of another job that reach this store by mistake meet nobody under this prefix.
    here = dist.PrefixStore(f"fedpeft/{launch.slurm_job}", store)
    token, restart, places = meet(here, launch.rank, launch.world_size, launch.restart, ARRIVAL_SECONDS, place)
    _refuse_shared(places, launch, dist.PrefixStore(token, here))
    launch = replace(launch, restart=restart)
    if launch.agent_store:  # torchrun calls most launches "none"; the first group's token lives as long as the agent
        launch = replace(launch, job=here.compare_set("launch", "", token).decode())
    prefix = f"fedpeft/{token}"
    return launch, Peers(lambda: dist.PrefixStore(prefix, connect()), launch), dist.PrefixStore(prefix, store)


def _refuse_shared(places: Sequence[str], launch: Launch, store: dist.Store) -> None:
    """Raises ConfigError on every rank if two ranks, given by their GPUs, have the same one. NCCL would see it late."""
    shared = next((place for place in places if place and places.count(place) > 1), None)
    if shared is None:
        return
    store.set(f"refused/{launch.rank}", "")
    if launch.rank:
        raise ToldElsewhereError("rank 0 of this run tells why it cannot start")
    with suppress(RuntimeError):  # the others read their roster in this process's store
        store.wait([f"refused/{rank}" for rank in range(len(places))], timedelta(seconds=REFUSAL_SECONDS))
    ranks = ", ".join(str(rank) for rank, place in enumerate(places) if place == shared)
    raise FirstToldError(
        f"runtime.device: ranks {ranks} have the same {shared}, and each needs its own; start them by torchrun or srun "
        "--gpus-per-task=1, set LOCAL_RANK and LOCAL_WORLD_SIZE, or give runtime.device: cpu"
    )
