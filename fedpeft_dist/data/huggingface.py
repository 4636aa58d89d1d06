"""Data sets of the Hugging Face hub, or local folders in its formats, read by the library `datasets`.

Only `fedpeft prefetch` downloads. Everything else reads a local folder or the library's cache, with its network off.

Shapes: S samples of a split.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import HuggingFaceConfig
from fedpeft_dist.data.image_files import DECODING, EncodedImage, Form, choose_form, decode_chunks
from fedpeft_dist.data.source import PREFETCH, Contents, Part, Source, check_num_classes, stamp

SAVED_MARKS = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in a folder, which wants a reader of its own."""


def huggingface_source(config: HuggingFaceConfig) -> Source:
    """
    Raises:
        ConfigError: the library is missing, or the data is not on this machine.
    """
    _import_library()
    keys = [config.subset, config.train_split, config.test_split, config.image_column, config.label_column]
    identity: list[Any] = [DECODING, *keys, config.client_column, config.stored_size]
    folder = Path(config.path)
    if folder.is_dir():
        own = Path(config.store or Path(config.root) / ".store").resolve()  # may lie in the same folder
        files = sorted(p for p in folder.rglob("*") if p.is_file() and own not in p.resolve().parents)
        return Source([*identity, stamp(files, folder)], lambda: _read(config, _load_both(config, offline=True)))
    splits = _load_both(config, offline=True)
    # The cache's folder bears the data set's name and the commit it was downloaded at.
    cached = sorted(Path(entry["filename"]) for split in splits for entry in split.cache_files)
    identity += [config.path, [[*path.parts[-4:], path.stat().st_size] for path in cached]]
    return Source(identity, lambda: _read(config, splits))


def download_huggingface(config: HuggingFaceConfig) -> None:
    """Fetches the data set into the library's cache.

    Raises:
        ConfigError: the library is missing, or the download failed.
    """
    _import_library()
    _load_both(config, offline=False)


def _import_library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "data.name: 'huggingface' needs the library `datasets`; install it with "
            "pip install 'fedpeft_dist[huggingface]'"
        ) from None
    return datasets


@contextmanager
def _library_ready(offline: bool) -> Iterator[Any]:
    """The library without notes of its own and, where nothing is to be downloaded, without network and bars."""
    library = _import_library()
    import huggingface_hub

    loggers = (library.logging, huggingface_hub.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    # Both read these at every request, and the environment only once; the second has gone in newer versions.
    switches = [(library.config, "HF_HUB_OFFLINE"), (library.config, "HF_DATASETS_OFFLINE")]
    switches.append((huggingface_hub.constants, "HF_HUB_OFFLINE"))
    before = [(owner, key, getattr(owner, key)) for owner, key in switches if hasattr(owner, key)]
    bars = library.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.set_verbosity(logging.CRITICAL)  # an error is raised, too
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


def _load_both(config: HuggingFaceConfig, offline: bool) -> list[Any]:
    """The train and the test split, as the library has them."""
    folder = Path(config.path)
    try:
        with _library_ready(offline) as library:
            if any((folder / mark).is_file() for mark in SAVED_MARKS):
                found = library.load_from_disk(str(folder))
            else:
                found = library.load_dataset(config.path, config.subset)
    except ConfigError:
        raise
    except Exception as error:  # the library fails in ways too many to list
        for name in _names(config):
            if _is_saved_empty(folder / name):
                raise _empty_split(config, name) from None
        told = ": ".join(str(part) for part in (error, error.__cause__) if part)  # the first alone may say nothing
        reason = " ".join(told.split())[:200] or type(error).__name__
        if folder.is_dir():
            raise ConfigError(f"data.path: '{config.path}' cannot be read ({reason})") from None
        if offline:
            raise ConfigError(
                f"data.path: '{config.path}' is neither a folder nor in the library's cache ({reason}); {PREFETCH}"
            ) from None
        raise ConfigError(
            f"data.path: '{config.path}' cannot be downloaded ({reason}); try again where there is internet"
        ) from None
    for key in ("train_split", "test_split"):
        if not hasattr(found, "keys") or getattr(config, key) not in found:
            names = ", ".join(found) if hasattr(found, "keys") else "only one, without a name"
            raise ConfigError(f"data.{key}: {getattr(config, key)!r}, but the splits of '{config.path}' are: {names}")
    # A data set that was saved with a format, such as torch's, would give tensors.
    return [found[name].with_format(None) for name in _names(config)]


def _read(config: HuggingFaceConfig, splits: list[Any]) -> Contents:
    for split, name in zip(splits, _names(config)):
        for key in ("image_column", "label_column", "client_column"):
            column = getattr(config, key)
            if column is not None and column not in split.column_names:
                raise ConfigError(
                    f"data.{key}: {column!r}, but the columns of '{config.path}' are: {', '.join(split.column_names)}"
                )
        if not len(split):
            raise _empty_split(config, name)
    class_names, labels = _read_labels(config, splits)
    if config.classes is not None:
        check_num_classes(f"data.classes: {config.classes}", config.classes, f"'{config.path}'", class_names)
    groups = _read_groups(config, splits[0])
    everything = (image for split, name in zip(splits, _names(config)) for image in _images(config, split, name))
    form = choose_form(everything, config.stored_size)
    train, test = (_part(config, *split, form) for split in zip(splits, _names(config), labels))
    return Contents(class_names, replace(train, groups=groups), test, cropped=form.cropped, notes=form.notes)


def _is_saved_empty(folder: Path) -> bool:
    """Whether `save_to_disk` has written a split without a sample, which newer libraries cannot read back."""
    try:
        return not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _empty_split(config: HuggingFaceConfig, split: str) -> ConfigError:
    return ConfigError(f"data.path: '{config.path}', split {split!r}, holds no sample")


def _names(config: HuggingFaceConfig) -> tuple[str, str]:
    return config.train_split, config.test_split


def _read_labels(config: HuggingFaceConfig, splits: list[Any]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The classes' names and both splits' labels, int64 [S].

    The classes are the train split's: its ClassLabel's names, or else the values that it holds, sorted. Both splits'
    labels are numbered by name, since another split's ClassLabel may list its names in another order.
    """
    columns = [_label_values(config, split, name) for split, name in zip(splits, _names(config))]
    classes = _listed_names(config, splits[0]) or sorted(set(columns[0]))
    number = {value: index for index, value in enumerate(classes)}
    for row, value in enumerate(columns[1]):
        if value not in number:
            raise _wrong_value(config, "label_column", config.test_split, row, repr(value), _known(config, classes))
    return tuple(map(str, classes)), [np.array([number[value] for value in own], dtype=np.int64) for own in columns]


def _known(config: HuggingFaceConfig, classes: Sequence[Any]) -> str:
    listed = ", ".join(map(repr, classes[:4])) + (", ..." if len(classes) > 4 else "")
    return f"the classes of split {config.train_split!r} are {listed}"


def _listed_names(config: HuggingFaceConfig, split: Any) -> list[str] | None:
    """The names of a ClassLabel column."""
    return getattr(split.features[config.label_column], "names", None)


def _label_values(config: HuggingFaceConfig, split: Any, split_name: str) -> list[Any]:
    """The label of each row: a ClassLabel's name, or the value itself."""
    values, names = _column(config, "label_column", split, split_name), _listed_names(config, split)
    for row, value in enumerate(values):
        if isinstance(value, float) and not value.is_integer():
            remedy = "a label is a whole number or text"
        elif names is not None and not -1 <= value < len(names):
            remedy = f"valid are 0 to {len(names) - 1}"
        elif isinstance(value, int) and value < 0:
            remedy = "labels count from 0, and -1 marks a sample without one; choose a split that has labels"
        else:
            continue
        raise _wrong_value(config, "label_column", split_name, row, str(value), remedy)
    return values if names is None else [names[value] for value in values]


def _column(config: HuggingFaceConfig, key: str, split: Any, split_name: str) -> list[Any]:
    """A column's values, each of them one number or text.

    Raises:
        ConfigError: a value that is missing, or is several.
    """
    values = list(split[getattr(config, key)])
    for row, value in enumerate(values):
        if value is None or value != value:
            raise _wrong_value(config, key, split_name, row, "null", "every row needs a value")
        if isinstance(value, list | dict):
            what = "a list" if isinstance(value, list) else "several fields"
            raise _wrong_value(config, key, split_name, row, what, "every row needs one number or text")
    return values


def _wrong_value(config: HuggingFaceConfig, key: str, split: str, row: int, found: str, remedy: str) -> ConfigError:
    column = getattr(config, key)
    where = f"data.{key}: {column!r} of '{config.path}' holds {found} in row {row} (from 0) of split {split!r}"
    return ConfigError(f"{where}; {remedy}")


def _part(config: HuggingFaceConfig, split: Any, split_name: str, labels: np.ndarray, form: Form) -> Part:
    shape = (len(labels), form.channels, form.height, form.width)
    return Part(shape, labels, lambda: decode_chunks(_images(config, split, split_name), form))


def _read_groups(config: HuggingFaceConfig, train: Any) -> np.ndarray | None:
    """int64 [S]: the training samples' clients, numbered in the order of their names."""
    if config.client_column is None:
        return None
    clients = np.array([str(client) for client in _column(config, "client_column", train, config.train_split)])
    return np.unique(clients, return_inverse=True)[1].astype(np.int64)


def _images(config: HuggingFaceConfig, split: Any, split_name: str) -> Iterator[EncodedImage]:
    """The encoded images, in order; they are turned by their EXIF orientation, as `datasets` itself does."""
    library = _import_library()
    column = config.image_column
    kind = split.features[column]
    if not isinstance(kind, library.Image):
        raise ConfigError(
            f"data.image_column: {column!r} of '{config.path}' holds no images but {str(kind)[:80]}; give a column of "
            "the type Image"
        )
    for row, sample in enumerate(split.select_columns([column]).cast_column(column, library.Image(decode=False))):
        image = sample[column] or {}
        content = image.get("bytes")
        if content is None and image.get("path") is None:
            raise _wrong_value(config, "image_column", split_name, row, "null", "every row needs an image")
        name = f"{config.path}, split {split_name}, row {row} (from 0), column {column}"
        yield EncodedImage(name, Path(image["path"]) if content is None else content, "data.path", upright=True)
