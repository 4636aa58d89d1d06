"""Printed letters as images: every letter of an alphabet, in every font that matplotlib carries.

A letter is drawn once per font, cropped and centred (`render_letters`), then spoiled at random (`distort`):
bent, thickened, and read back at as little as 8 x 8 pixels, so that a letter from a font looks like one from
a pen and a scanner. `render_dataset` does both; its fonts make natural federated clients. Ink is bright, the
background is dark. No digits are drawn anywhere here.

Shapes: C characters, F fonts, N images, S the side of a square image, R reading resolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from torch import Generator, Tensor
from torch.nn import functional as F

ALPHABETS: dict[str, str] = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    "greek": "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρσςτυφχψω",
    "cyrillic": "АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдеёжзийклмнопрстуфхцчшщъыьэюя",
}

# Left out: LastResort (boxes), the Display, Size and NonUnicode fonts (symbols), cmex10 and cmsy10 (their
# charmaps claim a-z, but hold mathematical symbols there).
FONT_NAMES: tuple[str, ...] = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)

MASTER_SIZE = 40  # the side of a clean drawing, before `distort` reads it
SAME_DRAWING = 0.38  # see `merge_drawings`
DISTORT_CHUNK = 2048  # images at a time: bounds memory, and part of what a seed means

# How a distorted image is read: (pixels a side, blur in output pixels, how often). 8 x 8, a coarse scanner's,
# comes most.
READINGS: tuple[tuple[int, float, float], ...] = (
    *((8, 0.0, 0.3), (8, 1.0, 0.15), (9, 0.5, 0.05), (10, 0.5, 0.1), (12, 0.5, 0.1)),
    *((16, 0.5, 0.1), (16, 1.0, 0.05), (32, 0.5, 0.1), (32, 1.5, 0.05)),
)


@dataclass(frozen=True)
class GlyphImages:
    """images [N, 1, S, S] uint8 (ink 255); labels and font_ids [N] int64, positions in the names' tuples."""

    images: Tensor
    labels: Tensor
    font_ids: Tensor
    class_names: tuple[str, ...]
    font_names: tuple[str, ...]


def font_files() -> list[Path]:
    """The bundled fonts that hold real letters, in a fixed order."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [folder / f"{name}.ttf" for name in FONT_NAMES]


def render_letters(characters: str, fonts: list[Path], size: int = MASTER_SIZE) -> Tensor:
    """Clean drawings [C, F, S, S] uint8: a letter's longer side fills four fifths of S, centred.

    A font without the character, by its own charmap, leaves an all-zero drawing.
    """
    drawings = torch.zeros(len(characters), len(fonts), size, size, dtype=torch.uint8)
    for column, path in enumerate(fonts):
        font = FT2Font(str(path))
        font.set_size(150.0, 72.0)  # 150 pixels an em, well above any `size` in use
        known = font.get_charmap()
        for row, character in enumerate(characters):
            if ord(character) in known:
                drawings[row, column] = _centre(crop_letter(font, character), size)
    return drawings


def merge_drawings(drawings: Tensor) -> list[int]:
    """The class of each row of `drawings` [C, F, S, S]: rows that cannot be told apart share a class.

    The rule: crop two drawings, stretch both to the same square, and blur them by a sixteenth of its
    side. They are the same if, in the median font holding both, no pixel (ink 1, paper 0) differs by
    `SAME_DRAWING`, and the logarithms of their aspect ratios differ by less than twice that. This merges
    what differs only in size or in alphabet (c and C, Latin A and Greek Alpha) and keeps E from F.
    Sameness is transitive; classes are numbered in order of first appearance.
    """
    held = drawings.flatten(2).amax(-1) > 0  # [C, F]
    squares, aspects = _squares(drawings, held)  # [C, F, 24 * 24], [C, F]

    def distances(row: int) -> Tensor:
        distance = (squares[:row] - squares[row]).abs().amax(-1)  # [row, F]
        distance = torch.maximum(distance, (aspects[:row] - aspects[row]).abs() / 2)
        return distance.masked_fill(~(held[:row] & held[row]), torch.nan).nanmedian(-1).values

    return merge_rows(len(drawings), lambda row: distances(row) < SAME_DRAWING)


def merge_rows(count: int, same_as_before: Callable[[int], Tensor]) -> list[int]:
    """Classes of `count` rows, transitive, numbered in order of first appearance.

    Args:
        same_as_before: for a row, which of the rows before it are the same: bool [row].
    """
    classes = list(range(count))
    for row in range(1, count):
        for other in same_as_before(row).nonzero().flatten().tolist():
            old, new = max(classes[row], classes[other]), min(classes[row], classes[other])
            classes = [new if value == old else value for value in classes]
    order = {value: position for position, value in enumerate(dict.fromkeys(classes))}
    return [order[value] for value in classes]


def distort(drawings: Tensor, image_size: int, generator: Generator, strength: float = 1.0) -> Tensor:
    """One random version of each clean drawing [N, 1, S, S] uint8, N at least 1.

    Returns [N, 1, image_size, image_size] float32, 0 to 1. In turn: stroke width; rotation, shear, scale
    and shift with an elastic bend; a blur and a reading at a lower resolution with sensor noise
    (READINGS); contrast. `strength` scales stroke, geometry and noise: at 0 only reading and contrast are
    left. All randomness comes from `generator`.
    """
    chunks = drawings.split(DISTORT_CHUNK)
    return torch.cat([_distort_chunk(chunk, image_size, generator, strength) for chunk in chunks])


def class_names(alphabet: str) -> tuple[str, ...]:
    """The classes of `render_dataset`, each named by the letters that share it, such as "Cc".

    Raises ValueError for an unknown alphabet.
    """
    return _names(alphabet, merge_drawings(render_letters(_characters(alphabet), font_files())))


def render_dataset(alphabet: str, images_per_letter: int, image_size: int, seed: int) -> GlyphImages:
    """`images_per_letter` distorted images of every (letter, font) pair of an alphabet, ordered by font.

    Letters that look alike share a class (`merge_drawings`). Fonts that hold no letter of the alphabet are
    left out. The same arguments give the same images. Raises ValueError for an unknown alphabet, or less
    than one image or pixel.
    """
    for name, value in (("images_per_letter", images_per_letter), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    drawings = render_letters(_characters(alphabet), font_files())
    held = drawings.flatten(2).amax(-1) > 0  # [C, F]
    kept = held.any(0).nonzero().flatten()
    classes = merge_drawings(drawings)
    font_ids, rows = held[:, kept].T.nonzero(as_tuple=True)  # every (font, letter) pair that exists
    font_ids, rows = font_ids.repeat_interleave(images_per_letter), rows.repeat_interleave(images_per_letter)
    generator = Generator().manual_seed(seed)
    images = distort(drawings[rows, kept[font_ids], None], image_size, generator)
    return GlyphImages(
        images=(images * 255).round().to(torch.uint8),
        labels=torch.tensor(classes)[rows],
        font_ids=font_ids,
        class_names=_names(alphabet, classes),
        font_names=tuple(FONT_NAMES[position] for position in kept.tolist()),
    )


def _characters(alphabet: str) -> str:
    if alphabet not in ALPHABETS:
        raise ValueError(f"alphabet: {alphabet!r} is not one of {', '.join(ALPHABETS)}")
    return ALPHABETS[alphabet]


def _names(alphabet: str, classes: list[int]) -> tuple[str, ...]:
    pairs = list(zip(ALPHABETS[alphabet], classes))
    return tuple("".join(c for c, k in pairs if k == label) for label in range(max(classes) + 1))


def crop_letter(font: FT2Font, character: str) -> Tensor:
    """The drawing of one character, without margins: [1, 1, height, width] float32, 0 to 1."""
    font.set_text(character, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    return _trim(torch.from_numpy(np.array(font.get_image())))


def _trim(drawing: Tensor) -> Tensor:
    rows, columns = drawing.any(1).nonzero().flatten(), drawing.any(0).nonzero().flatten()
    return drawing[None, None, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float() / 255


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def _centre(crop: Tensor, size: int) -> Tensor:
    return paste(crop, size, size * 0.8 / max(crop.shape[-2:]))


def paste(crop: Tensor, size: int, scale: float) -> Tensor:
    """A drawing [1, 1, height, width] in 0 .. 1, scaled and put in the middle of an empty square: [S, S] uint8."""
    height, width = (max(1, round(side * scale)) for side in crop.shape[-2:])
    top, left = (size - height) // 2, (size - width) // 2
    canvas = torch.zeros(size, size, dtype=torch.uint8)
    canvas[top : top + height, left : left + width] = (_resize(crop, height, width)[0, 0] * 255).round()
    return canvas


def _squares(drawings: Tensor, held: Tensor, side: int = 24) -> tuple[Tensor, Tensor]:
    """Cropped, stretched and blurred drawings [C, F, side * side]; logarithms of their aspects [C, F]."""
    squares, aspects = torch.zeros(*held.shape, side, side), torch.zeros(held.shape)
    for row, column in held.nonzero().tolist():
        crop = _trim(drawings[row, column])
        squares[row, column] = _resize(crop, side, side)[0, 0]
        aspects[row, column] = torch.tensor(crop.shape[-1] / crop.shape[-2]).log()
    matrix = blur(side, side / 16)
    return (matrix @ squares @ matrix.T).flatten(2), aspects


def blur(side: int, sigma: float) -> Tensor:
    """The [side, side] matrix that blurs a column of pixels; paper (0) lies beyond the edge."""
    if sigma == 0:
        return torch.eye(side)
    offsets = torch.arange(side)[:, None] - torch.arange(side)
    reach = torch.arange(-side, side + 1)
    return torch.exp(-0.5 * (offsets / sigma) ** 2) / torch.exp(-0.5 * (reach / sigma) ** 2).sum()


@cache
def _reading_matrices(side: int) -> tuple[Tensor, Tensor]:
    """What blurs and averages a column down, and what interpolates it back: 2 x [R, S, S], by READINGS.

    Rows and columns beyond a resolution are zero, so that all resolutions fit one batched product.
    """
    down, up = torch.zeros(2, len(READINGS), side, side)
    for entry, (wanted, sigma, _) in enumerate(READINGS):
        pixels = min(wanted, side)
        average = F.adaptive_avg_pool1d(torch.eye(side)[None], pixels)[0].T  # [pixels, S]
        down[entry, :pixels] = average @ blur(side, sigma)
        widen = F.interpolate(torch.eye(pixels)[None], size=side, mode="linear", align_corners=False)[0].T
        up[entry, :, :pixels] = widen  # [S, pixels]
    return down, up


def _thicken(image: Tensor) -> Tensor:
    """The largest value among a pixel and its four neighbours: strokes gain a pixel on each side."""
    padded = F.pad(image, (1, 1, 1, 1))
    across = torch.maximum(padded[..., 1:-1, :-2], padded[..., 1:-1, 2:])
    along = torch.maximum(padded[..., :-2, 1:-1], padded[..., 2:, 1:-1])
    return torch.maximum(image, torch.maximum(across, along))


def _distort_chunk(drawings: Tensor, image_size: int, generator: Generator, strength: float) -> Tensor:
    count = len(drawings)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator) * strength

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    image = drawings.float() / 255
    width = uniform(-0.6, 1.6) * strength  # by how many pixels a side strokes thicken or, below 0, thin
    thick = _thicken(image)
    thicker = _thicken(thick)
    thin = 1 - _thicken(1 - image)
    image = torch.lerp(image, thick, width.clamp(0, 1))
    image = torch.lerp(image, thicker, (width - 1).clamp(0, 1))
    image = torch.lerp(image, thin, (-width).clamp(0, 1))

    angle, shear = normal() * 0.17, normal() * 0.2
    zoom_x, zoom_y = torch.exp(normal() * 0.2 - 0.1 * strength), torch.exp(normal() * 0.08 + 0.02 * strength)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos, -sin + shear], -1) / zoom_x[:, None] * 0.85]
    rows.append(torch.stack([sin, cos], -1) / zoom_y[:, None] * 0.85)
    affine = torch.cat([torch.stack(rows, 1), normal(2, 1) * 0.07], dim=-1)  # [N, 2, 3]
    grid = F.affine_grid(affine, [count, 1, image_size, image_size], align_corners=False)
    bend = F.interpolate(normal(2, 4, 4) * 0.09, size=image_size, mode="bicubic", align_corners=True)
    image = F.grid_sample(image, grid + bend.permute(0, 2, 3, 1), align_corners=False)[:, 0]  # [N, S, S]

    odds = torch.tensor([share for _, _, share in READINGS])
    entry = torch.multinomial(odds, count, replacement=True, generator=generator)
    down, up = (matrices[entry] for matrices in _reading_matrices(image_size))
    image = down @ image @ down.mT
    image = image + normal(image_size, image_size) * uniform(0.0, 0.08)[:, 0]
    image = (up @ image.clamp(0, 1) @ up.mT)[:, None]
    brightest = image.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    return (image / brightest * uniform(0.7, 1.5)).clamp(0, 1) ** uniform(0.6, 1.4)
