"""Accuracy of the global model, sharded over ranks and reduced exactly.

Batches have fixed boundaries and are padded to one size, whatever the number of ranks: every sample is computed in the
same batch in every run.

Shapes: S samples evaluated, B batch, P trainable parameters.
"""

from collections.abc import Callable
from itertools import pairwise, zip_longest

import numpy as np
import torch

from fedpeft_dist.data.feature_store import FeatureStore
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.collectives import sum_over_ranks
from fedpeft_dist.runtime.interrupts import StoppedEarlyError
from fedpeft_dist.runtime.process import Runtime


class Evaluator:
    """Evaluates one vector after another on chosen samples of a store.

    Args:
        model, store: the whole model and images, or its suffix and features.
        samples: int64 [S], which of the store's samples to evaluate on.
        batch_size: B, a part of the result: another one may round differently.
    """

    def __init__(
        self,
        model: LaneModel,
        store: DeviceStore | FeatureStore,
        samples: torch.Tensor,
        batch_size: int,
        runtime: Runtime,
    ):
        self.model, self.store, self.runtime = model, store, runtime
        self.samples, self.batch_size = samples, batch_size
        self.parameters = LaneParameters(
            model.layout, 1, runtime.device, with_grad=False, compute_dtype=runtime.compute_dtype
        )

    @property
    def num_padded(self) -> int:
        """Batches that this rank computes for nothing, to stay in step with its group."""
        if self.runtime.mesh is None:
            return 0
        total, world = -(-len(self.samples) // self.batch_size), self.runtime.world_size
        return -(-total // world) - len(own_batches(len(self.samples), self.batch_size, self.runtime))

    @property
    def all_padded(self) -> int:
        """The same over all ranks."""
        total = -(-len(self.samples) // self.batch_size)
        return 0 if self.runtime.mesh is None else -total % self.runtime.world_size

    def correct(self, vector: torch.Tensor, is_dropped: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """Whether the model with this vector [P] is right on each sample: int64 [S] of 0 and 1, on the CPU.

        Args:
            is_dropped: asked ahead of each batch, whether to break off.

        Raises:
            StoppedEarlyError: on every rank, where any of them has broken off.
        """
        self.parameters.load(0, self.model.layout.pad(vector))
        self.model.bind(self.parameters)
        correct = torch.zeros(len(self.samples) + 1, dtype=torch.int64, device=self.runtime.device)
        own: list[int | None] = list(own_batches(len(self.samples), self.batch_size, self.runtime))
        own += [None] * self.num_padded
        for start, upcoming in zip_longest(own, own[1:]):
            if self.runtime.agree(is_dropped()):
                correct[-1] = 1
                break
            right = self._batch(start or 0, upcoming)
            if start is not None:
                correct[start : start + len(right)] = right
        correct = sum_over_ranks(correct, self.runtime).cpu()
        if correct[-1]:
            raise StoppedEarlyError
        return correct[:-1]

    @torch.no_grad()
    def _batch(self, start: int, upcoming: int | None = None) -> torch.Tensor:
        """Whether the model is right on the samples of the batch that starts there: int64, at most [B].

        Args:
            upcoming: where the batch after this one starts.
        """
        inputs, labels = self.store.batch(self._indices(start))
        if upcoming is not None:
            self.store.prefetch(self._indices(upcoming))
        with self.runtime.autocast():
            predictions = self.model.logits(inputs).argmax(dim=-1)
        return (predictions == labels)[0, : len(self.samples) - start].long()

    def _indices(self, start: int) -> torch.Tensor:
        """The samples of the batch that starts there, padded: int64 [1, B]."""
        own = self.samples[start : start + self.batch_size]
        padded = torch.zeros(1, self.batch_size, dtype=torch.int64)
        padded[0, : len(own)] = own
        return padded

    def accuracy(self, vector: torch.Tensor, is_dropped: Callable[[], bool] = lambda: False) -> float:
        """Top-1 accuracy in 0 .. 1; the rest is as in `correct`."""
        return float(self.correct(vector, is_dropped).sum()) / len(self.samples)


def own_batches(num_samples: int, batch_size: int, runtime: Runtime) -> range:
    """Where the batches begin that this rank evaluates."""
    return range(0, num_samples, batch_size)[runtime.rank :: runtime.world_size]


def client_accuracies(correct: torch.Tensor, offsets: np.ndarray) -> dict[str, float]:
    """Mean and 10th percentile of the clients' own accuracies, over the clients that have samples held out.

    Args:
        correct: int64 [S], all clients' held-out samples, one client after another.
        offsets: int64 [N + 1], where each client's begin.
    """
    accuracies = [float(correct[a:b].double().mean()) for a, b in pairwise(offsets) if b > a]
    return {
        "client_accuracy_mean": float(np.mean(accuracies)),
        "client_accuracy_p10": float(np.percentile(accuracies, 10)),
    }
