"""Who am I: the one place where ranks and environment variables are read.

Three ways to start are understood: torchrun (RANK, WORLD_SIZE, ...), Slurm's srun (SLURM_PROCID, ...), and alone.
Everyone else receives the `Runtime` made here.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RuntimeConfig

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
    """The launcher's name for this launch; it outlives a restart."""
    agent_store: bool = False
    """Whether torchrun's agent already serves the store at that address."""


@dataclass(frozen=True)
class Runtime:
    """What a rank computes with."""

    launch: Launch
    device: torch.device
    precision: str
    threads: int

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
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=-(-int(environment["SLURM_STEP_NUM_TASKS"]) // int(environment["SLURM_STEP_NUM_NODES"])),
            address=environment.get("MASTER_ADDR") or _first_slurm_host(environment),
            port=int(environment.get("MASTER_PORT", 20000 + (job + 97 * step) % 20000)),
            restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
        )
    return Launch()


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    nodes = environment["SLURM_STEP_NODELIST"]
    found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return found.stdout.split()[0]


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
    if launch.address:  # also in a group of one, so that torchrun on one GPU runs what it runs on many
        _join_group(launch, device)
    try:
        yield Runtime(launch, device, precision, config.threads)
    finally:
        if dist.is_initialized():
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


def _join_group(launch: Launch, device: torch.device) -> None:
    is_server = launch.rank == 0 and not launch.agent_store
    store = dist.TCPStore(
        launch.address, launch.port, launch.world_size, is_master=is_server, timeout=timedelta(minutes=5)
    )
    # torchrun's agent keeps its store across restarts: without a prefix of its own, a restarted group would read the
    # keys of the one before it and hang.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"fedpeft/{launch.restart}", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=30),
        device_id=device if device.type == "cuda" else None,
    )
