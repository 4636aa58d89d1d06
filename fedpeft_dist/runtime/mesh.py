"""The ranks as a grid, clients x shard: a group of k ranks keeps one copy of the frozen weights together.

A group gathers a block's weights by collectives, so its ranks run the same blocks in the same order: in lockstep.
Before each pass they agree on whether to make one. A rank without work of its own then makes an empty pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import ShardingConfig
from fedpeft_dist.runtime.memory import return_large_blocks
from fedpeft_dist.runtime.peers import Peers

if TYPE_CHECKING:
    from fedpeft_dist.runtime.process import Runtime


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the grid."""

    config: ShardingConfig
    group: dist.ProcessGroup
    """The k ranks of this rank's group, for weights."""
    host_group: dist.ProcessGroup
    """The same ranks, for what they agree on: the GPU does not wait for it."""
    num_groups: int
    group_number: int
    place: int
    """Of this rank in its group."""
    peers: Peers | None

    @property
    def size(self) -> int:
        """k."""
        return self.config.size

    @property
    def is_shared(self) -> bool:
        """Whether the ranks of a group train the same clients."""
        return self.config.lanes == "shared" and self.size > 1

    def agree(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank of the group."""
        values = torch.tensor(flags, dtype=torch.uint8)
        with self.naming_the_lost():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group)
        return [flag > 0 for flag in values.tolist()]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor over the ranks of the group, in place; all of them get the same bits."""
        with self.naming_the_lost():
            dist.all_reduce(values, group=self.group)
        return values

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Raises PeerLostError if a collective inside failed because a rank was lost."""
        if self.peers is None:
            yield
            return
        with self.peers.naming_the_lost():
            yield


@contextmanager
def spread(runtime: "Runtime", config: ShardingConfig) -> Iterator["Runtime"]:
    """The runtime with its mesh, if sharding is asked for. Every rank must call it.

    Raises:
        ConfigError: the ranks do not make whole groups, or DeepSpeed is missing.
    """
    if not config.is_on:
        yield runtime
        return
    if runtime.world_size % config.size:
        raise ConfigError(
            f"runtime.sharding.size: {config.size} does not divide the run's {runtime.world_size} rank(s) into whole "
            f"groups; start a multiple of {config.size} ranks, by torchrun or srun, or give another size"
        )
    from fedpeft_dist.runtime.sharding import check_library

    check_library(config, runtime.device)
    return_large_blocks()
    is_alone = not dist.is_initialized()  # a process that no launcher started
    if is_alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield replace(runtime, mesh=_make_mesh(runtime, config))
    finally:
        if is_alone:
            dist.destroy_process_group()


def _make_mesh(runtime: "Runtime", config: ShardingConfig) -> Mesh:
    k, num_groups = config.size, runtime.world_size // config.size
    grid = init_device_mesh(runtime.device.type, (num_groups, k), mesh_dim_names=("clients", "shard"))
    group_number, place = divmod(runtime.rank, k)
    host_group = group = grid.get_group("shard")
    if runtime.device.type == "cuda":
        ranks = torch.arange(runtime.world_size).view(num_groups, k).tolist()
        host_group = [dist.new_group(own, backend="gloo") for own in ranks][group_number]
    return Mesh(config, group, host_group, num_groups, group_number, place, runtime.peers)
