"""Serves a split's features: what the frozen prefix of a model gives for each sample, computed once and kept.

A FeatureStore stands in for the DeviceStore of the images. Features are computed when a batch first asks for them, in
chunks with as many rows as a batch. A sample's features therefore have the bits that the model would compute within any
batch, whichever samples are beside it, and whatever was computed before.

Shapes: S samples, L lanes, B batch, R = L * B rows of a batch.
"""

from collections.abc import Callable, Sequence

import torch

from fedpeft_dist.data.store import DeviceStore, StreamedRows, send


class FeatureStore:
    """Batches of features.

    Args:
        store: the images.
        prefix: from normalised images [L, B, C, H, W] to features [L, B, ...], as a step of the model computes them.
        rows: memory for the features, on the device or on the host: [n, ...], where n is the number of samples that
            are ever asked for, and one more.
    """

    def __init__(self, store: DeviceStore, prefix: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor):
        self.store, self.prefix, self.images = store, prefix, rows
        self.row_of = torch.full((len(store),), -1)
        """int64 [S]: the row of each sample; -1 before its features are computed."""
        self.num_known = 0
        self.expected = torch.empty(0, dtype=torch.int64)
        self.streamed = StreamedRows(self, store.device) if rows.device != store.device else None

    def __len__(self) -> int:
        return len(self.store)

    def forget(self) -> None:
        """Drops all features."""
        self.row_of.fill_(-1)
        self.num_known = 0

    def expect(self, samples: Sequence[torch.Tensor]) -> None:
        """Announces the samples of a round, int64 [n] each. They fill up chunks that a batch would leave part empty."""
        together = torch.cat([torch.empty(0, dtype=torch.int64), *samples])
        self.expected = together[self.row_of[together] < 0].unique()

    def prefetch(self, indices: torch.Tensor) -> None:
        """Announces the indices, int64 [L, B] on the host, of the next call of `batch`."""
        if self.streamed is not None:
            self._compute(indices)
            self.streamed.prefetch(indices.flatten())

    def batch(self, indices: torch.Tensor, keys: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [L, B, ...] and labels, int64 [L, B], on the device; indices int64 [L, B], on the host.

        The keys are those of a DeviceStore's `batch`. Nothing is augmented here.
        """
        self._compute(indices)
        flat = indices.flatten()
        if self.streamed is not None:
            features = self.streamed.gather(flat)
        else:
            features = self.images.index_select(0, send(self.places(flat), self.store.device))
        return features.view(*indices.shape, *features.shape[1:]), self.store.labels[send(indices, self.store.device)]

    def places(self, samples: torch.Tensor) -> torch.Tensor:
        """The rows of samples whose features are known: int64 [n] for int64 [n]."""
        return self.row_of[samples]

    def _compute(self, indices: torch.Tensor) -> None:
        """Computes what is missing of a batch, with as many other expected samples as the chunk has room for."""
        flat = indices.flatten()
        if self.num_known == len(self.store) or (self.row_of[flat] >= 0).all():
            return
        chunk = self._reserve(flat[self.row_of[flat] < 0].unique())
        self.expected = self.expected[self.row_of[self.expected] < 0]
        chunk = torch.cat([chunk, self._reserve(self.expected[: len(flat) - len(chunk)])])
        padded = torch.zeros_like(flat)
        padded[: len(chunk)] = chunk
        try:
            images, _ = self.store.batch(padded.unsqueeze(0))
            features = self.prefix(images)[0, : len(chunk)]
        except BaseException:  # a row that is reserved and not filled must not be served
            self.row_of[chunk] = -1
            self.num_known -= len(chunk)
            raise
        self.images[self.num_known - len(chunk) : self.num_known].copy_(features)

    def _reserve(self, samples: torch.Tensor) -> torch.Tensor:
        """Gives new samples, int64 [n], the next rows."""
        self.row_of[samples] = torch.arange(self.num_known, self.num_known + len(samples))
        self.num_known += len(samples)
        return samples
