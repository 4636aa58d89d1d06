"""The number of lanes for `runtime.lanes: auto`, and of slots for samples, as the memory allows.

On CUDA, PyTorch's allocator tells what local steps on two and on three lanes take. Each further lane takes as much as
the third one did. On the CPU a step of all lanes would take long, so the tensors of a few samples' pass are counted.

Shapes: L lanes, B batch, W columns of the parameter matrix.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.memory import (
    available_host_memory,
    forget_peak_memory,
    free_device_memory,
    peak_memory,
    used_memory,
)
from fedpeft_dist.runtime.process import Runtime

MEMORY_SHARE = 0.7
"""Share of the free memory for lanes. The rest is for fragmentation, the aggregation and the evaluation."""
FEW, MORE = 2, 3
"""Two numbers of lanes, or of rows, that tell what one more takes. A single lane may run other kernels."""
STEP_COPIES = 10
"""Float32 matrices [L, W] alive in a step beside theta and its gradient: two moments, and AdamW's temporaries."""
PRIVATE_STATE_BYTES = 4 * (2 + STEP_COPIES) + 8 * 8
"""Bytes for each element of [L, W] under sample-level privacy: these matrices, and 64-bit sums and noise."""


def choose_lanes(
    needed: int,
    batch_size: int,
    model: LaneModel,
    store: DeviceStore,
    runtime: Runtime,
    train_some: Callable[[int], None],
) -> int:
    """Between 1 and `needed` lanes.

    Args:
        train_some: makes a trainer of so many lanes and takes local steps on all of them.
    """
    if needed == 1:
        return 1
    if runtime.device.type == "cuda":
        peaks = []
        # Ranks that compute in step must all go on, or none.
        with suppress(*() if runtime.mesh is not None else (torch.OutOfMemoryError,)):
            for lanes in (FEW, MORE)[: needed - 1]:
                peaks.append(_peak(lambda lanes=lanes: train_some(lanes), model, runtime))
        if len(peaks) < MORE - 1:  # more lanes do not fit, or are not needed
            room = MEMORY_SHARE * _free_memory(model, runtime)
            return FEW if peaks and peaks[0] <= room else 1
        per_lane = max(1, peaks[1] - peaks[0])
        fixed = max(0, peaks[0] - FEW * per_lane)
    else:
        per_lane = measure_row(batch_size, model, store, runtime) + STEP_COPIES * 4 * model.layout.width
        fixed = 0
    room = int(MEMORY_SHARE * _free_memory(model, runtime)) - fixed
    return max(1, min(needed, room // per_lane))


def choose_slots(num_lanes: int, batch_size: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> int:
    """Between 1 and `num_lanes` batches of slots for samples that each have a gradient of their own.

    The lanes' own matrices come first; a slot takes its parameters, its gradient and one sample's pass, measured.
    """
    bytes_per_slot = measure_row(1, model, store, runtime)
    lanes_own = PRIVATE_STATE_BYTES * num_lanes * model.layout.width
    room = int(MEMORY_SHARE * _free_memory(model, runtime)) - lanes_own
    return max(1, min(num_lanes * batch_size, room // bytes_per_slot))


def choose_private_lanes(needed: int, model: LaneModel, runtime: Runtime) -> int:
    """Between 1 and `needed` lanes under sample-level privacy, whose matrices may take half of the room."""
    room = int(MEMORY_SHARE / 2 * _free_memory(model, runtime))
    return max(1, min(needed, room // (PRIVATE_STATE_BYTES * model.layout.width)))


def measure_row(batch_size: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> int:
    """Bytes that one more row of `batch_size` samples takes: its parameters, their gradient, and its pass."""
    if runtime.device.type == "cuda":
        few, more = (
            _peak(lambda rows=rows: _train_rows(rows, batch_size, model, store, runtime), model, runtime)
            for rows in (FEW, MORE)
        )
        return max(1, more - few)
    parameters = 2 * 4 * model.layout.width
    if batch_size <= 2 * FEW:
        return parameters + max(live_peaks(batch_size, model, store, runtime))
    few, more = (live_peaks(samples, model, store, runtime) for samples in (FEW, 2 * FEW))
    return parameters + max(a + (b - a) * (batch_size - FEW) // FEW for a, b in zip(few, more))


def live_peaks(samples: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> tuple[int, int]:
    """The most bytes of tensors at a time on the CPU: in one row's forward pass, and until its backward pass ends.

    The first figure grows with the samples. The second one does not while gradients take more than activations.
    """
    _bind_initial(1, model, runtime)
    with LiveTensors() as tensors:
        loss = _scores(1, samples, model, store, runtime).sum()
        forward = tensors.peak
        loss.backward()
    return forward, tensors.peak


def _train_rows(rows: int, samples: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> None:
    _bind_initial(rows, model, runtime)
    _scores(rows, samples, model, store, runtime).sum().backward()


def _bind_initial(rows: int, model: LaneModel, runtime: Runtime) -> None:
    """Lets the model compute with rows of its initial parameters."""
    parameters = LaneParameters(model.layout, rows, runtime.device, compute_dtype=runtime.compute_dtype)
    parameters.theta.copy_(model.layout.pad(model.initial_vector()))
    model.bind(parameters)


def _scores(rows: int, samples: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> torch.Tensor:
    """What a forward pass gives, with dropout: float32 [rows, samples, K]."""
    keys = torch.zeros(rows, samples, dtype=torch.int64, device=runtime.device)
    images, _ = store.batch(torch.zeros(rows, samples, dtype=torch.int64), keys)
    with runtime.autocast():
        return model.logits(model.prefix(images), keys).float()


def _peak(work: Callable[[], None], model: LaneModel, runtime: Runtime) -> int:
    """The most bytes of the GPU that some work holds."""
    _unbind(model)
    before = used_memory(runtime.device)
    forget_peak_memory(runtime.device)
    work()
    return peak_memory(runtime.device) - before


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of the tensors, real or fake, that operations make, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        known = {s._cdata for s in _storages((arguments, keywords))}
        for storage in _storages(output):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._end, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def _end(self, size: int) -> None:
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _unbind(model: LaneModel) -> None:
    """Lets go of the rows that the model computes with."""
    model.bind(LaneParameters(model.layout, 1, "meta"))
    gc.collect()


def _free_memory(model: LaneModel, runtime: Runtime) -> int:
    """The free memory of this rank, in bytes."""
    if runtime.device.type == "cuda":
        _unbind(model)
        return free_device_memory(runtime.device, runtime.launch.gpu_sharers)
    return available_host_memory() // runtime.launch.local_world_size
