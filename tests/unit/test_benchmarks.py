"""The programs in benchmarks/: README lists each, each runs at tiny sizes, and the loops train the same federation.

Contestants of a race run in this process here; one race has real processes.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bare
import bare_methods
import contest
import evaluation
import ours
import pytest
import torch
from safetensors.torch import load_file
from workloads import WORKLOADS, Workload

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.runtime import process

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks"
TINY = ["--tiny", "--turns", "1", "--seconds", "0"]
ARGUMENTS = {
    "against_loop.py": [*TINY, "--workloads", "overhead", "private"],
    "lanes.py": [*TINY, "--workloads", "glyph", "--lanes", "1", "2"],
    "ranks.py": [*TINY, "--workloads", "glyph"],
    "evaluation.py": [*TINY, "--methods", "bias"],
    "cache.py": [*TINY, "--workloads", "head"],
    "methods.py": [*TINY, "--methods", "head", "lora"],
    "lane_memory.py": [*TINY, "--methods", "head"],
    "round_overhead.py": [*TINY, "--workloads", "glyph"],
    "eight_bits.py": [*TINY, "--methods", "bias"],
    "participation.py": ["20", "200"],
    "partition_ends.py": ["--seeds", "1"],
}
STARTS_PROCESSES = {
    "population.py",
    "sharding.py",
    "fit_memory.py",
    "export_error.py",
    "peers/race.py",
}
"""They start whole processes, which takes seconds each. tests/cli/test_exported_programs.py uses export_error.py."""
TRAINS_LONG = {
    *("checkpoint_cost.py", "loader.py", "privacy_audit.py", "privacy_cost.py", "robust_mean.py", "tune_quickstart.py"),
}
"""They have no tiny sizes. The audit has tests of its own."""
SEPARATELY = {"on_gpu.py"}


def programs() -> set[str]:
    """The files that can be run, without those that only contestants run."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("peers/*.py")]
    names = {file.relative_to(FOLDER).as_posix() for file in files if "def main()" in file.read_text()}
    return names - {"ours.py", "bare.py", "peers/pfl_worker.py", "peers/flower_worker.py"}


@pytest.fixture(autouse=True)
def _process_as_before():
    """Programs set threads and deterministic algorithms for themselves."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def in_this_process(monkeypatch):
    """Contestants without processes, on one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

    def enter(self: contest.Contestant) -> contest.Contestant:
        if self.program == "ours.py":
            self.argument["runtime"]["threads"] = 1
            config = parse_config(self.argument, "benchmark")
            with process.start(config.runtime) as runtime:
                self.train = ours.Rounds(config, runtime).run
        elif self.program == "evaluation.py":
            self.train = evaluation.contender(**self.argument)
        else:
            workload = Workload(**self.argument["workload"])
            loop = bare.Loop(bare.Federation(workload, self.argument["file"]))
            self.train = {"clients": loop.train_clients, "batch": loop.train_batches}[self.argument["kind"]]
        return self

    def ask(self: contest.Contestant, rounds: int) -> dict[str, float]:
        started = time.perf_counter()
        return {"samples": self.train(rounds), "seconds": time.perf_counter() - started}

    monkeypatch.setattr(contest.Contestant, "__enter__", enter)
    monkeypatch.setattr(contest.Contestant, "__exit__", lambda *_: None)
    monkeypatch.setattr(contest.Contestant, "ready", lambda _: {})
    monkeypatch.setattr(contest.Contestant, "ask", ask)


def test_readme_lists_every_program():
    listed = set(re.findall(r"`([\w/]+\.py)`", (FOLDER / "README.md").read_text()))
    helpers = {"contest.py", "workloads.py", "bare.py", "bare_methods.py", "bare_modules.py", "ours.py", "race.py"}
    assert programs() == listed - helpers
    assert programs() == {*ARGUMENTS, *STARTS_PROCESSES, *TRAINS_LONG, *SEPARATELY}


@pytest.mark.parametrize("program", ARGUMENTS)
def test_a_program_prints_one_json_object(program, monkeypatch, capsys, in_this_process):
    if program == "cache.py" and not ours.known({"cache": "none"}):
        pytest.skip("no key runtime.cache yet")
    monkeypatch.setattr(sys, "argv", [program, *ARGUMENTS[program]])
    if program == "lane_memory.py":
        import lane_memory

        monkeypatch.setattr(lane_memory, "in_own_process", lane_memory.measure)
        lane_memory.main()
    elif program == "round_overhead.py":
        import round_overhead

        monkeypatch.setattr(round_overhead, "measure_run", lambda workload: {})  # a run in a process of its own
        round_overhead.main()
    else:
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(FOLDER / program), run_name="__main__")
    printed = capsys.readouterr().out
    if program == "partition_ends.py":  # a table for people
        assert "first" in printed
    else:
        assert json.loads(printed)


def test_contestants_race_in_processes():
    workload = WORKLOADS["overhead"].tiny()
    results = contest.race({"one": ours.contestant(workload, 1, 1), "two": ours.contestant(workload, 2, 1)}, 2, 0.0)
    assert all(len(result["turns"]) == 2 and min(result["turns"]) > 0 for result in results.values())
    assert results["one"]["lanes"] == 2
    assert results["two"]["lanes"] == 1  # each rank trains half of the cohort
    assert contest.ratio(results, "one", "one") == 1.0


@pytest.mark.parametrize("method", bare_methods.METHODS)
def test_the_bare_loop_ends_where_the_package_does(method, tmp_path):
    """All clients take part with one batch of all their samples, so that no order of samples can differ."""
    tiny = WORKLOADS["glyph"].tiny()
    workload = replace(tiny, method=ours.METHODS[method], clients=tiny.cohort, batch=tiny.samples, epochs=3)
    ours.federation_file(workload, str(tmp_path / "federation"))
    config = parse_config(workload.tree(), "benchmark")
    with process.start(config.runtime) as runtime:
        rounds = ours.Rounds(config, runtime)
    start = rounds.state.vector
    federation = bare.Federation(workload, str(tmp_path / "federation"))
    assert rounds.run(1) == bare.Loop(federation).train_clients(1) == workload.cohort * workload.samples * 3
    rounds.save(str(tmp_path / "ours"))
    own, largest = load_file(tmp_path / "ours"), (rounds.state.vector - start).abs().max()
    assert largest > 1e-3
    for name, tensor in federation.tensors().items():
        assert (own[name] - tensor).abs().max() < 1e-4 * largest, name


def test_the_gpu_script_runs_on_the_cpu(tmp_path):
    output = tmp_path / "figures.json"
    command = ["--device", "cpu", "--small", "--parts", "gemm", "exactness", "tests", "methods", "lanes", "cell"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    subprocess.run([FOLDER / "on_gpu.sh", output, *command], check=True, env=environment, stderr=subprocess.PIPE)
    figures = json.loads(output.read_text())
    exact = [value for value in figures["exactness"].values() if isinstance(value, dict)]
    assert len(exact) == 10
    assert all(one["equal"] and one["largest_change"] > 0 for one in exact)
    assert figures["methods"]["full"]["images_per_second"] > 0
