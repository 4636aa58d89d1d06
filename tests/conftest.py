"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

# MKL rounds a small product by where its operands lie in memory, unless told otherwise before its first use.
# numerics/test_exact_lanes.py asks a process of its own whether a run, too, is told.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow variants of tests, too")


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="a slow variant of another test; run it with --slow"))
