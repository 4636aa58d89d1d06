"""What holds for every test."""

from __future__ import annotations

import os

# MKL rounds a small product by where its operands lie in memory, unless told otherwise before its first use.
# numerics/test_exact_lanes.py asks a process of its own whether a run, too, is told.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
