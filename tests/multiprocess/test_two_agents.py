"""torchrun on two machines: an agent that restarts its ranks because the other's have failed counts no restart."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

from fedpeft_dist.tracking.run_directory import RunDirectory
from tests.real_runs import Launched, differences, run_of, send, wait_for_rounds, wait_until, whole, write_config

__all__ = ["whole"]


def test_ranks_of_two_agents_meet_again_after_a_rank_dies(tmp_path: Path, whole: RunDirectory) -> None:
    config = write_config(tmp_path, "run")
    run = run_of(config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--nnodes=2 --nproc-per-node=1 --max-restarts=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options.split(),
        "--rdzv-id=one",
        "--local-addr=127.0.0.1",
    ]
    command += ["-m", "fedpeft_dist", "train", str(config)]
    first = Launched(command, tmp_path, {})
    with first:
        time.sleep(2)  # whoever comes first serves the agents' store
        with Launched(command, tmp_path, {}) as second:
            wait_for_rounds(first, run, 3)
            wait_until(lambda: len(second.ranks()) == 1)
            (victim,) = second.ranks().values()
            send(victim, signal.SIGKILL)
            assert first.wait() == 0, first.output
            assert second.wait() == 0, second.output
            assert "going on after round" in first.output + second.output
    assert not differences(run, whole)
