"""Decodes encoded images (JPEG, PNG, ...) to arrays of one form, with a few threads.

Shapes: S samples of a split, C channels, H x W pixels, n images of a chunk.
"""

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fedpeft_dist.data.datasets import Contents, Part
from fedpeft_dist.data.source import printable, unreadable

DECODING = 2
"""The version of the decoding. A new number makes the stores of encoded images be built again."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of formats for pictures. Other formats hold drawings, icons or measurements."""
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
"""Pillow's names of pixels with at most 8 bits a channel, which it converts to grey or RGB."""
DEEP_FORMATS = ("PNG", "PPM")
"""Formats in which mode I means 16 bits a pixel. In others it means 32 bits, and no rule says which value is white."""
QUARTER_TURNS = (5, 6, 7, 8)
"""The EXIF orientations that exchange width and height."""
ELONGATED = 8
"""The ratio of sides from which an image is cropped before it is resized, to save memory."""
MAX_THREADS = 8
CHUNK = 256

T, U = TypeVar("T"), TypeVar("U")


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of image files, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in FORMATS) - {".pfm"}  # floating-point pixels


class UnsupportedPixelsError(ValueError):
    """The image is whole, but its kind of pixels has no right conversion to 8 bits."""


@dataclass(frozen=True)
class EncodedImage:
    """An image file, or the content of one that is stored inside another file."""

    name: str
    """The name in errors."""
    content: Path | bytes
    key: str = "data.root"
    """The config key in errors."""
    upright: bool = False
    """Whether to turn the image as its EXIF orientation says."""

    def open(self) -> Image.Image:
        return Image.open(BytesIO(self.content) if isinstance(self.content, bytes) else self.content)

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Turns every error into one line that names this image."""
        try:
            yield
        except Exception as error:  # Pillow's decoders raise errors of many classes, even SyntaxError
            reason, remedy = error, "put a whole copy of the file there"
            if isinstance(error, UnsupportedPixelsError):
                remedy = "save it with 8 bits a channel"
            elif isinstance(error, Image.DecompressionBombError):
                pixels, remedy = int(re.search(r"\d+", str(error)).group()), "give a smaller picture"
                reason = f"it has {pixels:,} pixels, and Pillow reads at most {2 * Image.MAX_IMAGE_PIXELS:,}"
            elif isinstance(error, UnidentifiedImageError):
                reason, remedy = "Pillow knows no such image or pixels", f"{remedy}, or save it as PNG"
            raise unreadable(self.name, reason, remedy, self.key) from None


@dataclass(frozen=True)
class EncodedPart:
    """One split of encoded images."""

    images: Callable[[], Iterable[EncodedImage]]
    """Lists the images, in order."""
    labels: np.ndarray
    """int64 [S]."""
    groups: np.ndarray | None = None
    """int64 [S]: the natural client of each sample, if the data set has natural clients."""


def encoded_contents(
    class_names: tuple[str, ...],
    parts: Sequence[EncodedPart],
    stored_size: int,
    notes: tuple[str, ...] = (),
    texts: Mapping[str, str] | None = None,
) -> Contents:
    """The training and the test split, which are decoded to one form. Reads every image's header.

    Raises:
        ConfigError: a file is damaged, is no image or has unsupported pixels; now, or when the images are read.
    """
    form = choose_form(chain.from_iterable(part.images() for part in parts), stored_size)

    def decoded(part: EncodedPart) -> Part:
        shape = (len(part.labels), form.channels, form.height, form.width)
        return Part(shape, part.labels, lambda: decode_chunks(part.images(), form), part.groups)

    return Contents(class_names, *map(decoded, parts), texts or {}, bool(form.notes), notes + form.notes)


@dataclass(frozen=True)
class Form:
    """The size and channels that every image of a data set is converted to."""

    channels: int
    height: int
    width: int
    notes: tuple[str, ...] = ()
    """The reason for resizing on the shorter side and cropping. Empty if all images have one size."""


def choose_form(images: Iterable[EncodedImage], stored_size: int) -> Form:
    """The images' own size if all have the same, else a square; colour unless all are grey. Reads headers only."""
    firsts: dict[tuple[int, int], str] = {}
    counts, all_grey = Counter(), True
    for name, size, grey in _in_threads(_read_header, images):
        firsts.setdefault(size, name)
        counts[size] += 1
        all_grey &= grey
    channels = 1 if all_grey else 3
    [(usual, count)] = counts.most_common(1)
    if len(counts) == 1:
        return Form(channels, usual[1], usual[0])
    odd = next(size for size in firsts if size != usual)
    note = (
        f"'{printable(firsts[odd])}' is {odd[0]} x {odd[1]} pixels, and {count:,} of "
        f"{counts.total():,} images are {usual[0]} x {usual[1]}: since sizes differ, every image is resized on "
        f"its shorter side and cropped to its central {stored_size} x {stored_size}; images of one size stay whole"
    )
    return Form(channels, stored_size, stored_size, (note,))


def decode_chunks(images: Iterable[EncodedImage], form: Form) -> Iterator[np.ndarray]:
    """uint8 [n, C, H, W], in order."""
    arrays = _in_threads(partial(_decode, form=form), images)
    while chunk := list(islice(arrays, CHUNK)):
        yield np.stack(chunk)


def _read_header(image: EncodedImage) -> tuple[str, tuple[int, int], bool]:
    """The name, (width, height), and whether the image is grey."""
    with image.errors_told(), image.open() as opened:
        mode = opened.mode
        if not (mode in MODES or mode.startswith("I;16") or (mode == "I" and opened.format in DEEP_FORMATS)):
            kinds = {"F": "floating-point numbers", "I": "32-bit integers, whose white is not known"}
            raise UnsupportedPixelsError(f"its pixels are {kinds.get(mode, 'of an unsupported kind')}: mode {mode}")
        size = opened.size
        if image.upright and opened.format != "TIFF":  # Pillow turns a TIFF by itself and tells the size after turning
            with suppress(Exception):  # the metadata is damaged, but the picture may be whole
                size = size[::-1] if opened.getexif().get(ExifTags.Base.Orientation) in QUARTER_TURNS else size
        return image.name, size, mode in ("1", "L", "LA", "La") or _is_deep(mode)


def _decode(image: EncodedImage, form: Form) -> np.ndarray:
    """uint8 [C, H, W]."""
    with image.errors_told(), image.open() as opened:
        # A pixel of an image with more than 8 bits has 16, unless a TIFF file says 12.
        bits = getattr(opened, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]
        opened.load()
        pixels = opened
        if image.upright:
            with suppress(Exception):  # the metadata is damaged
                pixels = ImageOps.exif_transpose(opened)
        pixels = _to_bytes(pixels, bits).convert("L" if form.channels == 1 else "RGB")
        array = np.asarray(_fit(pixels, form))
        return array.reshape(form.height, form.width, form.channels).transpose(2, 0, 1)


def _is_deep(mode: str) -> bool:
    return mode == "I" or mode.startswith("I;16")


def _to_bytes(image: Image.Image, bits: int) -> Image.Image:
    """Scales 12 or 16 bits a pixel to 8. Pillow's own conversion would cut values off at 255."""
    if _is_deep(image.mode):
        values, white = np.asarray(image).astype(np.int64), 2**bits - 1
        array = (values.clip(0, white) >> (bits - 8)).astype(np.uint8)
        if values.any() and not array.any():
            told = f"its pixels are at most {values.max()}, which is black where white is {white:,}"
            raise UnsupportedPixelsError(f"{told}: mode {image.mode}")
        return Image.fromarray(array)
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # Pillow would warn about a direct conversion
    return image


def _fit(image: Image.Image, form: Form) -> Image.Image:
    """Resizes on the shorter side, antialiased, and crops the centre. An image of the form's size stays as it is."""
    if image.size == (form.width, form.height):
        return image
    width, height = image.size
    side = form.width
    scaled = (side, max(side, side * height // width)) if width <= height else (max(side, side * width // height), side)
    left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    window = (left, top, left + side, top + side)
    if max(scaled) >= ELONGATED * side:
        ratios = (width / scaled[0], height / scaled[1]) * 2
        box = tuple(edge * ratio for edge, ratio in zip(window, ratios))
        return image.resize((side, side), Image.Resampling.BICUBIC, box)
    return image.resize(scaled, Image.Resampling.BICUBIC).crop(window)  # all of Pillow's filters are antialiased


def _in_threads(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """The results in order. Only a few items are in memory at any time."""
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
    """The files with these names below a folder."""
    return (EncodedImage(str(folder / name), folder / name) for name in names)
