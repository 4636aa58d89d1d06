"""Uniform noise with random labels, for measuring speed."""

import torch

from fedpeft_dist.config.schema import SyntheticConfig
from fedpeft_dist.data.datasets import Dataset, ImageSet
from fedpeft_dist.data.source import DataSource


class SyntheticSource(DataSource):
    config: SyntheticConfig

    def num_classes(self) -> int:
        return self.config.classes

    def load(self, seed: int) -> Dataset:
        config, generator = self.config, torch.Generator().manual_seed(seed)

        def random_set(size: int) -> ImageSet:
            shape = (size, config.channels, config.image_size, config.image_size)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            return ImageSet(images, torch.randint(0, config.classes, (size,), generator=generator))

        train, test = random_set(config.num_train), random_set(config.num_test)
        return Dataset(train, test, tuple(str(label) for label in range(config.classes)))
