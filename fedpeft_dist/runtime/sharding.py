"""Frozen weights in parts: each rank of a group keeps 1/k of every large matrix, and gathers a block when it is needed.

DeepSpeed's ZeRO-3 (Rajbhandari et al. 2019, arXiv 1910.02054) partitions, gathers and offloads the matrices. When they
are gathered is decided here. DeepSpeed's own hooks compare the order of layers over all ranks, so that groups with
unequal work would wait for each other. Its own `linear`, which keeps no weight alive, rounds otherwise than PyTorch's.

At most two blocks are whole at a time: the one that computes, and the next one, which is on its way. A backward pass
must not keep a weight alive, so a saved weight is kept as its name and place, and is gathered again.
"""

import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import ShardingConfig
from fedpeft_dist.runtime.mesh import Mesh

OLDEST = (0, 19, 6)
"""DeepSpeed's first version with all fixes for frozen parameters."""
EXTRA = "pip install 'fedpeft_dist[sharding]'"


class ShardedBlocks:
    """The large frozen tensors of a model's blocks, in parts.

    Args:
        blocks: the tensors of each block, in the order of the forward pass; they may still be on the meta device.
        mesh: the ranks that share them.
        device: where they are computed with.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Parameter]], mesh: Mesh, device: torch.device):
        self.blocks = [list(tensors) for tensors in blocks if tensors]
        self.mesh, self.device = mesh, device
        self.arriving: dict[int, Any] = {}
        """DeepSpeed's handles of the blocks that are on their way, by number."""
        self.whole: set[int] = set()
        """The numbers of the blocks that are whole, or on their way."""
        self.numbers = {id(tensor): number for number, own in enumerate(self.blocks) for tensor in own}
        """The block of each tensor, by the tensor's id."""
        self.current: tuple[int, int] | None = None
        """The block that computes, and the one after it."""
        self.first_saved = 0
        """The first block that the next backward pass will ask for."""

    def partition(self, number: int) -> None:
        """Keeps this rank's part of a block whose tensors are whole. Every rank must call it, block after block."""
        with self.mesh.naming_the_lost():
            if number:
                self.blocks[0][0].convert_to_zero_parameters(param_list=self.blocks[number])
            else:
                _begin(self.blocks, self.mesh, self.device, self._make_folder())

    def _make_folder(self) -> str | None:
        """A folder for this rank's parts in files, if they are to be there. It goes with the process."""
        if self.mesh.config.offload != "nvme":
            return None
        folder = tempfile.mkdtemp(prefix="fedpeft-", dir=self.mesh.config.nvme_path)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @property
    def own_bytes(self) -> int:
        """Bytes of this rank's parts."""
        return sum(tensor.ds_tensor.ds_numel * tensor.element_size() for own in self.blocks for tensor in own)

    @property
    def all_bytes(self) -> int:
        """Bytes of all ranks' parts."""
        return sum(tensor.ds_numel * tensor.element_size() for own in self.blocks for tensor in own)

    def watch(self, blocks: Iterable[nn.Module]) -> None:
        """Has each of a model's blocks gather its tensors before it computes; several models may share tensors."""
        for block in blocks:
            own = {self.numbers[id(tensor)] for tensor in block.parameters() if id(tensor) in self.numbers}
            assert len(own) <= 1, "the blocks of two models differ"
            for number in own:
                self._watch(block, number)

    def _watch(self, block: nn.Module, number: int) -> None:
        contexts: list[saved_tensors_hooks] = []

        def enter(module: nn.Module, inputs: object) -> None:
            if number == 0:
                self.first_saved = len(self.blocks)
            self._use(number, number + 1)
            contexts.append(saved_tensors_hooks(self._pack, self._unpack))
            contexts[-1].__enter__()

        def leave(module: nn.Module, inputs: object, output: object) -> None:
            if contexts:
                contexts.pop().__exit__(None, None, None)

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)

    def _pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps of a tensor: of a gathered one, or of a view of it, its name and its place in it."""
        for own in self.blocks[self.current[0]]:
            offset = tensor.data_ptr() - own.data_ptr()
            if 0 <= offset < own.nbytes:
                self.first_saved = min(self.first_saved, self.numbers[id(own)])
                return own, tensor.size(), tensor.stride(), offset // own.element_size()
        return tensor.detach()  # the tensor itself may be the output of what saves it, and would live for ever

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        own, size, stride, offset = packed
        number = self.numbers[id(own)]
        self._use(number, number - 1 if number > self.first_saved else number)
        # Parts that come from files lie in one buffer, and not always at the same place.
        return own.data.as_strided(size, stride, own.data.storage_offset() + offset)

    def _use(self, number: int, upcoming: int) -> None:
        """Makes a block whole, begins to gather the one after it, and lets go of all others."""
        if self.current == (number, upcoming):
            return
        with self.mesh.naming_the_lost():
            self._gather(number)
            self._wait(number)
            for other in self.whole - {number, upcoming}:
                self._wait(other)
                for tensor in self.blocks[other]:
                    tensor.partition()
                self.whole.discard(other)
            if upcoming < len(self.blocks):
                self._gather(upcoming)
        self.current = number, upcoming

    def _gather(self, number: int) -> None:
        if number not in self.whole:
            self.whole.add(number)
            self.arriving[number] = self.blocks[number][0].all_gather_coalesced(self.blocks[number])

    def _wait(self, number: int) -> None:
        if (handle := self.arriving.pop(number, None)) is not None:
            handle.wait()


def check_library(config: ShardingConfig, device: torch.device) -> None:
    """
    Raises:
        ConfigError: DeepSpeed is missing or too old, or cannot do what the config asks for.
    """
    key = f"runtime.sharding.{f'size: {config.size}' if config.size > 1 else f'offload: {config.offload}'}"
    needed = ".".join(map(str, OLDEST))
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(f"{key} needs deepspeed >= {needed}, which is not installed; run {EXTRA}") from None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < OLDEST:
        raise ConfigError(f"{key} needs deepspeed >= {needed}, found {found}; run {EXTRA}")
    if config.offload == "nvme":
        _check_folder(config.nvme_path)
        with _environment({"DS_ACCELERATOR": device.type}):
            from deepspeed.ops.op_builder import AsyncIOBuilder

            has_libaio = AsyncIOBuilder().is_compatible(verbose=False)
        if not has_libaio:
            raise ConfigError(
                "runtime.sharding.offload: 'nvme' needs libaio with its headers (Debian: libaio-dev), not found here; "
                "install it, or give cpu"
            )


def _check_folder(path: str) -> None:
    """
    Raises:
        ConfigError: no file can be made there.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"runtime.sharding.nvme_path: '{path}' cannot be written ({reason}); give another folder"
        ) from None


def _begin(blocks: Sequence[Sequence[nn.Parameter]], mesh: Mesh, device: torch.device, folder: str | None) -> None:
    """Partitions the tensors of the first block. Each of them then knows how to take further ones.

    Args:
        folder: for parts in files.
    """
    variables = {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(device.index or 0)}
    with _environment(variables), redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed import comm
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
        # It is compiled at the first use, takes a compiler and a minute, and serves a collective that is not used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not comm.is_initialized():
            comm.init_distributed(dist_init_required=False)
        settings, swapper = (None, None) if folder is None else _make_swapper(blocks, mesh.size, folder)
        deepspeed.zero.Init(
            module=nn.ParameterList(blocks[0]),
            data_parallel_group=mesh.group,
            mem_efficient_linear=False,
            remote_device=None if mesh.config.offload == "none" else mesh.config.offload,
            pin_memory=device.type == "cuda",
            config_dict_or_path=settings,
            param_swapper=swapper,
            dtype=blocks[0][0].dtype,
        )


def _make_swapper(blocks: Sequence[Sequence[nn.Parameter]], size: int, folder: str) -> tuple[dict[str, Any], Any]:
    """DeepSpeed's settings for parts in files, and what reads and writes them; two blocks are in memory at a time.

    Raises:
        ConfigError: the weights differ in type.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    dtypes = {tensor.dtype for own in blocks for tensor in own}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        advice = "give cpu" if torch.int8 in dtypes else "give cpu, or runtime.precision: fp32"
        raise ConfigError(
            f"runtime.sharding.offload: 'nvme' needs weights of one type, and this backbone's are {names}; {advice}"
        )
    offload = {
        "device": "nvme",
        "nvme_path": folder,
        "buffer_count": 3 * max(map(len, blocks)),
        "buffer_size": max(-(-tensor.numel() // size) for own in blocks for tensor in own),
    }
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "offload_param": offload}}
    return settings, AsyncPartitionedParameterSwapper(DeepSpeedConfig(settings), blocks[0][0].dtype)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for a while; DeepSpeed takes its device from there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
