"""Decides whether a run keeps what its frozen prefix gives for each image, and where.

A run's result does not depend on it: features have the same bits as in a step that computes them anew.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import torch

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.feature_memory import allocate
from fedpeft_dist.data.feature_store import FeatureStore
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.methods.cut import NoCutError, SuffixModel, cut_model
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.process import Runtime


@dataclass(frozen=True)
class Feed:
    """A model, and the store of what it takes: all of it and images, or its suffix and features."""

    model: LaneModel
    store: DeviceStore | FeatureStore


class PrefixCache:
    """
    Args:
        model: on the run's device, frozen in the run's precision.
    """

    def __init__(self, config: RunConfig, model: LaneModel, runtime: Runtime):
        self.config, self.model, self.runtime = config, model, runtime
        self.notes: list[str] = []
        """Why the cache cannot serve, a line each."""
        self.budget = config.runtime.cache if isinstance(config.runtime.cache, int) else None
        """Bytes; None leaves it to the machine."""
        self.taken = 0
        """Bytes of all features."""
        self.suffix = None if config.runtime.cache == "none" else self._cut()

    def feed(self, store: DeviceStore, num_samples: int, what: str, augment: str = "none") -> Feed:
        """What trains on, or evaluates, the samples of a store.

        Args:
            num_samples: how many of them are ever asked for.
            what: their name in a note.
            augment: how images change from step to step.
        """
        if self.suffix is None:
            return Feed(self.model, store)
        if augment != "none":
            self._note(f"data.augment: {augment} changes {what} from step to step")
            return Feed(self.model, store)
        features = self._prefix(store.batch(torch.zeros(1, 1, dtype=torch.int64))[0])[0]
        shape = (num_samples + 1, *features.shape[1:])  # one more, which fills gaps in batches
        size, rows, room = shape[0] * features[0].nbytes, None, "neither memory nor disk has room"
        if self.budget is None or self.taken + size <= self.budget:
            rows = allocate(shape, features.dtype, self.runtime, self._folder, self.taken)
        else:
            room = f"runtime.cache has {self.budget - self.taken:,} left"
        if rows is None:
            self._note(f"the features of {what} take {size:,} bytes, and {room}")
            return Feed(self.model, store)
        self.taken += size
        return Feed(self.suffix, FeatureStore(store, self._prefix, rows))

    def _cut(self) -> SuffixModel | None:
        if self.runtime.mesh is not None:
            self._note("under runtime.sharding, ranks compute in step")
            return None
        try:
            return cut_model(self.model, self.runtime)
        except NoCutError as error:
            if str(error) or self.budget is not None:
                self._note(str(error) or "the method trains from the first block on")
            return None

    def _prefix(self, images: torch.Tensor) -> torch.Tensor:
        with self.runtime.autocast():
            return self.suffix.prefix(images)

    @property
    def _folder(self) -> Path:
        own = Path(self.config.output.root) / (self.config.output.name or "")
        return own if own.is_dir() else Path(gettempdir())

    def _note(self, reason: str) -> None:
        self.notes.append(f"the frozen layers are computed at every step: {reason}")
