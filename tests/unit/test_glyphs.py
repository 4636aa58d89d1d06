"""Letters rendered from fonts: their drawings, their classes, and repeatability."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Generator

from fedpeft_dist.config import schema
from fedpeft_dist.data import count_classes, load_dataset
from fedpeft_dist.data.glyphs import (
    ALPHABETS,
    FONT_NAMES,
    distort,
    draw_alphabet,
    font_files,
    merge_drawings,
    render_letters,
)
from tests.data_fixtures import data_config

SANS = FONT_NAMES.index("DejaVuSans")
COMPUTER_MODERN = [position for position, name in enumerate(FONT_NAMES) if name.startswith("cm")]


@pytest.fixture(scope="module")
def latin() -> torch.Tensor:
    return render_letters(ALPHABETS["latin"], font_files())


def grouped(characters: str) -> set[str]:
    """The classes of `characters` with more than one member, as strings."""
    classes = merge_drawings(render_letters(characters, font_files()))
    groups = {"".join(c for c, k in zip(characters, classes) if k == label) for label in set(classes)}
    return {group for group in groups if len(group) > 1}


def test_font_files_exist_and_none_is_a_symbol_font() -> None:
    paths = font_files()
    assert [path.stem for path in paths] == list(FONT_NAMES)
    assert all(path.is_file() for path in paths)
    assert len(set(paths)) == len(paths) == 22
    assert not any("LastResort" in path.name or "Siz" in path.name for path in paths)


def test_alphabets_hold_letters_only_and_no_digits() -> None:
    for characters in ALPHABETS.values():
        assert len(set(characters)) == len(characters)
        assert all(character.isalpha() for character in characters)


def test_every_latin_letter_is_drawn_in_every_font_and_fills_its_box(latin: torch.Tensor) -> None:
    assert latin.shape == (52, 22, 40, 40)
    assert latin.dtype == torch.uint8
    ink = latin > 0
    rows, columns = ink.any(3).int(), ink.any(2).int()  # [52, 22, 40]
    height, width = (40 - line.argmax(-1) - line.flip(-1).argmax(-1) for line in (rows, columns))
    assert torch.maximum(height, width).min() >= 31  # four fifths of 40, less a faint edge
    assert torch.maximum(height, width).max() <= 32
    assert latin.flatten(2).amax(-1).min() > 150


def test_a_font_without_the_letter_draws_nothing() -> None:
    greek = render_letters(ALPHABETS["greek"], font_files()).flatten(2).amax(-1) > 0
    assert not greek[:, COMPUTER_MODERN].any()
    assert greek[:, : COMPUTER_MODERN[0]].all()


def test_letters_that_differ_in_size_only_share_a_class() -> None:
    assert grouped(ALPHABETS["latin"]) == {"Cc", "Oo", "Ss", "Vv", "Ww", "Xx", "Zz"}


def test_letters_that_differ_in_alphabet_only_share_a_class() -> None:
    assert grouped("AΑАBΒEFΕGQO") == {"AΑА", "BΒ", "EΕ"}  # noqa: RUF001


def test_classes_are_numbered_by_first_appearance() -> None:
    assert merge_drawings(render_letters("BCAcb", font_files())) == [0, 1, 2, 1, 3]


def test_distortion_repeats_for_a_seed_and_differs_for_another(latin: torch.Tensor) -> None:
    clean = latin[:, SANS, None]
    first, again, other = (distort(clean, 32, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (52, 1, 32, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1
    assert (first.amax((1, 2, 3)) > 0.3).all()


def test_distortion_leaves_the_global_generator_alone(latin: torch.Tensor) -> None:
    before = torch.random.get_rng_state()
    distort(latin[:4, SANS, None], 32, Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_distortion_without_strength_keeps_the_letter_in_place(latin: torch.Tensor) -> None:
    clean = latin[:, SANS, None]
    plain = distort(clean, 32, Generator().manual_seed(0), strength=0.0)
    axis = torch.arange(32) - 15.5
    for dimension in (2, 3):
        profile = plain.sum(5 - dimension)[:, 0]  # ink along one axis
        centre = (profile * axis).sum(1) / profile.sum(1)
        assert centre.abs().max() < 6


@pytest.mark.parametrize(("alphabet", "classes", "fonts"), [("latin", 45, 22), ("greek", 46, 16)])
def test_dataset_holds_every_letter_of_every_font(alphabet: str, classes: int, fonts: int) -> None:
    letters = draw_alphabet(alphabet)
    glyphs = letters.render(images_per_letter=2, image_size=32, seed=3)
    count = len(ALPHABETS[alphabet])
    assert glyphs.images.shape == (count * fonts * 2, 1, 32, 32)
    assert glyphs.images.dtype == torch.uint8
    assert glyphs.labels.dtype == glyphs.groups.dtype == torch.int64
    assert len(letters.class_names) == classes
    assert sorted("".join(letters.class_names)) == sorted(ALPHABETS[alphabet])
    assert len(letters.fonts) == fonts
    assert glyphs.groups.bincount().tolist() == [count * 2] * fonts
    wanted = torch.tensor([len(name) * fonts * 2 for name in letters.class_names])
    assert torch.equal(glyphs.labels.bincount(), wanted)
    assert glyphs.images.flatten(1).amax(1).min() > 60


def test_the_data_set_is_trained_and_tested_on_other_distortions_of_the_same_letters() -> None:
    config = data_config(name="glyphs", alphabet="greek", images_per_letter=5)
    dataset = load_dataset(config, 3)
    assert dataset.class_names == draw_alphabet("greek").class_names
    assert count_classes(config) == dataset.num_classes == 46
    assert len(dataset.train) == 5 * len(dataset.test)
    assert torch.equal(dataset.train.images, draw_alphabet("greek").render(5, 32, 3).images)
    assert not torch.equal(dataset.train.images[::5], dataset.test.images)


def test_dataset_repeats_for_a_seed_only() -> None:
    first, again, other = (draw_alphabet("cyrillic").render(1, 16, seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, other.labels)
    assert not torch.equal(first.images, other.images)


def test_the_config_names_the_valid_alphabets() -> None:
    assert set(get_args(schema.GlyphsConfig.model_fields["alphabet"].annotation)) == set(ALPHABETS)
    with pytest.raises(ValueError, match="'latin', 'greek' or 'cyrillic'"):
        data_config(name="glyphs", alphabet="latn")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        data_config(name="glyphs", images_per_letter=0)
