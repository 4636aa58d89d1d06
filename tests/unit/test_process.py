"""A process finds its rank in fake environments of torchrun, srun and none, and resolves `auto`."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.runtime.launch import Launch, find_launch
from fedpeft_dist.runtime.peers import Peers
from fedpeft_dist.runtime.process import Runtime, resolve_device, start

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29411",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM_JOB = {"SLURM_JOB_ID": "41234", "SLURM_NTASKS": "5", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
SRUN = {
    **SLURM_JOB,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[3-4]",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's command, which records how it was called."""
    program, calls = tmp_path / "scontrol", tmp_path / "calls"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n'
        'case "$2" in hostnames) printf "node3\\nnode4\\n" ;; node) echo "NodeName=$3 NodeAddr=10.0.0.3" ;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return calls


def test_alone() -> None:
    assert find_launch({}) == Launch()
    assert find_launch({"PATH": "/bin", "MASTER_ADDR": "x"}).world_size == 1


def test_torchrun() -> None:
    assert find_launch(TORCHRUN) == Launch(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        address="node7",
        port=29411,
        restart=2,
        agent_store=True,
    )


def test_torchrun_variables_set_by_hand() -> None:
    launch = find_launch({"RANK": "0", "WORLD_SIZE": "2"})
    assert (launch.rank, launch.world_size, launch.local_rank) == (0, 2, 0)
    assert (launch.address, launch.agent_store, launch.restart) == ("127.0.0.1", False, 0)
    assert launch.port > 0


def test_torchrun_inside_a_slurm_step_is_torchrun() -> None:
    assert find_launch({**SRUN, **TORCHRUN}) == replace(find_launch(TORCHRUN), slurm_job="41234")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The host names that resolve."""
    known: set[str] = set()

    def resolve(name: str, *_: object) -> list[object]:
        if name not in known:
            raise socket.gaierror
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


def test_srun_asks_slurm_for_the_first_host(scontrol: Path, names: set[str]) -> None:
    names.add("node3")
    launch = find_launch(SRUN)
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 5, 0)
    assert launch.local_world_size == 3  # five tasks on two nodes
    assert launch.address == "node3"
    assert scontrol.read_text() == "show hostnames node[3-4]\n"
    assert not launch.agent_store


def test_srun_asks_slurm_for_an_address_if_the_name_does_not_resolve(scontrol: Path, names: set[str]) -> None:
    assert find_launch(SRUN).address == "10.0.0.3"
    assert scontrol.read_text() == "show hostnames node[3-4]\nshow node node3\n"


def test_srun_without_scontrol_uses_the_node_that_called_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_launch({**SRUN, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}).address == "10.0.0.9"


def test_steps_on_one_node_use_different_ports(scontrol: Path) -> None:
    def port(job: int, step: int, restart: int) -> int:
        variables = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)}
        return find_launch({**SRUN, "MASTER_ADDR": "x", **variables}).port

    ports = {port(job, step, restart) for job in range(41000, 41150) for step in range(8) for restart in range(3)}
    assert len(ports) == 150 * 8 * 3
    assert all(20000 <= port < 32000 for port in ports)


def test_srun_with_a_given_address_does_not_ask_slurm() -> None:
    launch = find_launch({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_RESTART_COUNT": "1"})
    assert (launch.address, launch.port, launch.slurm_job) == ("head", 1234, "41234")
    assert (launch.restart, launch.requeues) == (0, 1)


def test_a_batch_script_without_srun_is_one_process() -> None:
    assert find_launch(SLURM_JOB) == Launch(slurm_job="41234")
    assert find_launch({**SLURM_JOB, "SLURM_NTASKS": "64", "SLURM_LOCALID": "0"}) == Launch(slurm_job="41234")


def test_a_step_of_one_task_is_alone() -> None:
    one = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert find_launch(one) == Launch(slurm_job="41234")


def fake_cuda(monkeypatch: pytest.MonkeyPatch, devices: int, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")


@pytest.mark.parametrize(("precision", "expected"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_resolve_device_without_a_gpu(monkeypatch: pytest.MonkeyPatch, precision: str, expected: str) -> None:
    fake_cuda(monkeypatch, 0)
    for device in ("auto", "cpu"):
        found = resolve_device(RuntimeConfig(device=device, precision=precision), Launch())
        assert found == (torch.device("cpu"), expected)


@pytest.mark.parametrize(
    ("precision", "bf16", "expected"),
    [("auto", True, "bf16"), ("auto", False, "fp16"), ("fp16", True, "fp16"), ("fp32", False, "fp32")],
)
def test_resolve_device_with_gpus(monkeypatch: pytest.MonkeyPatch, precision: str, bf16: bool, expected: str) -> None:
    fake_cuda(monkeypatch, 2, bf16)
    for local_rank in (0, 1):
        launch = Launch(rank=local_rank + 2, world_size=4, local_rank=local_rank, local_world_size=2)
        found = resolve_device(RuntimeConfig(precision=precision), launch)
        assert found == (torch.device("cuda", local_rank), expected)
    with pytest.raises(ConfigError, match=r"3 ranks on a machine with 2 CUDA device"):
        resolve_device(RuntimeConfig(), Launch(world_size=3, local_world_size=3))
    assert resolve_device(RuntimeConfig(device="cpu"), Launch()) == (torch.device("cpu"), "fp32")


@pytest.mark.parametrize(
    ("devices", "values", "message"),
    [
        (0, {"device": "cuda"}, r"runtime\.device: 'cuda', but .* cpu or auto"),
        (0, {"precision": "fp16"}, r"runtime\.precision: 'fp16' needs a CUDA device; .* fp32, bf16 or auto"),
        (2, {"device": "cpu", "precision": "fp16"}, r"runtime\.precision: 'fp16' needs a CUDA device"),
        (1, {"precision": "bf16"}, r"runtime\.precision: 'bf16' is beyond Old Card; give fp16, fp32 or auto"),
    ],
)
def test_refuses_a_device_or_precision_that_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, devices: int, values: dict[str, str], message: str
) -> None:
    fake_cuda(monkeypatch, devices, bf16=False)
    with pytest.raises(ConfigError, match=message):
        resolve_device(RuntimeConfig(**values), Launch())


def test_runtime_has_rank_and_precision() -> None:
    first = Runtime(Launch(), torch.device("cpu"), "fp32", 1)
    other = Runtime(Launch(rank=3, world_size=4), torch.device("cpu"), "bf16", 1)
    assert (first.rank, first.world_size, first.is_main, first.compute_dtype) == (0, 1, True, torch.float32)
    assert (other.rank, other.world_size, other.is_main, other.compute_dtype) == (3, 4, False, torch.bfloat16)
    x = torch.ones(2, 2)
    with first.autocast():
        assert (x @ x).dtype == torch.float32
    with other.autocast():
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tasks", "node", "expected"), [("4,1", 0, 4), ("4,1", 1, 1), ("4(x2),1", 1, 4), ("4(x2),1", 2, 1), ("", 0, 3)]
)
def test_tasks_on_a_node_of_a_step(tasks: str, node: int, expected: int) -> None:
    environment = {**SRUN, "MASTER_ADDR": "head", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    assert find_launch(environment).local_world_size == expected


def test_a_task_bound_to_a_gpu_uses_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 1)
    bound = Launch(world_size=4, local_rank=3, local_world_size=4, is_step=True)
    assert resolve_device(RuntimeConfig(), bound)[0] == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"4 ranks on a machine with 1 CUDA device"):
        resolve_device(RuntimeConfig(), replace(bound, is_step=False))


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """torchrun's agent, with a store that outlives its one rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    follow(store, monkeypatch)
    return store


def follow(agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**TORCHRUN, **alone, "MASTER_PORT": str(agent.port), "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)


def test_a_launch_keeps_its_name_while_its_agent_lives(agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun calls a launch "none" if it is given no name."""
    jobs = []
    later = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for store in (agent, agent, later):
        follow(store, monkeypatch)
        with start(RuntimeConfig(device="cpu")) as runtime:
            jobs.append(runtime.launch.job)
    first, restarted, other = jobs
    assert first == restarted
    assert other not in (first, "none")


def test_a_failed_group_of_one_can_be_followed_by_another(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_agents in ("True", "False"):
        if is_agents == "False":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", is_agents)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), start(RuntimeConfig(device="cpu")):
                raise ZeroDivisionError
            assert not dist.is_initialized()
        with start(RuntimeConfig(device="cpu")):
            assert dist.is_initialized()


def test_a_failure_to_form_the_group_is_passed_to_the_peers(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure, told = RuntimeError("no such backend"), []

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(dist, "init_process_group", fail)
    leave = Peers.leave
    monkeypatch.setattr(Peers, "leave", lambda peers, error=None: (told.append(error), leave(peers, error)))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="no such backend"), start(RuntimeConfig(device="cpu")):
        pass
    assert told == [failure]
    assert time.monotonic() - started < 10
