"""This process's rank: the one place that reads the environment variables of launchers.

A process can be started by torchrun (RANK, WORLD_SIZE, ...), by Slurm's srun (SLURM_PROCID, ...), or alone.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from fedpeft_dist.runtime.interrupts import stop_with_parent


@dataclass(frozen=True)
class Launch:
    """This process's place among its peers, and the address where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """The number of ranks on this machine, which share its memory."""
    address: str = ""
    """Empty if no launcher started this process."""
    port: int = 0
    restart: int = 0
    """How often torchrun has restarted the group."""
    job: str = ""
    """The name of torchrun's launch, the same after a restart. A group that meets in the agent's store makes a name of
    its own, because torchrun gives most launches the same one."""
    agent_store: bool = False
    """Whether torchrun's agent already serves the store at that address."""
    slurm_job: str = ""
    """The number of the Slurm job that this process belongs to; each task of an array has its own number."""
    requeues: int = 0
    """How often Slurm has put that job back into its queue."""
    is_step: bool = False
    """Whether srun started this process as one of several."""
    gpu_sharers: int = 1
    """The number of processes that launch/sweep.py runs on this process's GPU at a time."""


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads torchrun's or Slurm's variables; without either, this process is alone.

    FEDPEFT_GPU_SHARERS comes from launch/sweep.py, whose workers may share a GPU.

    Only a Slurm job step counts (SLURM_STEP_NUM_TASKS): a batch script that starts python itself is one process,
    however many tasks its job asked for.
    """
    job, requeues = environment.get("SLURM_JOB_ID", ""), int(environment.get("SLURM_RESTART_COUNT", 0))
    common = {
        "slurm_job": job,
        "requeues": requeues,
        "gpu_sharers": int(environment.get("FEDPEFT_GPU_SHARERS", 1)),
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
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            **common,
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        step = int(environment.get("SLURM_STEP_ID", 0))
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=_tasks_on_this_node(environment),
            address=environment.get("MASTER_ADDR") or _first_slurm_host(environment),
            # A port that steps on the same node are unlikely to share, below the ports that the system hands out. After
            # a requeue, the attempt before may still hold its port. With these factors, the ports of a job's first 16
            # steps and 4 attempts lie at least 180 apart, so jobs with close numbers do not collide.
            port=int(environment.get("MASTER_PORT") or 20000 + (int(job or 0) + 5909 * step + 1463 * requeues) % 12000),
            is_step=True,
            **common,
        )
    return Launch(**common)


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """The step's tasks on this node. Slurm lists them by node, such as `4(x2),1`; without the list, their mean."""
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeated or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    if node < len(counts):
        return counts[node]
    return -(-int(environment["SLURM_STEP_NUM_TASKS"]) // int(environment["SLURM_STEP_NUM_NODES"]))


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    """The node of the step's first task: its name if that resolves, else Slurm's address for it."""

    def ask(*what: str) -> str:
        return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, check=True).stdout

    try:
        node = ask("hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
        with suppress(OSError):
            socket.getaddrinfo(node, None)
            return node
        return re.search(r" NodeAddr=(\S+)", ask("node", node))[1]
    except (OSError, subprocess.CalledProcessError):  # in a container: the node that called srun, a job's first
        return environment["SLURM_LAUNCH_NODE_IPADDR"]


def follow_agent(environment: Mapping[str, str] = os.environ) -> None:
    """Asks this process to stop when torchrun's agent ends. Some signals kill an agent before it tells its ranks."""
    if "TORCHELASTIC_RUN_ID" in environment:
        stop_with_parent()
