"""Data sets, how they are split over clients, and how batches are made.

DATASETS maps the config class of each data set to its source. No other list of data sets exists.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedpeft_dist.config import schema
from fedpeft_dist.data.cifar import Cifar10Source, Cifar100Source
from fedpeft_dist.data.datasets import Dataset
from fedpeft_dist.data.digits import DigitsSource
from fedpeft_dist.data.glyphs import GlyphsSource
from fedpeft_dist.data.glyphs100 import Glyphs100Source
from fedpeft_dist.data.huggingface import HuggingFaceSource
from fedpeft_dist.data.image_folder import ImageFolderSource
from fedpeft_dist.data.pcam import PcamSource
from fedpeft_dist.data.resisc45 import Resisc45Source
from fedpeft_dist.data.source import DataSource
from fedpeft_dist.data.synthetic import SyntheticSource

DATASETS: dict[type[schema.DataSection], type[DataSource]] = {
    schema.Cifar10Config: Cifar10Source,
    schema.Cifar100Config: Cifar100Source,
    schema.Resisc45Config: Resisc45Source,
    schema.PcamConfig: PcamSource,
    schema.ImageFolderConfig: ImageFolderSource,
    schema.HuggingFaceConfig: HuggingFaceSource,
    schema.DigitsConfig: DigitsSource,
    schema.GlyphsConfig: GlyphsSource,
    schema.Glyphs100Config: Glyphs100Source,
    schema.SyntheticConfig: SyntheticSource,
}


def make_source(config: schema.DataConfig) -> DataSource:
    """The data set that a config section names. Nothing is read yet."""
    return DATASETS[type(config)](config)


def load_dataset(config: schema.DataConfig, seed: int) -> Dataset:
    """Reads or makes a data set, and keeps `max_train` of its training samples.

    Raises:
        ConfigError: files are missing or cannot be read, or there are fewer training samples than `max_train`.
    """
    dataset = make_source(config).load(seed)
    return replace(dataset, train=dataset.train.subset(config.max_train, seed))


def count_classes(config: schema.DataConfig) -> int:
    """The number of classes, found without reading an image.

    Raises:
        ConfigError: the number is neither in the config nor known without the data.
    """
    return make_source(config).num_classes()


def prefetch_data(config: schema.DataConfig) -> Path | None:
    """Downloads a data set if that is possible and needed, and builds its store of decoded images.

    Returns:
        The store's folder; None for a data set that is made, not read.

    Raises:
        ConfigError: the download failed, or files have to be put in place by hand.
    """
    return make_source(config).prefetch()
