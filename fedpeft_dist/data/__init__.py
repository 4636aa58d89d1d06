"""Data sets, how they are split over clients, and how batches are made.

SOURCES maps the config classes of data sets that are read from files to their readers, DATASETS all config classes to
loaders.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data import cifar, datasets, huggingface, image_folder, image_store, pcam, resisc45
from fedpeft_dist.data.source import check_num_classes

SOURCES = {
    schema.Cifar10Config: cifar.cifar_source,
    schema.Cifar100Config: cifar.cifar_source,
    schema.Resisc45Config: resisc45.resisc45_source,
    schema.PcamConfig: pcam.pcam_source,
    schema.ImageFolderConfig: image_folder.image_folder_source,
    schema.HuggingFaceConfig: huggingface.huggingface_source,
}


def load_files(config: schema.DataConfig, seed: int) -> datasets.Dataset:
    """A data set of files, through its store on disk; the same for every seed."""
    dataset = image_store.open_store(SOURCES[type(config)](config), config)
    expected = getattr(config, "classes", None)
    if expected is not None:  # checked here too, since a store that is there already is not read anew
        check_num_classes(f"data.classes: {expected}", expected, f"the {config.name} data", dataset.class_names)
    return dataset


DATASETS = {
    **dict.fromkeys(SOURCES, load_files),
    schema.DigitsConfig: datasets.load_digits,
    schema.GlyphsConfig: datasets.load_glyphs,
    schema.Glyphs100Config: datasets.load_glyphs100,
    schema.SyntheticConfig: datasets.load_synthetic,
}

# Known without reading a file, for `fedpeft cost`.
_NUM_CLASSES = {
    schema.Cifar10Config: 10,
    schema.Cifar100Config: 100,
    schema.Resisc45Config: resisc45.NUM_CLASSES,
    schema.PcamConfig: 2,
    schema.DigitsConfig: 10,
}


def load_dataset(config: schema.DataConfig, seed: int) -> datasets.Dataset:
    """Reads or makes the data set of a config; `max_train` is applied here, before any partitioning.

    Raises:
        ConfigError: files that are missing or cannot be read; more training samples asked for than there are.
    """
    dataset = DATASETS[type(config)](config, seed)
    train = datasets.subsample(dataset.train, config.max_train, seed)
    return replace(dataset, train=train)


def count_classes(config: schema.DataConfig) -> int:
    """The number of classes, without reading an image.

    Raises:
        ConfigError: a data set that has to be read, or listed and is not there, to know.
    """
    if isinstance(config, schema.SyntheticConfig):
        return config.classes
    if isinstance(config, schema.ImageFolderConfig):
        return config.classes or len(image_folder.list_classes(Path(config.root) / config.train_folder))
    if isinstance(config, schema.HuggingFaceConfig):
        if config.classes is None:
            raise ConfigError(f"data.classes: null, and '{config.path}' would have to be read to know; give the number")
        return config.classes
    if isinstance(config, schema.Glyphs100Config):
        from fedpeft_dist.data.glyphs100 import draw_letters

        return len(draw_letters().class_names)
    if isinstance(config, schema.GlyphsConfig):
        from fedpeft_dist.data.glyphs import class_names

        return len(class_names(config.alphabet))
    return _NUM_CLASSES[type(config)]
