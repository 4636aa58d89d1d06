"""The collectives a run needs. In a single process they do nothing."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.errors import FirstToldError, ToldElsewhereError
from fedpeft_dist.runtime.process import Runtime


def sum_over_ranks(values: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Adds an int64 tensor over all ranks, in place. The order of the sum cannot matter, because these are integers."""
    assert values.dtype == torch.int64
    _all_reduce(values, dist.ReduceOp.SUM, runtime)
    return values


def gather_rows(rows: Mapping[int, torch.Tensor], owners: Sequence[int], size: int, runtime: Runtime) -> torch.Tensor:
    """The rows of all ranks in the order of their owners, to the bit; every rank must call it.

    Args:
        rows: float32 [size] each, by owner; no owner has rows on two ranks.
        owners: the owners of all rows, the same on every rank.

    Returns:
        float32 [len(owners), size], on the device. An owner without a row has zeros.
    """
    gathered = torch.zeros(len(owners), size, device=runtime.device)
    for place, owner in enumerate(owners):
        if owner in rows:
            gathered[place] = rows[owner]
    _all_reduce(gathered.view(torch.int32), dist.ReduceOp.SUM, runtime)  # the others add integer zeros
    return gathered


def any_rank(flag: bool, runtime: Runtime) -> bool:
    """Whether the flag is set on at least one rank."""
    return bool(sum_over_ranks(torch.tensor([int(flag)], device=runtime.device), runtime))


def min_over_ranks(value: int, runtime: Runtime) -> int:
    """The smallest of the ranks' integers."""
    tensor = torch.tensor([value], dtype=torch.int64, device=runtime.device)
    _all_reduce(tensor, dist.ReduceOp.MIN, runtime)
    return int(tensor.item())


def assert_same_on_all_ranks(data: bytes, what: str, runtime: Runtime) -> None:
    """Fails on every rank if the ranks hold different bytes. Replicated state is never sent, so it must be equal."""
    digest = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
    spread = torch.tensor([digest, -digest], dtype=torch.int64, device=runtime.device)
    _all_reduce(spread, dist.ReduceOp.MAX, runtime)
    if int(spread[0]) != -int(spread[1]):
        raise RuntimeError(f"{what} differs between the ranks of this run")


@contextmanager
def failing_together(runtime: Runtime) -> Iterator[None]:
    """Makes every rank raise ConfigError if one of them does, so that none waits for the others for ever.

    The code inside may not call collectives.

    Raises:
        ConfigError: on the first rank that raised one inside; in a group of ranks it is a FirstToldError.
        ToldElsewhereError: on the other ranks.
    """
    error: ConfigError | None = None
    try:
        yield
    except ConfigError as raised:
        error = raised
    teller = min_over_ranks(runtime.world_size if error is None else runtime.rank, runtime)
    if teller == runtime.rank:
        if runtime.peers is not None and type(error) is ConfigError:
            raise FirstToldError(str(error)) from error
        raise error
    if teller < runtime.world_size:
        raise ToldElsewhereError(f"rank {teller} of this run tells why it cannot start")


def barrier(runtime: Runtime) -> None:
    if dist.is_initialized():
        with _naming_the_lost(runtime):
            dist.barrier()


def _all_reduce(values: torch.Tensor, operation: dist.ReduceOp, runtime: Runtime) -> None:
    if dist.is_initialized():
        with _naming_the_lost(runtime):
            dist.all_reduce(values, op=operation)
            if values.is_cuda:  # the call has only begun, and its errors must appear here
                torch.cuda.current_stream().synchronize()


def _naming_the_lost(runtime: Runtime) -> AbstractContextManager[None]:
    return nullcontext() if runtime.peers is None else runtime.peers.naming_the_lost()
