"""Printed letters as images: every letter of an alphabet, in every font that matplotlib carries.

A letter is drawn once per font, cropped and centred (`render_letters`), then distorted at random. The fonts make
natural clients. Ink is bright, paper is dark. No digits are drawn anywhere here.

Shapes: C characters, F fonts, S the side of a square image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fedpeft_dist.config.schema import GlyphsConfig
from fedpeft_dist.data.datasets import Dataset, ImageSet
from fedpeft_dist.data.distortion import blur, distort
from fedpeft_dist.data.source import DataSource
from fedpeft_dist.lanes.random import derive_seed

ALPHABETS: dict[str, str] = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    "greek": "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρσςτυφχψω",
    "cyrillic": "АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдеёжзийклмнопрстуфхцчшщъыьэюя",
}
FONT_NAMES: tuple[str, ...] = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)
"""The bundled fonts that hold real letters. Left out are LastResort (boxes), the Display, Size and NonUnicode fonts
(symbols), and cmex10 and cmsy10, whose charmaps claim a-z but hold mathematical symbols there."""
MASTER_SIZE = 40
"""The side of a clean drawing."""
SAME_DRAWING = 0.38
"""The largest difference of two drawings that `merge_drawings` takes for the same."""


class GlyphsSource(DataSource):
    """The letters' distortions come from the run's seed."""

    config: GlyphsConfig

    def num_classes(self) -> int:
        return len(draw_alphabet(self.config.alphabet).class_names)

    def load(self, seed: int) -> Dataset:
        config, letters = self.config, draw_alphabet(self.config.alphabet)
        num_test = max(1, config.images_per_letter // 4)
        train = letters.render(config.images_per_letter, config.image_size, seed)
        test = letters.render(num_test, config.image_size, derive_seed(seed, "test"))
        return Dataset(train, test, letters.class_names)


@dataclass(frozen=True)
class Letters:
    """Clean drawings of letters in several fonts, and the class of each letter."""

    characters: str
    fonts: tuple[str, ...]
    drawings: Tensor
    """uint8 [C, F, S, S]; all zero if the font does not hold the letter."""
    classes: Tensor
    """int64 [C]."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Each class is named by the letters that share it, such as "Cc"."""
        pairs = list(zip(self.characters, self.classes.tolist()))
        return tuple("".join(c for c, k in pairs if k == label) for label in range(int(self.classes.max()) + 1))

    def in_fonts(self, fonts: Sequence[str]) -> "Letters":
        """The drawings in some of the fonts."""
        columns = [self.fonts.index(font) for font in fonts]
        return replace(self, fonts=tuple(fonts), drawings=self.drawings[:, columns])

    def render(self, images_per_letter: int, image_size: int, seed: int) -> ImageSet:
        """Distorted images of every letter in every font, ordered by font. A font is a natural client."""
        held = _held(self.drawings).T.nonzero()  # every pair of a font and a letter that exists
        font_ids, rows = held.repeat_interleave(images_per_letter, dim=0).T.contiguous()
        images = distort(self.drawings[rows, font_ids, None], image_size, Generator().manual_seed(seed))
        return ImageSet((images * 255).round().to(torch.uint8), self.classes[rows], font_ids)


def draw_alphabet(alphabet: str) -> Letters:
    """An alphabet in all fonts that hold any of its letters. Letters that look alike share a class."""
    drawings = render_letters(ALPHABETS[alphabet], font_files())
    fonts = [name for name, held in zip(FONT_NAMES, _held(drawings).any(0)) if held]
    classes = torch.tensor(merge_drawings(drawings))
    return Letters(ALPHABETS[alphabet], FONT_NAMES, drawings, classes).in_fonts(fonts)


def font_files() -> list[Path]:
    """The bundled fonts that hold real letters, in a fixed order."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [folder / f"{name}.ttf" for name in FONT_NAMES]


class Pen:
    """Draws the letters of one font file."""

    def __init__(self, path: Path):
        from matplotlib.ft2font import FT2Font

        self.font = FT2Font(str(path))
        self.font.set_size(150.0, 72.0)  # 150 pixels an em, well above the size of any drawing
        self.known = self.font.get_charmap()
        """The characters that the font's own charmap holds."""

    def draw(self, character: str) -> Tensor:
        """The drawing of one character without margins: [1, 1, height, width] float32 in 0 .. 1."""
        self.font.set_text(character, 0.0)
        self.font.draw_glyphs_to_bitmap(antialiased=True)
        return _trim(torch.from_numpy(np.array(self.font.get_image())))


def render_letters(characters: str, fonts: list[Path]) -> Tensor:
    """Clean drawings [C, F, S, S] uint8. A letter is centred, and its longer side fills four fifths of S.

    If a font's own charmap does not hold the character, the drawing is all zero.
    """
    drawings = torch.zeros(len(characters), len(fonts), MASTER_SIZE, MASTER_SIZE, dtype=torch.uint8)
    for column, pen in enumerate(map(Pen, fonts)):
        for row, character in enumerate(characters):
            if ord(character) in pen.known:
                crop = pen.draw(character)
                drawings[row, column] = paste(crop, MASTER_SIZE * 0.8 / max(crop.shape[-2:]))
    return drawings


def merge_drawings(drawings: Tensor) -> list[int]:
    """The class of each row of `drawings` [C, F, S, S]. Rows that cannot be told apart share a class.

    The rule: crop two drawings, stretch both to the same square, and blur them by a sixteenth of its side. Compare them
    in the median font that holds both. They are the same if no pixel (ink 1, paper 0) differs by `SAME_DRAWING`, and
    the logarithms of their aspect ratios differ by less than twice that. This merges letters that differ only in size
    or in alphabet (c and C, Latin A and Greek Alpha) and keeps E from F.
    """
    held = _held(drawings)
    squares, aspects = _squares(drawings, held)  # [C, F, 24 * 24], [C, F]
    medians = []
    for square, aspect, own in zip(squares, aspects, held):
        distance = torch.maximum((squares - square).abs().amax(-1), (aspects - aspect).abs() / 2)  # [C, F]
        medians.append(distance.masked_fill(~(held & own), torch.nan).nanmedian(-1).values)
    return merge_rows(torch.stack(medians) < SAME_DRAWING)


def merge_rows(same: Tensor) -> list[int]:
    """The classes of rows, numbered in order of first appearance. Sameness, bool [C, C], is transitive."""
    from scipy.sparse.csgraph import connected_components

    return connected_components(same.numpy(), directed=False)[1].tolist()


def paste(crop: Tensor, scale: float) -> Tensor:
    """A drawing [1, 1, height, width] in 0 .. 1, scaled and put in the middle of an empty square: [S, S] uint8."""
    height, width = (max(1, round(side * scale)) for side in crop.shape[-2:])
    top, left = (MASTER_SIZE - height) // 2, (MASTER_SIZE - width) // 2
    canvas = torch.zeros(MASTER_SIZE, MASTER_SIZE, dtype=torch.uint8)
    canvas[top : top + height, left : left + width] = (_resize(crop, height, width)[0, 0] * 255).round()
    return canvas


def _held(drawings: Tensor) -> Tensor:
    """Which letters the fonts hold: bool [C, F]."""
    return drawings.flatten(2).amax(-1) > 0


def _trim(drawing: Tensor) -> Tensor:
    rows, columns = drawing.any(1).nonzero().flatten(), drawing.any(0).nonzero().flatten()
    return drawing[None, None, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float() / 255


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def _squares(drawings: Tensor, held: Tensor, side: int = 24) -> tuple[Tensor, Tensor]:
    """Cropped, stretched and blurred drawings [C, F, side * side], and the logarithms of their aspects [C, F]."""
    squares, aspects = torch.zeros(*held.shape, side, side), torch.zeros(held.shape)
    for row, column in held.nonzero().tolist():
        crop = _trim(drawings[row, column])
        squares[row, column] = _resize(crop, side, side)[0, 0]
        aspects[row, column] = torch.tensor(crop.shape[-1] / crop.shape[-2]).log()
    matrix = blur(side, side / 16)
    return (matrix @ squares @ matrix.T).flatten(2), aspects
