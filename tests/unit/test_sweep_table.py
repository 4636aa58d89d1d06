"""The live table of launch/sweep.py stays readable with hundreds of cells."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

SCRIPT = Path(__file__).parents[2] / "launch" / "sweep.py"


@pytest.mark.parametrize("num_failed", [0, 3, 200])
def test_the_table_fits_and_counts_hidden_failures(num_failed: int) -> None:
    specification = importlib.util.spec_from_file_location("launch_sweep", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    running = [
        SimpleNamespace(
            task=SimpleNamespace(name=f"running{i}", state="running"),
            place=SimpleNamespace(name=f"gpu {i}"),
            rounds_done=i,
            rounds=50,
            accuracy="0.5000",
            seconds_left=lambda: 61.0,
        )
        for i in range(8)
    ]
    failed = [SimpleNamespace(name=f"failed{i}", state="failed", reason="long " * 50) for i in range(num_failed)]
    tasks = [*(attempt.task for attempt in running), *failed]
    runner = SimpleNamespace(attempts=running, tasks=tasks, stopping=True, status=lambda: "300 waiting")
    display = script.Display()
    display.console = Console(width=80, height=24, record=True)
    display.console.print(display.table(runner))
    lines = display.console.export_text().rstrip().splitlines()
    assert len(lines) <= 24
    assert lines[7].split() == ["running6", "gpu", "6", "6/50", "0.5000", "0:01:01"]
    assert lines[-1] == "stopping: 300 waiting"
    shown = sum(line.startswith("failed") for line in lines)
    assert shown == min(num_failed, 11)
    assert [line for line in lines if "more failed" in line] == (["189 more failed"] if num_failed == 200 else [])
