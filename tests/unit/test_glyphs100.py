# ruff: noqa: RUF001
"""The hard offline task: its classes, its held-out family, its overlap with the pre-training letters."""

from __future__ import annotations

import torch

from fedpeft_dist.config.schema import Glyphs100Config
from fedpeft_dist.data import count_classes, load_dataset
from fedpeft_dist.data.glyphs100 import (
    CHARACTERS,
    TEST_FAMILY,
    TRAIN_FAMILIES,
    classes_seen_in_latin,
    draw_letters,
    letters_of,
)


def test_letters_that_coincide_share_a_class_and_others_do_not() -> None:
    names = draw_letters().class_names
    assert len(names) == 103
    assert sorted("".join(names)) == sorted(CHARACTERS)
    assert {"ΑА", "οо", "ΓГ"} <= set(names)
    assert {"Λ", "κ", "к", "С", "с", "У", "у", "И", "Й"} <= set(names)


def test_drawings_keep_a_letters_size() -> None:
    letters = draw_letters()
    heights = letters.drawings.amax(-1).bool().sum(-1).float().mean(-1)  # over fonts
    height = dict(zip(CHARACTERS, heights.tolist()))
    assert 0.6 < height["ο"] / height["Ο"] < 0.85
    assert height["Й"] > height["И"]
    assert abs(height["Н"] - 32) < 1


def test_the_test_family_is_never_trained_on() -> None:
    train, test = letters_of(*TRAIN_FAMILIES), letters_of(TEST_FAMILY)
    assert len(train.fonts) == 12
    assert len(test.fonts) == 4
    assert all(name.partition("-")[0] == TEST_FAMILY for name in test.fonts)
    assert all(name.startswith(TRAIN_FAMILIES) and not name.startswith(TEST_FAMILY) for name in train.fonts)
    assert train.class_names == test.class_names
    for letters in (train, test):
        split = letters.render(1, 32, seed=1)
        assert len(split.images) == 115 * len(letters.fonts)
        assert split.labels.bincount(minlength=103).min() >= len(letters.fonts)


def test_the_images_are_the_same_in_every_run() -> None:
    config = Glyphs100Config(name="glyphs100", images_per_letter=1, test_images_per_letter=2)
    first, second = load_dataset(config, 1), load_dataset(config, 2)
    assert torch.equal(first.train.images, second.train.images)
    assert first.train.images.shape == (1380, 1, 32, 32)
    assert first.test.images.shape == (920, 1, 32, 32)
    assert first.num_classes == count_classes(config) == 103
    assert first.train.groups.unique().tolist() == list(range(12))
    assert not torch.equal(first.train.images[:115], first.test.images[:115])


def test_the_overlap_with_the_pre_training_letters_is_known() -> None:
    seen = classes_seen_in_latin()
    assert len(seen) == 22
    assert {"ΑА", "с", "οо"} <= set(seen)
    assert not {"Ж", "Ω", "λ"} & set(seen)
