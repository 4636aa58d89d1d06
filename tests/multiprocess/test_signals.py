"""Processes that are told to stop, that are killed, that hang or fail: who ends when, with which code, saying what.

A run's ranks are started by torchrun, or without an agent, as srun starts them: then they have to end by themselves.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, INTERRUPTED, RunDirectory
from fedpeft_dist.tracking.run_lock import Owner
from tests.real_runs import (
    LATE_SIGNALS,
    ROUNDS,
    TRACE,
    Launched,
    complete,
    differences,
    hear_signals,
    rounds_logged,
    run_of,
    send,
    start,
    start_without_agent,
    wait_for_rounds,
    wait_until,
    whole,
    write_config,
)
from tests.warm_process import WarmProcess

__all__ = ["whole"]
ENDLESS = 3
"""The round that would last for days."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, "run")


def assert_interrupted(run: RunDirectory, code: int, output: str) -> int:
    """Returns the round that comes next."""
    state = run.read_state()
    assert (code, state["state"]) == (75, INTERRUPTED), output
    assert 0 < state["next_round"] < ROUNDS
    assert output.count("interrupted; run the same command to go on\n") == 1
    assert TRACE not in output
    return state["next_round"]


# --- asked to stop -----------------------------------------------------------------------------------------------


def test_each_signal_at_any_time_interrupts_and_the_run_ends_all_the_same(config: Path, whole: RunDirectory) -> None:
    """First while it imports and builds, when nothing or a whole state may be there; then between its rounds."""
    run = run_of(config)
    early = [(0.3, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGHUP), (3, signal.SIGUSR1), (4, signal.SIGTERM)]
    for seconds, number in early:
        with start(config) as launched:
            time.sleep(seconds)
            assert launched.process.poll() is None, launched.output
            send(launched.process.pid, number)
            code = launched.wait(timeout=60)
            # Only in its first instants is the interpreter deaf.
            assert code == 75 or (seconds < 2 and code in (-number, 1)), (seconds, number.name, launched.output)
            assert "Traceback" not in launched.output
        state = run.read_state()
        assert state is None or state["state"] == INTERRUPTED, (seconds, state)
        assert state is not None or not run.config_file.exists()
    rounds_done = 0 if state is None else state["next_round"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        (warm,) = start_without_agent(config, ranks=1)
        with warm:
            wait_for_rounds(warm, run, rounds_done + 3)
            send(warm.process.pid, number)
            rounds_done = assert_interrupted(run, warm.wait(timeout=60), warm.output)
    complete(config)
    assert not differences(run, whole)


@pytest.mark.parametrize(("ranks", "fault"), [(1, "endless:3:"), (2, "endless:3:"), (2, "evaluation:3:1")])
def test_a_round_that_would_last_for_days_is_dropped(
    tmp_path: Path, whole: RunDirectory, ranks: int, fault: str
) -> None:
    config = write_config(tmp_path, "run", checkpoint_every=10)
    run = run_of(config)
    one = {"config": config, "ranks": ranks, "faulty": True, "FAULT": fault}
    with start_without_agent(**one)[0] if ranks == 1 else start(**one) as launched:
        wait_for_rounds(launched, run, ENDLESS)
        time.sleep(1)
        send(launched.process.pid, signal.SIGTERM)
        asked = time.monotonic()
        code = launched.wait(timeout=60)
        assert time.monotonic() - asked < 30
        assert assert_interrupted(run, code if ranks == 1 else 75, launched.output) == ENDLESS
    assert f"going on after round {ENDLESS}\n" in complete(config)
    assert not differences(run, whole)


def test_a_closed_terminal_interrupts_a_run(config: Path, whole: RunDirectory) -> None:
    """The kernel sends SIGHUP, and whatever the run still says on its terminal fails."""
    run = run_of(config)
    terminal, end = pty.openpty()

    def take_terminal() -> None:
        hear_signals()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "fedpeft_dist", "train", str(config), "output.checkpoint_every=0"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), end)
    with subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=take_terminal) as process:
        try:
            os.close(end)
            wait_until(lambda: rounds_logged(run) >= 3 or process.poll() is not None)
            os.close(terminal)
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
    state = run.read_state()
    assert state["state"] == INTERRUPTED
    assert 3 <= state["next_round"] < ROUNDS
    assert f"going on after round {state['next_round']}\n" in complete(config)
    assert not differences(run, whole)


def test_a_second_sigint_stops_at_once(config: Path, whole: RunDirectory) -> None:
    run = run_of(config)
    (launched,) = start_without_agent(config, ranks=1, faulty=True, FAULT=f"endless:{ENDLESS}:")
    with launched:
        wait_for_rounds(launched, run, ENDLESS)
        for _ in range(2):
            time.sleep(1)
            assert launched.is_running
            send(launched.process.pid, signal.SIGINT)
        asked = time.monotonic()
        code = launched.wait(timeout=60)
        assert code is not None
        assert time.monotonic() - asked < 10
        assert code not in (0, 75)
        assert "Traceback" not in launched.output
    assert run.read_state()["state"] == FAILED
    complete(config)
    assert not differences(run, whole)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        signal.SIGUSR1,
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_torchrun_interrupts_its_ranks(config: Path, whole: RunDirectory, number: signal.Signals) -> None:
    """The last two end the agent on the spot, and its ranks are told by the kernel."""
    run = run_of(config)
    with start(config, ranks=2) as launched:
        wait_for_rounds(launched, run, 3)
        send(launched.process.pid, number)
        assert launched.wait(timeout=60) != 0
        assert_interrupted(run, 75, launched.output)
    complete(config, ranks=2)
    assert not differences(run, whole)


@pytest.mark.slow
def test_torchrun_that_is_killed_while_its_ranks_start_leaves_none_behind(config: Path, whole: RunDirectory) -> None:
    """They may first look for the group's store, which has gone with it."""
    with start(config, ranks=2) as launched:
        wait_until(lambda: len(launched.ranks()) == 2)
        time.sleep(1)
        send(launched.process.pid, signal.SIGKILL)
        launched.wait(timeout=120)
    complete(config, ranks=2)
    assert not differences(run_of(config), whole)


def test_a_restart_under_the_same_launch_leaves_an_interrupted_run_interrupted(config: Path) -> None:
    """torchrun takes exit code 75 for a failure and starts the worker again; that must not undo the interruption."""
    run = run_of(config)
    with start(config, ranks=2, max_restarts=1) as launched:
        wait_for_rounds(launched, run, 3)
        send(launched.ranks()[1], signal.SIGUSR1)
        assert launched.wait() == 0
        assert "a restart does not undo it" in launched.output
        assert_interrupted(run, 75, launched.output)


def test_ranks_that_wait_for_an_earlier_attempt_are_interrupted_together(config: Path) -> None:
    lock = run_of(config).lock(Owner.this_process("41", 0))
    ranks = start_without_agent(config, SLURM_JOB_ID="41", SLURM_RESTART_COUNT="1")
    with ranks[0], ranks[1]:
        wait_until(lambda: "waiting until it lets go" in ranks[0].output)
        for rank in ranks:
            send(rank.process.pid, signal.SIGTERM)
        codes = [rank.wait(timeout=60) for rank in ranks]
        assert codes == [75, 75], [rank.output for rank in ranks]
        assert "error:" not in "".join(rank.output for rank in ranks)
    lock.release()


def test_signals_after_the_last_round_do_not_change_the_exit_code(config: Path) -> None:
    (config.parent / "sitecustomize.py").write_text(LATE_SIGNALS.replace("signal.SIGUSR2, ", ""))
    with start(config, PYTHONPATH=os.pathsep.join([str(config.parent), *sys.path])) as launched:
        assert launched.wait() == 0, launched.output
        assert launched.output.endswith("late signals\n")
    assert run_of(config).read_state()["state"] == COMPLETE


# --- a rank is lost ----------------------------------------------------------------------------------------------


def assert_named_once(outputs: Sequence[str], rank: int) -> None:
    lines = [line for output in outputs for line in output.splitlines()]
    naming = [line for line in lines if re.search(rf"\brank {rank} \(host \S+, pid \d+\) has ", line)]
    assert len(naming) == 1, "\n".join(lines)
    assert not any(re.search(rf"\brank {1 - rank} \(host ", line) for line in lines), "\n".join(lines)


def lose(ranks: Sequence[WarmProcess], run: RunDirectory, lost: int, number: signal.Signals) -> float:
    """Sends a signal to a rank in mid-run; returns how many seconds the other one then takes to end, with code 1."""
    wait_for_rounds(ranks[0], run, 3)
    send(ranks[lost].process.pid, number)
    sent = time.monotonic()
    assert ranks[1 - lost].wait(timeout=100) == 1
    return time.monotonic() - sent


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("number", "limit"), [(signal.SIGKILL, 15), pytest.param(signal.SIGSTOP, 60, marks=pytest.mark.slow)]
)
def test_a_lost_rank_ends_the_others(
    config: Path, whole: RunDirectory, lost: int, number: signal.Signals, limit: float
) -> None:
    """Rank 0 serves the store that the ranks meet in, where there is no agent to do so."""
    run = run_of(config)
    first, second = start_without_agent(config)
    with first, second:
        assert lose([first, second], run, lost, number) < limit
        assert_named_once([first.output, second.output], lost)
    assert run.read_state()["state"] == FAILED
    complete(config)
    assert not differences(run, whole)


@pytest.mark.parametrize(
    ("number", "limit"), [(signal.SIGKILL, 15), pytest.param(signal.SIGSTOP, 60, marks=pytest.mark.slow)]
)
def test_a_lost_rank_is_named_under_torchrun(config: Path, number: signal.Signals, limit: float) -> None:
    run = run_of(config)
    with start(config, ranks=2) as launched:
        wait_for_rounds(launched, run, 3)
        ranks = launched.ranks()
        send(ranks[1], number)
        wait_until(lambda: ranks[0] not in launched.processes(), timeout=limit)
        assert launched.wait(timeout=60) == 1  # torchrun gives a rank that does not listen half a minute
        assert_named_once([launched.output], 1)
    assert run.read_state()["state"] == FAILED


def test_an_error_on_one_rank_ends_the_others(config: Path, whole: RunDirectory) -> None:
    run = run_of(config)
    first, second = start_without_agent(config, faulty=True, FAULT=f"raise:{ENDLESS}:1")
    with first, second:
        assert second.wait() == 1
        failed = time.monotonic()
        assert first.wait(timeout=60) == 1
        assert time.monotonic() - failed < 15
        assert second.output.count("RuntimeError: a fault that a test has planted") == 1
        assert "Traceback" not in first.output
        assert_named_once([first.output, second.output], 1)
    assert run.read_state()["state"] == FAILED
    complete(config)
    assert not differences(run, whole)


JOIN = """
import os, sys
import torch.distributed as dist
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.runtime import process

def fail(*_, **__):
    if sys.argv[1] == "dies":
        os._exit(9)
    raise ValueError("a fault that a test has planted")

if os.environ["RANK"] == sys.argv[2]:
    dist.init_process_group = fail
with process.start(RuntimeConfig(device="cpu")):
    print("formed")
"""


@pytest.mark.parametrize(
    ("fault", "lost", "what"),
    [
        ("dies", 1, "has died"),
        pytest.param("fails", 1, "has failed, its own error says why", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_while_the_group_is_formed(tmp_path: Path, fault: str, lost: int, what: str) -> None:
    """The others wait for it inside of torch.distributed, in hours."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", JOIN, fault, str(lost)]
    first, second = (
        Launched(command, tmp_path, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    )
    with first, second:
        codes = [first.wait(timeout=60), second.wait(timeout=60)]
        outputs = [first.output, second.output]
    assert codes[1 - lost] == 1, outputs
    assert_named_once(outputs, lost)
    assert f") {what}" in outputs[1 - lost]
    assert "formed" not in "".join(outputs)
