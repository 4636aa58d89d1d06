"""The number of lanes for `runtime.lanes: auto`, and of slots for samples, as the memory allows."""

import torch

from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.memory import available_host_memory
from fedpeft_dist.runtime.process import Runtime

MEMORY_SHARE = 0.7
"""Share of the free memory for lanes. The rest is for temporaries, fragmentation and the aggregation."""
STATE_COPIES = 12
"""Float32 matrices [L, W] alive in a step: theta, grad, two moments, and AdamW's temporaries."""
PRIVATE_STATE_BYTES = 4 * STATE_COPIES + 8 * 8
"""Bytes for each element of [L, W] under sample-level privacy: these matrices, and 64-bit sums and noise."""


def choose_lanes(needed: int, batch_size: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> int:
    """Between 1 and `needed` lanes, by what one lane's forward pass keeps for its backward pass, measured."""
    if needed == 1:
        return 1
    bytes_per_lane = measure_activations(batch_size, model, store, runtime) + STATE_COPIES * 4 * model.layout.width
    return max(1, min(needed, int(MEMORY_SHARE * _free_memory(runtime)) // bytes_per_lane))


def choose_slots(num_lanes: int, batch_size: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> int:
    """Between 1 and `num_lanes` batches of slots for samples that each have a gradient of their own.

    The lanes' own matrices come first; a slot takes its parameters, its gradient and what one sample's forward pass
    keeps for its backward pass, measured.
    """
    width = model.layout.width
    room = int(MEMORY_SHARE * _free_memory(runtime)) - PRIVATE_STATE_BYTES * num_lanes * width
    bytes_per_slot = measure_activations(1, model, store, runtime) + 2 * 4 * width
    return max(1, min(num_lanes * batch_size, room // bytes_per_slot))


def choose_private_lanes(needed: int, model: LaneModel, runtime: Runtime) -> int:
    """Between 1 and `needed` lanes under sample-level privacy, whose matrices may take half of the room."""
    room = int(MEMORY_SHARE / 2 * _free_memory(runtime))
    return max(1, min(needed, room // (PRIVATE_STATE_BYTES * model.layout.width)))


def measure_activations(batch_size: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> int:
    """Bytes that autograd holds on to between the forward and the backward pass of one lane with a full batch."""
    parameters = LaneParameters(model.layout, 1, runtime.device)
    parameters.load(0, model.layout.pad(model.initial_vector().to(runtime.device)))
    model.bind(parameters)
    weights = {p.untyped_storage().data_ptr() for p in model.backbone.model.parameters()}
    saved: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, _ = store.batch(torch.zeros(1, batch_size, dtype=torch.int64))
    with runtime.autocast():
        inputs = model.prefix(images)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), runtime.autocast():
        logits = model.logits(inputs)
    del logits
    return sum(saved.values())


def _free_memory(runtime: Runtime) -> int:
    """The free memory of this rank, in bytes."""
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()  # what the measurement has left in PyTorch's own pool
        return torch.cuda.mem_get_info(runtime.device)[0]
    return available_host_memory() // runtime.launch.local_world_size
