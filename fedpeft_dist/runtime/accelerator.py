"""What a run asks of CUDA, cuDNN and NCCL before their first use, and which errors are theirs."""

import os
import re
import socket

import torch
import torch.distributed as dist

_FAULTS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError), dist.DistError)
_FAULT_TEXT = re.compile(
    r"\b(CUDA|cuDNN|CUBLAS|NCCL|driver)\b.*\berror\b|\b(CUDNN|CUBLAS|NCCL)_|unable to find an engine"
)


def is_device_fault(error: BaseException) -> bool:
    """Whether an error is the machine's: of CUDA, cuDNN, cuBLAS, NCCL or the memory. Such a run may be tried again."""
    return isinstance(error, _FAULTS) or (
        isinstance(error, RuntimeError) and _FAULT_TEXT.search(str(error)) is not None and not _is_refusal(error)
    )


def _is_refusal(error: BaseException) -> bool:
    """Whether PyTorch refuses an operation that has no deterministic kernel, whose text names CUDA, too."""
    return "deterministic" in str(error)


def prepare_cuda(device: torch.device) -> None:
    """Chooses the device, and kernels that are the same on every rank and in every process."""
    torch.cuda.set_device(device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # fp32 is float32, in convolutions too: TF32 keeps ten bits of the mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Recent versions compile some operations of eager mode by Triton, such as products of inner dimension 1. A node
    # without a C compiler would fail at the first one.
    if (native := getattr(torch.backends, "python_native", None)) is not None:
        for name in native.available_dsls:
            getattr(native, name).disable()


def give_peers_time(seconds: float) -> None:
    """Has PyTorch's threads wait so long with ending this process, once NCCL has noticed that another rank is lost.

    Otherwise they would abort it after a minute, before a large group's Peers know which rank it was. PyTorch reads
    these variables when a group is formed.
    """
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(max(60_000, round(1000 * seconds))))
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(480, round(2 * seconds))))


def gpu_place(device: torch.device) -> str:
    """The host and the GPU of a rank, which no other rank of its group may have; empty on the CPU."""
    if device.type != "cuda":
        return ""
    return f"GPU {torch.cuda.get_device_properties(device).uuid} of host {socket.gethostname()}"
