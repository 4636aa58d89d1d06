"""How many lanes `runtime.lanes: auto` takes: what the shard needs and the memory allows."""

from __future__ import annotations

import torch

from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.memory import available_host_memory
from fedpeft_dist.runtime.process import Runtime

MEMORY_SHARE = 0.7
"""Of the free memory; the rest is for temporaries, fragmentation and the aggregation."""
STATE_COPIES = 12
"""Float32 matrices [L, W] alive in a step: theta, grad, two moments, and AdamW's temporaries."""


def choose_lanes(needed: int, batch_size: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> int:
    """Between 1 and `needed` lanes, by what one lane's forward pass keeps for its backward pass, measured."""
    if needed == 1:
        return 1
    bytes_per_lane = measure_activations(batch_size, model, store, runtime) + STATE_COPIES * 4 * model.layout.width
    return max(1, min(needed, int(MEMORY_SHARE * _free_memory(runtime)) // bytes_per_lane))


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
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), runtime.autocast():
        logits = model.logits(images)
    del logits
    return sum(saved.values())


def _free_memory(runtime: Runtime) -> int:
    """In bytes, for this rank."""
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()  # what the measurement has left in PyTorch's own pool
        return torch.cuda.mem_get_info(runtime.device)[0]
    return available_host_memory() // runtime.launch.local_world_size
