"""The collectives a run needs. All of them are the identity in a single process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.process import Runtime


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Adds an int64 tensor over all ranks, in place; integers, so that the order of the sum cannot matter."""
    assert values.dtype == torch.int64
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def min_over_ranks(value: int, runtime: Runtime) -> int:
    """The smallest of the ranks' integers."""
    tensor = torch.tensor([value], dtype=torch.int64, device=runtime.device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor.item())


def assert_same_on_all_ranks(data: bytes, what: str, runtime: Runtime) -> None:
    """Fails on every rank if the ranks hold different bytes; replicated state is never sent, so it must be equal."""
    if not dist.is_initialized():
        return
    digest = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
    spread = torch.tensor([digest, -digest], dtype=torch.int64, device=runtime.device)
    dist.all_reduce(spread, op=dist.ReduceOp.MAX)
    if int(spread[0]) != -int(spread[1]):
        raise RuntimeError(f"{what} differs between the ranks of this run")


@contextmanager
def failing_together(runtime: Runtime) -> Iterator[None]:
    """Lets every rank raise ConfigError where one of them does, so that none waits for the others for ever.

    The code inside may not call collectives.
    """
    error: ConfigError | None = None
    try:
        yield
    except ConfigError as raised:
        error = raised
    failed = sum_over_ranks(torch.tensor([int(error is not None)], device=runtime.device))
    if error is not None:
        raise error
    if failed:
        raise ConfigError("another rank of this run cannot start; its own error says why")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
