"""What holds for every test."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft_dist.runtime.interrupts import STOP_SIGNALS

# MKL rounds a small product by where its operands lie in memory, unless told otherwise before its first use.
# numerics/test_exact_lanes.py asks a process of its own whether a run, too, is told.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


gc.set_threshold(100_000)  # collecting the tests makes many objects and little garbage


ORDER = (
    *("slurm/test_train", "multiprocess/test_signals", "multiprocess", "slurm/test_submitit", "cli"),
    *("slurm/test_sweep", "numerics", "slurm"),
)
"""The tests that take longest come first, so that no worker is left alone with them at the end.

Tests of Slurm mostly wait. They are spread, so that other workers compute meanwhile.
"""


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A command leaves them as its process's end needs them, also where that process is pytest's own."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests live to the end, so no later search for garbage has to look at them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow variants of tests, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((number for number, start in enumerate(ORDER) if path.startswith(start)), len(ORDER))

    items.sort(key=order)
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="a slow variant of another test; run it with --slow"))
