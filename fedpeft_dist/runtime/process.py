"""Who am I: the one place where ranks and environment variables are read.

Three ways to start are understood: torchrun (RANK, WORLD_SIZE, ...), Slurm's srun (SLURM_PROCID, ...), and alone.
Everyone else receives the `Runtime` made here.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.runtime.interrupts import stop_with_parent
from fedpeft_dist.runtime.peers import Peers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """This process's place among its peers, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """Ranks on this machine, which share its memory."""
    address: str = ""
    """Empty where no launcher started this process."""
    port: int = 0
    restart: int = 0
    """How often torchrun has restarted the group."""
    job: str = ""
    """torchrun's name for this launch; it outlives a restart."""
    has_agent: bool = False
    """Whether torchrun's agent started this process."""
    agent_store: bool = False
    """Whether that agent already serves the store at that address."""
    slurm_job: str = ""
    """The number of the Slurm job that this process belongs to; an array's tasks have one each."""
    requeues: int = 0
    """How often Slurm has put that job back into its queue."""


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


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads torchrun's or Slurm's variables; without either, this process is alone.

    Only a Slurm job step counts (SLURM_STEP_NUM_TASKS): a batch script that starts python itself is one process,
    however many tasks its job asked for.
    """
    slurm = {
        "slurm_job": environment.get("SLURM_JOB_ID", ""),
        "requeues": int(environment.get("SLURM_RESTART_COUNT", 0)),
    }
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", 1)),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", 29500)),
            restart=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
            job=environment.get("TORCHELASTIC_RUN_ID", ""),
            has_agent="TORCHELASTIC_RUN_ID" in environment,
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            **slurm,
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=-(-int(environment["SLURM_STEP_NUM_TASKS"]) // int(environment["SLURM_STEP_NUM_NODES"])),
            address=environment.get("MASTER_ADDR") or _first_slurm_host(environment),
            port=int(environment.get("MASTER_PORT") or _slurm_port(environment)),
            **slurm,
        )
    return Launch(**slurm)


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    """Where the step's first task runs: its node's name where that resolves, else the address Slurm has for it."""
    try:
        node = _ask_slurm("hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
        with suppress(OSError):
            socket.getaddrinfo(node, None)
            return node
        return re.search(r" NodeAddr=(\S+)", _ask_slurm("node", node))[1]
    except (OSError, subprocess.CalledProcessError):  # in a container: where srun was called, the first node of a job
        return environment["SLURM_LAUNCH_NODE_IPADDR"]


def _ask_slurm(*what: str) -> str:
    return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, check=True).stdout


def _slurm_port(environment: Mapping[str, str]) -> int:
    """One that steps at work on the same node are unlikely to share, below those that the system hands out."""
    job, step, restart = (int(environment.get(f"SLURM_{key}", 0)) for key in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    # An attempt that a requeue has not quite ended may still hold its own. With these factors, the ports of a job's
    # first 16 steps and 4 attempts lie at least 180 apart: close numbers of jobs do not meet.
    return 20000 + (job + 5909 * step + 1463 * restart) % 12000


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
    if launch.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device: {launch.local_world_size} ranks on a machine with {torch.cuda.device_count()} CUDA "
            "device(s), and each needs its own; start fewer ranks, or give runtime.device: cpu"
        )
    device = torch.device("cuda", launch.local_rank)
    precision = "bf16" if config.precision == "auto" else config.precision
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if config.precision == "auto":
            return device, "fp16"
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"runtime.precision: 'bf16' is beyond {name}; give fp16, fp32 or auto")
    return device, precision


@contextmanager
def start(config: RuntimeConfig) -> Iterator[Runtime]:
    """Sets this process up (device, threads, determinism, process group) and tears the group down at the end."""
    launch = find_launch()
    device, precision = resolve_device(config, launch)
    torch.set_num_threads(config.threads)
    _be_deterministic(device)
    # Gradients accumulate into views of one matrix on purpose; PyTorch warns that their strides are unusual.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    if launch.has_agent:
        stop_with_parent()
    # Also in a group of one, so that torchrun on one GPU runs what it runs on many.
    peers = _join_group(launch, device) if launch.address else None
    try:
        yield Runtime(launch, device, precision, config.threads, peers)
    except BaseException as error:
        if peers is not None:
            peers.leave(error)  # and the group stays as it is: taking it down may wait for a rank that is gone
        raise
    if peers is not None:
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


def _join_group(launch: Launch, device: torch.device) -> Peers:
    is_server = launch.rank == 0 and not launch.agent_store
    store = _connect(launch, is_server, timedelta(minutes=5))
    peers = Peers(_connect(launch, False, timedelta(seconds=30)), launch.rank, launch.world_size, launch.agent_store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=30),
        device_id=device if device.type == "cuda" else None,
    )
    peers.start()
    return peers


def _connect(launch: Launch, is_server: bool, timeout: timedelta) -> dist.Store:
    store = dist.TCPStore(launch.address, launch.port, launch.world_size, is_master=is_server, timeout=timeout)
    # torchrun's agent keeps its store across restarts: without a prefix of its own, a restarted group would read the
    # keys of the one before it and hang.
    return dist.PrefixStore(f"fedpeft/{launch.restart}", store)
