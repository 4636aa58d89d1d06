"""A run that is interrupted ends as if nothing had happened, also on another number of ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fedpeft_dist.tracking.run_directory import INTERRUPTED, RunDirectory
from tests.real_runs import complete, differences, run_of, send, start, wait_for_rounds, whole, write_config

__all__ = ["whole"]


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_from_one_rank_to_two_and_back(tmp_path: Path, whole: RunDirectory, every: int) -> None:
    config = write_config(tmp_path, "stopped", checkpoint_every=every)
    run, rounds_done = run_of(config), 0
    for ranks in (1, 2):
        with start(config, ranks) as launched:
            wait_for_rounds(launched, run, rounds_done + 4)
            send(launched.process.pid, signal.SIGTERM)
            code = launched.wait()
            assert (code == 75) if ranks == 1 else code, launched.output  # torchrun has codes of its own
        state = run.read_state()
        assert state["state"] == INTERRUPTED
        assert state["next_round"] >= rounds_done + 4
        rounds_done = state["next_round"]
    assert f"going on after round {rounds_done}\n" in complete(config)
    assert not differences(run, whole)
    assert "already complete" in complete(config)
    assert not differences(run, whole)


@pytest.mark.parametrize("algorithm", ["scaffold", "trimmed_mean"])
def test_killed_run_keeps_the_state_of_its_algorithm(tmp_path: Path, algorithm: str) -> None:
    """SCAFFOLD's control variates come back from the checkpoint, also on another number of ranks."""
    whole, killed = (write_config(tmp_path, name, rounds=12, algorithm=algorithm) for name in ("whole", "killed"))
    complete(whole)
    with start(killed, ranks=2) as launched:
        wait_for_rounds(launched, run_of(killed), 4)  # leaving the context kills every process
    complete(killed)
    assert not differences(run_of(killed), run_of(whole))
