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


def leave_failures_to_peers() -> None:
    """Keeps NCCL's own threads from ending the process when another rank is lost.

    They would abort it after a minute, before a large group's Peers know which rank it was. NCCL still ends collectives
    that have failed. PyTorch reads these variables when a group is formed.
    """
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # clean up, but do not tear the process down
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


def gpu_place(device: torch.device) -> str:
    """The host and the GPU of a rank, which no other rank of its group may have; empty on the CPU."""
    if device.type != "cuda":
        return ""
    return f"GPU {torch.cuda.get_device_properties(device).uuid} of host {socket.gethostname()}"
