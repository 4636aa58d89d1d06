"""Data sets of the Hugging Face hub, or local folders in its formats, read by the library `datasets`.

Only `fedpeft prefetch` downloads. Everything else reads a local folder or the library's cache, with its network off.

Shapes: S samples of a split.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.schema import HuggingFaceConfig
from fedpeft_dist.data.datasets import Contents, Dataset, Part
from fedpeft_dist.data.image_files import DECODING, EncodedImage, Form, choose_form, decode_chunks
from fedpeft_dist.data.source import PREFETCH, FileSource, check_num_classes, stamp

SAVED_MARKS = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` leaves in a folder. Such a folder needs `load_from_disk`."""


class HuggingFaceSource(FileSource):
    config: HuggingFaceConfig

    @property
    def is_folder(self) -> bool:
        return Path(self.config.path).is_dir()

    def num_classes(self) -> int:
        if self.config.classes is None:
            path = self.config.path
            raise ConfigError(f"data.classes: null, and '{path}' would have to be read to know; give the number")
        return self.config.classes

    def load(self, seed: int) -> Dataset:
        dataset = super().load(seed)
        self._check_classes(dataset.class_names)  # `read` has not checked a store that was built by an earlier run
        return dataset

    def download(self) -> None:
        if not self.is_folder:
            self._load_splits(offline=False)

    def identity(self) -> Any:
        import_library()
        config, folder = self.config, Path(self.config.path)
        identity: list[Any] = [DECODING, config.subset, config.train_split, config.test_split, config.image_column]
        identity += [config.label_column, config.client_column, config.stored_size]
        if self.is_folder:
            stores = Path(config.store or Path(config.root) / ".store").resolve()  # may lie inside the folder
            files = sorted(p for p in folder.rglob("*") if p.is_file() and stores not in p.resolve().parents)
            return [*identity, stamp(files, folder)]
        # The cache's folder is named after the data set and the commit that was downloaded.
        cached = sorted(Path(entry["filename"]) for split in self.splits for entry in split.rows.cache_files)
        return [*identity, config.path, [[*path.parts[-4:], path.stat().st_size] for path in cached]]

    @cached_property
    def splits(self) -> "list[Split]":
        """The training split and the test split, from this machine's disk."""
        return self._load_splits(offline=True)

    def _load_splits(self, offline: bool) -> "list[Split]":
        config, names = self.config, (self.config.train_split, self.config.test_split)
        try:
            with library_ready(offline) as library:
                if any((Path(config.path) / mark).is_file() for mark in SAVED_MARKS):
                    found = library.load_from_disk(config.path)
                else:
                    found = library.load_dataset(config.path, config.subset)
        except ConfigError:
            raise
        except Exception as error:  # the library raises errors of many classes
            for name in names:
                if _is_saved_empty(Path(config.path) / name):
                    raise self._empty(name) from None
            raise self._not_loaded(error, offline) from None
        for key, name in zip(("train_split", "test_split"), names):
            if not hasattr(found, "keys") or name not in found:
                listed = ", ".join(found) if hasattr(found, "keys") else "only one, without a name"
                raise ConfigError(f"data.{key}: {name!r}, but the splits of '{config.path}' are: {listed}")
        # A data set that was saved with a format, such as torch's, would give tensors.
        return [Split(config, name, found[name].with_format(None)) for name in names]

    def _not_loaded(self, error: Exception, offline: bool) -> ConfigError:
        told = ": ".join(str(part) for part in (error, error.__cause__) if part)  # the first alone may say nothing
        reason, where = one_line(told or error, 200), f"data.path: '{self.config.path}'"
        if self.is_folder:
            return ConfigError(f"{where} cannot be read ({reason})")
        if offline:
            return ConfigError(f"{where} is neither a folder nor in the library's cache ({reason}); {PREFETCH}")
        return ConfigError(f"{where} cannot be downloaded ({reason}); try again where there is internet")

    def _empty(self, split: str) -> ConfigError:
        return ConfigError(f"data.path: '{self.config.path}', split {split!r}, holds no sample")

    def _check_classes(self, names: tuple[str, ...]) -> None:
        expected = self.config.classes
        if expected is not None:
            check_num_classes(f"data.classes: {expected}", expected, f"'{self.config.path}'", names)

    def read(self) -> Contents:
        train = self.splits[0]
        for split in self.splits:
            split.check_columns()
            if not len(split.rows):
                raise self._empty(split.name)
        values = [split.labels() for split in self.splits]
        classes = train.listed_names() or sorted(set(values[0]))
        # Both splits' labels are numbered by name: the test split's ClassLabel may list its names in another order.
        labels = [split.number_labels(own, classes) for split, own in zip(self.splits, values)]
        class_names = tuple(map(str, classes))
        self._check_classes(class_names)
        groups = train.groups()
        form = choose_form((image for split in self.splits for image in split.images()), self.config.stored_size)
        parts = [split.part(own, form) for split, own in zip(self.splits, labels)]
        return Contents(class_names, replace(parts[0], groups=groups), parts[1], cropped=form.cropped, notes=form.notes)


@dataclass(frozen=True)
class Split:
    """One split, and the errors that name its rows."""

    config: HuggingFaceConfig
    name: str
    rows: Any
    """The library's own object."""

    def check_columns(self) -> None:
        for key in ("image_column", "label_column", "client_column"):
            column, known = getattr(self.config, key), self.rows.column_names
            if column is not None and column not in known:
                raise ConfigError(
                    f"data.{key}: {column!r}, but the columns of '{self.config.path}' are: {', '.join(known)}"
                )

    def listed_names(self) -> list[str] | None:
        """The names of a ClassLabel column."""
        return getattr(self.rows.features[self.config.label_column], "names", None)

    def labels(self) -> list[Any]:
        """The label of each row: a ClassLabel's name, or else the value itself."""
        values, names = self._column("label_column"), self.listed_names()
        for row, value in enumerate(values):
            if isinstance(value, float) and not value.is_integer():
                remedy = "a label is a whole number or text"
            elif names is not None and not -1 <= value < len(names):
                remedy = f"valid are 0 to {len(names) - 1}"
            elif isinstance(value, int) and value < 0:
                remedy = "labels count from 0, and -1 marks a sample without one; choose a split that has labels"
            else:
                continue
            raise self._wrong_value("label_column", row, str(value), remedy)
        return values if names is None else [names[value] for value in values]

    def number_labels(self, labels: list[Any], classes: list[Any]) -> np.ndarray:
        """The place of each row's label among the classes of the training split: int64 [S]."""
        numbers = {value: index for index, value in enumerate(classes)}
        for row, value in enumerate(labels):
            if value not in numbers:
                listed = ", ".join(map(repr, classes[:4])) + (", ..." if len(classes) > 4 else "")
                remedy = f"the classes of split {self.config.train_split!r} are {listed}"
                raise self._wrong_value("label_column", row, repr(value), remedy)
        return np.array([numbers[value] for value in labels], dtype=np.int64)

    def groups(self) -> np.ndarray | None:
        """int64 [S]: the samples' clients, numbered in the order of their names."""
        if self.config.client_column is None:
            return None
        clients = np.array([str(client) for client in self._column("client_column")])
        return np.unique(clients, return_inverse=True)[1].astype(np.int64)

    def part(self, labels: np.ndarray, form: Form) -> Part:
        shape = (len(labels), form.channels, form.height, form.width)
        return Part(shape, labels, lambda: decode_chunks(self.images(), form))

    def images(self) -> Iterator[EncodedImage]:
        """The encoded images, in order."""
        library, column, path = import_library(), self.config.image_column, self.config.path
        kind = self.rows.features[column]
        if not isinstance(kind, library.Image):
            raise ConfigError(
                f"data.image_column: {column!r} of '{path}' holds no images but {str(kind)[:80]}; give a column of "
                "the type Image"
            )
        encoded = self.rows.select_columns([column]).cast_column(column, library.Image(decode=False))
        for row, sample in enumerate(encoded):
            image = sample[column] or {}
            content = image.get("bytes")
            if content is None and image.get("path") is None:
                raise self._wrong_value("image_column", row, "null", "every row needs an image")
            name = f"{path}, split {self.name}, row {row} (from 0), column {column}"
            content = Path(image["path"]) if content is None else content
            yield EncodedImage(name, content, "data.path", upright=self.config.upright)

    def _column(self, key: str) -> list[Any]:
        """The values of a column, each one number or text."""
        values = list(self.rows[getattr(self.config, key)])
        for row, value in enumerate(values):
            if value is None or value != value:
                raise self._wrong_value(key, row, "null", "every row needs a value")
            if isinstance(value, list | dict):
                what = "a list" if isinstance(value, list) else "several fields"
                raise self._wrong_value(key, row, what, "every row needs one number or text")
        return values

    def _wrong_value(self, key: str, row: int, found: str, remedy: str) -> ConfigError:
        where = f"data.{key}: {getattr(self.config, key)!r} of '{self.config.path}'"
        return ConfigError(f"{where} holds {found} in row {row} (from 0) of split {self.name!r}; {remedy}")


def import_library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "data.name: 'huggingface' needs the library `datasets`; install it with "
            "pip install 'fedpeft_dist[huggingface]'"
        ) from None
    return datasets


@contextmanager
def library_ready(offline: bool) -> Iterator[Any]:
    """The library without its own messages; offline, also without network and progress bars."""
    library = import_library()
    import huggingface_hub

    loggers = (library.logging, huggingface_hub.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    # The libraries read these values at every request, and the environment only once. Newer versions lack the second.
    switches = [(library.config, "HF_HUB_OFFLINE"), (library.config, "HF_DATASETS_OFFLINE")]
    switches.append((huggingface_hub.constants, "HF_HUB_OFFLINE"))
    before = [(owner, key, getattr(owner, key)) for owner, key in switches if hasattr(owner, key)]
    bars = library.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.set_verbosity(logging.CRITICAL)  # an error is raised as well
        if offline:
            library.disable_progress_bars()
            for owner, key, _ in before:
                setattr(owner, key, True)
        yield library
    finally:
        for owner, key, value in before:
            setattr(owner, key, value)
        for logger, level in zip(loggers, levels):
            logger.set_verbosity(level)
        if bars:
            library.enable_progress_bars()


def _is_saved_empty(folder: Path) -> bool:
    """Whether `save_to_disk` has written a split without a sample. Newer libraries cannot read such a split."""
    try:
        return not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
