"""The collectives a run needs. In a single process they do nothing."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import ConfigError, FirstToldError, ToldElsewhereError
from fedpeft_dist.runtime.process import Runtime


def sum_over_ranks(values: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Adds an int64 tensor over all ranks, in place. The order of the sum cannot matter, because these are integers."""
    assert values.dtype == torch.int64
    return _all_reduce(values, dist.ReduceOp.SUM, runtime)


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
    return min_over_ranks(-int(flag), runtime) < 0


def min_over_ranks(value: int, runtime: Runtime) -> int:
    """The smallest of the ranks' integers."""
    return int(_all_reduce(torch.tensor([value], device=runtime.device), dist.ReduceOp.MIN, runtime))


def barrier(runtime: Runtime) -> None:
    """Waits until every rank is here."""
    min_over_ranks(0, runtime)


def assert_same_on_all_ranks(data: bytes, what: str, runtime: Runtime) -> None:
    """Fails on every rank if the ranks hold different bytes. Replicated state is never sent, so it must be equal."""
    digest = int.from_bytes(hashlib.sha256(data).digest()[:7], "big")
    if min_over_ranks(digest, runtime) != -min_over_ranks(-digest, runtime):
        raise RuntimeError(f"{what} differs between the ranks of this run")


@contextmanager
def failing_together(runtime: Runtime) -> Iterator[None]:
    """Makes every rank raise ConfigError if one of them does, so that none waits for the others for ever.

    The code inside may not call collectives, unless all ranks fail there alike.

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


def _all_reduce(values: torch.Tensor, operation: dist.ReduceOp, runtime: Runtime) -> torch.Tensor:
    if runtime.peers is not None:
        with runtime.peers.naming_the_lost():
            dist.all_reduce(values, op=operation)
            if values.is_cuda:  # the call has only begun, and its errors must appear here
                torch.cuda.current_stream().synchronize()
    return values
