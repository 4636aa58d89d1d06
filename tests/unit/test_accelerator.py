"""What a run asks of CUDA and NCCL, as far as that shows without a GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fedpeft_dist.config.errors import FirstToldError, ToldElsewhereError
from fedpeft_dist.runtime.accelerator import give_peers_time, gpu_place, is_device_fault, prepare_cuda
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.peers import LAST_SECONDS, SILENT_BEATS, Peers
from fedpeft_dist.runtime.process import _refuse_shared

FAULTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error"),
    dist.DistNetworkError("Connection reset by peer"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA driver error: invalid argument"),
]
MISTAKES = [
    RuntimeError("The size of tensor a (5) must match the size of tensor b (6) at non-singleton dimension 1"),
    RuntimeError(
        "upsample_bicubic2d_aa_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can file an issue; an error on CUDA only"
    ),
    ValueError("CUDA error: no such thing"),
]


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_a_fault_of_the_device_is_told_from_a_mistake(error):
    assert is_device_fault(error)


@pytest.mark.parametrize("error", MISTAKES, ids=lambda error: str(error)[:20])
def test_a_mistake_is_no_fault_of_the_device(error):
    assert not is_device_fault(error)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch):
    """Undoes what a test changes of PyTorch and the environment."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    native = getattr(torch.backends, "python_native", None)
    for name in [] if native is None else native.available_dsls:
        getattr(native, name).enable()


def test_fp32_is_float32_in_products_and_convolutions(settings):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    prepare_cuda(torch.device("cuda", 0))
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not hasattr(torch.backends, "python_native"), reason="this PyTorch compiles nothing in eager mode")
def test_nothing_is_compiled_in_eager_mode(settings):
    native = torch.backends.python_native
    prepare_cuda(torch.device("cuda", 0))
    assert not any(getattr(native, name).enabled for name in native.available_dsls)


@pytest.mark.parametrize("ranks", [2, 48, 64, 1024])
def test_nccl_waits_until_a_group_of_any_size_knows_which_rank_is_lost(ranks, settings):
    peers = Peers(dist.HashStore, Launch(world_size=ranks))
    give_peers_time(peers.longest_search)
    silent = SILENT_BEATS * peers.beat_seconds
    assert int(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000 >= max(60, silent + LAST_SECONDS)
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > silent


def test_the_users_own_settings_of_nccl_stay(settings, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "7")
    give_peers_time(100)
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "7"
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "480"


def test_the_place_of_a_rank_names_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"id-{device.index}"))
    assert gpu_place(torch.device("cpu")) == ""
    assert "id-1" in gpu_place(torch.device("cuda", 1))
    assert gpu_place(torch.device("cuda", 0)) != gpu_place(torch.device("cuda", 1))


def test_two_ranks_on_one_gpu_are_refused_by_every_rank_and_told_by_one():
    def refuse(rank: int, *gpus: str) -> None:
        _refuse_shared(tuple(gpus), Launch(rank=rank, world_size=3), store)

    store = dist.HashStore()
    refuse(0, "", "", "")
    refuse(0, "GPU a of host x", "GPU b of host x", "GPU a of host y")
    shared = ("GPU a of host x", "GPU b of host x", "GPU a of host x")
    for rank in (1, 2):
        with pytest.raises(ToldElsewhereError):
            refuse(rank, *shared)
    with pytest.raises(FirstToldError, match=r"ranks 0, 2 have the same GPU a of host x, .*srun --gpus-per-task=1"):
        refuse(0, *shared)
