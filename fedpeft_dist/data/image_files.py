"""Encoded images (JPEG, PNG, ...) to arrays of one form, decoded by a few threads.

Shapes: C channels, H x W pixels, n images of a chunk.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from fedpeft_dist.data.source import unreadable

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"})
MAX_THREADS = 8
CHUNK = 256

T, U = TypeVar("T"), TypeVar("U")


@dataclass(frozen=True)
class EncodedImage:
    """An image file, or its content where it stands in another file."""

    name: str
    """For errors."""
    content: Path | bytes

    def open(self) -> Image.Image:
        return Image.open(BytesIO(self.content) if isinstance(self.content, bytes) else self.content)


@dataclass(frozen=True)
class Form:
    """What every image of a data set is brought to."""

    channels: int
    height: int
    width: int


def choose_form(images: Iterable[EncodedImage], stored_size: int) -> Form:
    """The images' own size where all have the same, else a square; colour unless all are grey. Reads headers only.

    Raises:
        ConfigError: a file that is no image; the message names it.
    """
    sizes, all_grey = set(), True
    for size, grey in _in_threads(_read_header, images):
        sizes.add(size)
        all_grey &= grey
    width, height = sizes.pop() if len(sizes) == 1 else (stored_size, stored_size)
    return Form(1 if all_grey else 3, height, width)


def decode_chunks(images: Iterable[EncodedImage], form: Form) -> Iterator[np.ndarray]:
    """uint8 [n, C, H, W], in order.

    Raises:
        ConfigError: an image that is damaged; the message names it.
    """
    chunk = []
    for array in _in_threads(lambda image: _decode(image, form), images):
        chunk.append(array)
        if len(chunk) == CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def _read_header(image: EncodedImage) -> tuple[tuple[int, int], bool]:
    """(width, height), and whether the image is grey."""
    try:
        with image.open() as opened:
            return opened.size, _is_grey(opened.mode)
    except Exception as error:  # Pillow's decoders fail by classes of their own, SyntaxError among them
        raise unreadable(image.name, error) from None


def _decode(image: EncodedImage, form: Form) -> np.ndarray:
    """uint8 [C, H, W]."""
    try:
        with image.open() as opened:
            pixels = _to_bytes(opened).convert("L" if form.channels == 1 else "RGB")
        array = np.asarray(_fit(pixels, form))
    except Exception as error:  # as above
        raise unreadable(image.name, error) from None
    return array.reshape(form.height, form.width, form.channels).transpose(2, 0, 1)


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "I") or mode.startswith("I;16")


def _to_bytes(image: Image.Image) -> Image.Image:
    """Brings 16 bits a pixel to 8, which Pillow's own conversion would cut off at 255."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; 8 or 16 bits are supported")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # else Pillow warns
    return image


def _fit(image: Image.Image, form: Form) -> Image.Image:
    """Resizes on the shorter side, antialiased, and crops the centre; an image of the form's size stays as it is."""
    if image.size == (form.width, form.height):
        return image
    width, height = image.size
    side = form.width
    scaled = (side, max(side, side * height // width)) if width <= height else (max(side, side * width // height), side)
    left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    resized = image.resize(scaled, Image.Resampling.BICUBIC)  # antialiased, as all of Pillow's filters
    return resized.crop((left, top, left + side, top + side))


def _in_threads(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """The results in order; only a few items are under way, however many there are."""
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    pool, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 16 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encoded_files(folder: Path, names: Sequence[str]) -> Iterator[EncodedImage]:
    """The files of these names below a folder."""
    return (EncodedImage(str(folder / name), folder / name) for name in names)
