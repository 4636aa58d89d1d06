"""Data sets, how they are split over clients, and how batches are made.

DATASETS maps the config class of each data set to its source. No other list of data sets exists.
"""

from dataclasses import replace
from pathlib import Path

from fedpeft_dist.config.schema import DataConfig, DataSection
from fedpeft_dist.config.schema import data as sections
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

DATASETS: dict[type[DataSection], type[DataSource]] = {
    sections.Cifar10Config: Cifar10Source,
    sections.Cifar100Config: Cifar100Source,
    sections.Resisc45Config: Resisc45Source,
    sections.PcamConfig: PcamSource,
    sections.ImageFolderConfig: ImageFolderSource,
    sections.HuggingFaceConfig: HuggingFaceSource,
    sections.DigitsConfig: DigitsSource,
    sections.GlyphsConfig: GlyphsSource,
    sections.Glyphs100Config: Glyphs100Source,
    sections.SyntheticConfig: SyntheticSource,
}


def make_source(config: DataConfig) -> DataSource:
    """The data set that a config section names. Nothing is read yet."""
    return DATASETS[type(config)](config)


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Reads or makes a data set, and keeps `max_train` of its training samples.

    Raises:
        ConfigError: files are missing or cannot be read, or there are fewer training samples than `max_train`.
    """
    dataset = make_source(config).load(seed)
    return replace(dataset, train=dataset.train.subset(config.max_train, seed))


def count_classes(config: DataConfig) -> int:
    """The number of classes, found without reading an image.

    Raises:
        ConfigError: the number is neither in the config nor known without the data.
    """
    return make_source(config).num_classes()


def prefetch_data(config: DataConfig) -> Path | None:
    """Downloads a data set if that is possible and needed, and builds its store of decoded images.

    Returns:
        The store's folder; None for a data set that is made, not read.

    Raises:
        ConfigError: the download failed, or files have to be put in place by hand.
    """
    return make_source(config).prefetch()
