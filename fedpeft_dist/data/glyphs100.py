"""The hard offline task: Greek and Cyrillic letters, about a hundred classes, tested on a font family never trained on.

Unlike `glyphs`, a letter keeps its size beside the others of its font, so that o and O are two classes. What looks the
same in both alphabets (А and Α) is one. Letters are drawn and distorted by `glyphs.py`'s means; the images are the same
in every run. The embedded backbone was pre-trained on Latin letters, some of which look like letters here:
`classes_seen_in_latin` tells which.

Shapes: C characters, F fonts, N images, S the side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from matplotlib.ft2font import FT2Font
from torch import Generator, Tensor

from fedpeft_dist.data.glyphs import (
    ALPHABETS,
    MASTER_SIZE,
    GlyphImages,
    blur,
    crop_letter,
    distort,
    font_files,
    merge_rows,
    paste,
)
from fedpeft_dist.lanes.random import derive_seed

CHARACTERS = ALPHABETS["greek"] + ALPHABETS["cyrillic"]
TRAIN_FAMILIES = ("DejaVuSans", "DejaVuSansMono", "STIXGeneral")
TEST_FAMILY = "DejaVuSerif"
CAPITAL_SHARE, LARGEST_SHARE = 0.8, 0.95
"""Of the drawing's side: what a capital's height takes, and what the largest letter may."""
SAME_DRAWING = 0.2
"""Two letters share a class where, in the median font, no pixel of their drawings, blurred by one pixel, differs by as
much. Any value from 0.05 to 0.3 gives the same classes."""
_SEED = 100


@dataclass(frozen=True)
class Letters:
    """Clean drawings [C, F, S, S] uint8 of CHARACTERS, and the class of each."""

    drawings: Tensor
    classes: Tensor
    """int64 [C]."""
    class_names: tuple[str, ...]


@cache
def draw_letters() -> Letters:
    """All letters in all fonts of the training families, then of the test family."""
    drawings = _draw(CHARACTERS)
    classes = _merge(drawings)
    names = tuple("".join(c for c, k in zip(CHARACTERS, classes) if k == label) for label in range(max(classes) + 1))
    return Letters(drawings, torch.tensor(classes), names)


def render_split(train: bool, images_per_letter: int, image_size: int) -> GlyphImages:
    """Distorted images of every letter in every font of the training families, or of the test family.

    Returns:
        N = 115 letters x fonts x images_per_letter; the font is a natural client.
    """
    letters, families = draw_letters(), (TRAIN_FAMILIES if train else (TEST_FAMILY,))
    fonts = _font_names()
    columns = [i for i, name in enumerate(fonts) if _family(name) in families]
    rows = torch.arange(len(CHARACTERS)).repeat(len(columns)).repeat_interleave(images_per_letter)
    font_ids = torch.arange(len(columns)).repeat_interleave(len(CHARACTERS) * images_per_letter)
    generator = Generator().manual_seed(derive_seed(_SEED, "train" if train else "test"))
    images = distort(letters.drawings[rows, torch.tensor(columns)[font_ids], None], image_size, generator)
    return GlyphImages(
        images=(images * 255).round().to(torch.uint8),
        labels=letters.classes[rows],
        font_ids=font_ids,
        class_names=letters.class_names,
        font_names=tuple(fonts[column] for column in columns),
    )


def classes_seen_in_latin() -> tuple[str, ...]:
    """The classes that hold a letter drawn as some Latin letter, which the embedded backbone was pre-trained on."""
    letters, latin = draw_letters(), _blurred(_draw(ALPHABETS["latin"]))
    own = _blurred(letters.drawings)
    seen = {
        int(label)
        for drawing, label in zip(own, letters.classes)
        if float((latin - drawing).abs().amax(-1).median(-1).values.min()) < SAME_DRAWING
    }
    return tuple(letters.class_names[label] for label in sorted(seen))


def _draw(characters: str) -> Tensor:
    fonts = [path for path in font_files() if path.stem in _font_names()]
    drawings = torch.zeros(len(characters), len(fonts), MASTER_SIZE, MASTER_SIZE, dtype=torch.uint8)
    for column, path in enumerate(fonts):
        drawings[:, column] = _draw_font(characters, path)
    return drawings


def _draw_font(characters: str, path: Path) -> Tensor:
    """[C, S, S] uint8: every letter centred, at one scale a font, but for those that would not fit."""
    font = FT2Font(str(path))
    font.set_size(150.0, 72.0)
    scale = CAPITAL_SHARE * MASTER_SIZE / crop_letter(font, "H").shape[-2]
    crops = [crop_letter(font, character) for character in characters]
    fitting = [min(scale, LARGEST_SHARE * MASTER_SIZE / max(crop.shape[-2:])) for crop in crops]
    return torch.stack([paste(crop, MASTER_SIZE, own) for crop, own in zip(crops, fitting)])


def _merge(drawings: Tensor) -> list[int]:
    """The class of each character."""
    blurred = _blurred(drawings)

    def same_as_before(row: int) -> Tensor:
        return (blurred[:row] - blurred[row]).abs().amax(-1).median(-1).values < SAME_DRAWING

    return merge_rows(len(drawings), same_as_before)


def _blurred(drawings: Tensor) -> Tensor:
    """[C, F, S * S] in 0 .. 1."""
    matrix = blur(MASTER_SIZE, 1.0)
    return (matrix @ (drawings.float() / 255) @ matrix.T).flatten(2)


def _font_names() -> tuple[str, ...]:
    names = [path.stem for path in font_files() if _family(path.stem) in (*TRAIN_FAMILIES, TEST_FAMILY)]
    return tuple(names)


def _family(name: str) -> str:
    """DejaVuSans-Bold is of DejaVuSans, STIXGeneralBol of STIXGeneral."""
    return "STIXGeneral" if name.startswith("STIXGeneral") else name.partition("-")[0]
