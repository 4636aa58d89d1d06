"""The machine's largest measured speed of a matrix product, and the operations of a local step in plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def gemm_peak(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 1.0) -> dict[str, float]:
    """FLOP/s of a square product, by the best of the ways that PyTorch offers on the device."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    ways: dict[str, Callable[[], torch.Tensor]] = {"torch.mm": lambda: torch.mm(a, b)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    speeds = {name: 2 * size**3 / _best_seconds(way, device, seconds) for name, way in ways.items()}
    return {"flops": max(speeds.values()), **speeds}


def _best_seconds(way: Callable[[], torch.Tensor], device: torch.device, seconds: float) -> float:
    way()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device)
        started = time.perf_counter()
        way()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def step_flops(model: nn.Module, images: torch.Tensor) -> float:
    """Operations per image of forward and backward in plain PyTorch, for the parameters that require gradients."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images).float().logsumexp(-1).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / len(images)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
