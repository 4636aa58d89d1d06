"""Data sets, how they are split over clients, and how batches are made. DATASETS maps config classes to loaders."""

from __future__ import annotations

from fedpeft_dist.config import schema
from fedpeft_dist.data import datasets

DATASETS = {
    schema.Cifar100Config: datasets.no_loader,
    schema.Resisc45Config: datasets.no_loader,
    schema.PcamConfig: datasets.no_loader,
    schema.DigitsConfig: datasets.load_digits,
    schema.GlyphsConfig: datasets.load_glyphs,
    schema.SyntheticConfig: datasets.load_synthetic,
}

# Known without reading a file, for `fedpeft cost`.
_NUM_CLASSES = {schema.Cifar100Config: 100, schema.Resisc45Config: 45, schema.PcamConfig: 2, schema.DigitsConfig: 10}


def load_dataset(config: schema.DataConfig, seed: int) -> datasets.Dataset:
    """Reads or makes the data set of a config; `max_train` is applied here, before any partitioning.

    Raises:
        ConfigError: files that are missing or cannot be read; more training samples asked for than there are.
    """
    dataset = DATASETS[type(config)](config, seed)
    train = datasets.subsample(dataset.train, config.max_train, seed)
    return datasets.Dataset(train, dataset.test, dataset.class_names)


def count_classes(config: schema.DataConfig) -> int:
    """The number of classes, without loading the images where that is possible."""
    if isinstance(config, schema.SyntheticConfig):
        return config.classes
    if isinstance(config, schema.GlyphsConfig):
        from fedpeft_dist.data.glyphs import class_names

        return len(class_names(config.alphabet))
    return _NUM_CLASSES[type(config)]
