"""Makes a model without its large tensors: what would be written into them is noted, and written one by one later.

No process ever holds the whole model. A tensor that is made later has the bits that it would have had at once, because
random operations leave the generator where the real ones would.
"""

import ctypes
import mmap
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_EMPTY = torch.ops.aten.empty.memory_format
_OVERWRITING = ("uniform_", "normal_", "copy_", "fill_", "zero_")
"""In-place operations whose result does not depend on what was there."""


@dataclass
class Note:
    """One operation on a tensor, or on a view of it."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    place: tuple[torch.Size, tuple[int, ...], int]
    """Size, strides and offset of the view."""
    generator: torch.Tensor | None
    """The state of the random generator before a random operation."""


@dataclass
class Deferred:
    """A tensor that is made later."""

    outline: torch.Tensor
    """On the meta device. It keeps the memory's id from being given to another tensor."""
    notes: list[Note] = field(default_factory=list)

    def make(self) -> torch.Tensor:
        """The tensor, on the CPU. The global generator is as before."""
        made = torch.empty_like(self.outline, device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for note in self.notes:
                if note.generator is not None:
                    torch.default_generator.set_state(note.generator)
                note.function(made.as_strided(*note.place), *note.arguments, **note.keywords)
        for leaf in tree_leaves([note.arguments for note in self.notes]):
            if isinstance(leaf, torch.Tensor):
                _forget_pages(leaf)
        return made


class DeferringMode(TorchDispatchMode):
    """While it lasts, new empty matrices have no memory. `settle` ends that for those that are needed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.deferred: dict[int, Deferred] = {}
        """By the id of the tensor's memory."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        is_float = (keywords.get("dtype") or torch.get_default_dtype()).is_floating_point
        on_cpu = torch.device(keywords.get("device") or "cpu").type == "cpu"
        if function is _EMPTY and len(arguments[0]) >= 2 and is_float and on_cpu:
            outline = function(*arguments, **{**keywords, "device": torch.device("meta")})
            self.deferred[_memory(outline)] = Deferred(outline)
            return outline
        target = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        own = None if target is None else self.deferred.get(_memory(target))
        name = function._schema.name.rpartition("::")[2]
        if own is None or not function._schema.is_mutable or not name.endswith("_"):
            return function(*arguments, **keywords)
        self._note(own, function, name, arguments, keywords)
        return target

    def _note(self, own: Deferred, function: Any, name: str, arguments: tuple[Any, ...], keywords: dict) -> None:
        target, *others = arguments
        place = (target.size(), target.stride(), target.storage_offset())
        if name in _OVERWRITING and target.numel() == own.outline.numel():
            own.notes.clear()
        is_random, state = torch.Tag.nondeterministic_seeded in function.tags, None
        if is_random:
            state = torch.default_generator.get_state()
            function(torch.empty_like(target, device="cpu"), *others, **keywords)
        own.notes.append(Note(function, tuple(others), keywords, place, state))

    def find(self, tensor: torch.Tensor) -> Deferred | None:
        return self.deferred.get(_memory(tensor)) if tensor.is_meta else None

    def settle(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Makes all tensors outside the model's blocks. Those inside get an attribute `deferred`."""
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            own = self.find(tensor)
            if own is not None and id(tensor) in inside:
                tensor.deferred = own
            elif own is not None:
                replace(tensor, own.make())


@contextmanager
def deferring() -> Iterator[DeferringMode]:
    """The mode, without PyTorch's warnings that a deferred tensor is not filled."""
    with warnings.catch_warnings(), DeferringMode() as mode:
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)
        yield mode


def replace(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Gives a tensor of a model, which may be deferred, the value. It stays the same object."""
    wrapped = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    torch.utils.swap_tensors(tensor, wrapped)


def made(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself or, for one that is deferred, what it would be, in its present type."""
    own = getattr(tensor, "deferred", None)
    return tensor if own is None else own.make().to(tensor.dtype)


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where the tensor is or, for one that is deferred, where it will be made."""
    return torch.device("cpu") if hasattr(tensor, "deferred") else tensor.device


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _forget_pages(tensor: torch.Tensor) -> None:
    """Lets the kernel take back the pages of a tensor in a mapped file. It reads them again when they are used."""
    if not getattr(tensor, "is_mapped", False):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
