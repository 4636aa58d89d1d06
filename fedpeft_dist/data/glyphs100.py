"""The hard offline task: Greek and Cyrillic letters, about a hundred classes, tested on a font family never trained on.

Unlike in `glyphs`, a letter keeps its size beside the others of its font, so that o and O are two classes. Letters that
look the same in both alphabets (А and Α) share a class. The images are the same in every run. The embedded backbone was
pre-trained on Latin letters, and some of them look like letters here: `classes_seen_in_latin` tells which.

Shapes: C characters, F fonts, S the side of an image.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fedpeft_dist.config.schema import Glyphs100Config
from fedpeft_dist.data.datasets import Dataset
from fedpeft_dist.data.distortion import blur
from fedpeft_dist.data.glyphs import ALPHABETS, MASTER_SIZE, Letters, Pen, font_files, merge_rows, paste
from fedpeft_dist.data.source import DataSource
from fedpeft_dist.lanes.random import derive_seed

CHARACTERS = ALPHABETS["greek"] + ALPHABETS["cyrillic"]
TRAIN_FAMILIES = ("DejaVuSans", "DejaVuSansMono", "STIXGeneral")
TEST_FAMILY = "DejaVuSerif"
CAPITAL_SHARE, LARGEST_SHARE = 0.8, 0.95
"""The height of a capital and the largest size of any letter, as shares of the drawing's side."""
SAME_DRAWING = 0.2
"""Two letters share a class if no pixel of their drawings, blurred by one pixel, differs by this much in the median
font. Any value from 0.05 to 0.3 gives the same classes."""
_SEED = 100


class Glyphs100Source(DataSource):
    """The images are the same for every seed."""

    config: Glyphs100Config

    def num_classes(self) -> int:
        return len(draw_letters().class_names)

    def load(self, seed: int) -> Dataset:
        config, train, test = self.config, letters_of(*TRAIN_FAMILIES), letters_of(TEST_FAMILY)
        return Dataset(
            train.render(config.images_per_letter, config.image_size, derive_seed(_SEED, "train")),
            test.render(config.test_images_per_letter, config.image_size, derive_seed(_SEED, "test")),
            train.class_names,
        )


@cache
def draw_letters() -> Letters:
    """All letters in all fonts of the training families and of the test family."""
    drawings = _draw(CHARACTERS)
    classes = torch.tensor(merge_rows(_look_alike(drawings, drawings)))
    return Letters(CHARACTERS, tuple(path.stem for path in _fonts()), drawings, classes)


def letters_of(*families: str) -> Letters:
    """All letters in the fonts of some families."""
    letters = draw_letters()
    return letters.in_fonts([font for font in letters.fonts if _family(font) in families])


def classes_seen_in_latin() -> tuple[str, ...]:
    """The classes with a letter that looks like a Latin letter, which the embedded backbone was pre-trained on."""
    letters = draw_letters()
    seen = _look_alike(letters.drawings, _draw(ALPHABETS["latin"])).any(dim=1)
    return tuple(letters.class_names[label] for label in letters.classes[seen].unique())


def _fonts() -> list[Path]:
    return [path for path in font_files() if _family(path.stem) in (*TRAIN_FAMILIES, TEST_FAMILY)]


def _draw(characters: str) -> Tensor:
    """uint8 [C, F, S, S]: every letter centred, at one scale for the font unless a letter would not fit."""
    fonts = []
    for pen in map(Pen, _fonts()):
        scale = CAPITAL_SHARE * MASTER_SIZE / pen.draw("H").shape[-2]
        crops = [pen.draw(character) for character in characters]
        fitting = [min(scale, LARGEST_SHARE * MASTER_SIZE / max(crop.shape[-2:])) for crop in crops]
        fonts.append(torch.stack([paste(crop, own) for crop, own in zip(crops, fitting)]))
    return torch.stack(fonts, dim=1)


def _look_alike(letters: Tensor, others: Tensor) -> Tensor:
    """Whether each letter [C, F, S, S] looks like each of the others: bool [C, their C]."""
    matrix = blur(MASTER_SIZE, 1.0)
    letters, others = ((matrix @ (own.float() / 255) @ matrix.T).flatten(2) for own in (letters, others))
    return torch.stack([(others - own).abs().amax(-1).median(-1).values < SAME_DRAWING for own in letters])


def _family(name: str) -> str:
    """The family of a font: DejaVuSans for DejaVuSans-Bold, STIXGeneral for STIXGeneralBol."""
    return "STIXGeneral" if name.startswith("STIXGeneral") else name.partition("-")[0]
