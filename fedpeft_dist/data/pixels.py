"""The uint8 images of a split, by sample number, on the device: kept there, or brought there batch by batch.

On the CPU they stay where they are, as a rule in a memory map, and rows are copied out of it. On a GPU they are moved
there once where they fit; else a background thread gathers the next batch on the host while this one computes.

Shapes: S samples, R rows of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from fedpeft_dist.data.datasets import ImageSet

UPLOAD_ROWS = 4096
DEVICE_SHARE = 0.5
"""Of the device's free memory, for all splits together; the rest is for the clients' training."""


class Pixels(Protocol):
    """Where a store's images come from."""

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        """uint8 [R, C, H, W] on the device, of these samples: int64 [R] on the host."""

    def prefetch(self, indices: torch.Tensor) -> None:
        """Announces the samples that `gather` will be asked for next."""


class ResidentPixels:
    """Images that the device reads by itself: in its own memory or, on the CPU, wherever they are."""

    def __init__(self, images: ImageSet, device: torch.device):
        self.device = device
        self.images, self.rows = images.images, images.rows
        if device.type != "cpu":
            self.images, self.rows = upload(images, device), None

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        indices = indices if self.rows is None else self.rows[indices]
        return self.images.index_select(0, send(indices, self.device))

    def prefetch(self, indices: torch.Tensor) -> None:
        """Nothing to do."""


class StreamedPixels:
    """Images that stay on the host; a batch is gathered into a page-locked buffer and copied from there.

    Two buffers take turns, so that one is filled while the other is still being copied.
    """

    def __init__(self, images: ImageSet, device: torch.device):
        self.images, self.rows, self.device = images.images, images.rows, device
        self.on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_cuda else None
        self.buffers: list[torch.Tensor | None] = [None, None]
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.pending: tuple[torch.Tensor, Future[tuple[torch.Tensor, torch.cuda.Event | None]]] | None = None

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        pending, self.pending = self.pending, None
        if pending is None or not torch.equal(pending[0], indices):
            pending = indices, self.worker.submit(self._bring, indices)  # in turn behind one that nobody wants
        pixels, ready = pending[1].result()
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            pixels.record_stream(current)  # it was allocated for the other stream, which must not reuse it too early
        return pixels

    def prefetch(self, indices: torch.Tensor) -> None:
        self.pending = indices, self.worker.submit(self._bring, indices)

    def _bring(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Runs in the background thread. The images on the device, and the event after which they are there."""
        if not self.on_cuda:
            return self._fill_buffer(indices).clone(), None
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            buffer, ready = self._fill_buffer(indices), torch.cuda.Event()
            pixels = torch.empty_like(buffer, device=self.device).copy_(buffer, non_blocking=True)
            ready.record(self.stream)
            self.copied[self.turn] = ready
        return pixels, ready

    def _fill_buffer(self, indices: torch.Tensor) -> torch.Tensor:
        """These samples in the buffer whose turn it is: uint8 [R, C, H, W] on the host."""
        self.turn = 1 - self.turn
        buffer = self._free_buffer(len(indices))
        rows = indices if self.rows is None else self.rows[indices]
        return torch.index_select(self.images, 0, rows, out=buffer)

    def _free_buffer(self, num_rows: int) -> torch.Tensor:
        """uint8 [R, C, H, W] on the host, which no copy reads any more."""
        copied, buffer = self.copied[self.turn], self.buffers[self.turn]
        if copied is not None:
            copied.synchronize()
        if buffer is None or len(buffer) < num_rows:
            shape = (num_rows, *self.images.shape[1:])
            buffer = self.buffers[self.turn] = torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_cuda)
        return buffer[:num_rows]


def choose_resident(splits: list[ImageSet], device: torch.device) -> list[bool]:
    """Which splits are kept on the device: the first ones that fit into DEVICE_SHARE of its free memory together."""
    if device.type == "cpu":
        return [True] * len(splits)
    torch.cuda.empty_cache()  # what earlier runs of this process have left in PyTorch's own pool
    budget, chosen = DEVICE_SHARE * torch.cuda.mem_get_info(device)[0], []
    for split in splits:
        size = len(split) * split.images[0].nbytes
        chosen.append(size <= budget)
        budget -= size if size <= budget else 0
    return chosen


def upload(images: ImageSet, device: torch.device) -> torch.Tensor:
    """All samples on the device, uint8 [S, C, H, W]; a piece at a time, so that the host need not hold them."""
    there = torch.empty((len(images), *images.images.shape[1:]), dtype=torch.uint8, device=device)
    for start in range(0, len(images), UPLOAD_ROWS):
        piece = slice(start, start + UPLOAD_ROWS)
        there[piece] = (images.images[piece] if images.rows is None else images.images[images.rows[piece]]).to(device)
    return there


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, without making the host wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
