"""The `data` section: which images, and how they are prepared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.partition import DirichletPartition, PartitionConfig, PoolPartition
from fedpeft_dist.config.schema.types import Count, Fraction, Positive, Section, Share


class DataSection(Section):
    """What every data set's section has."""

    root: UserPath = "data"
    """The folder with the data set's files."""
    store: UserPath | None = None
    """Where its decoded images are kept, written once and shared by all runs; null: the folder `.store` below root."""
    image_size: Count = 224
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How images are resized, with antialiasing; auto: as the backbone was pre-trained, by timm's data config."""
    augment: Literal["none", "flip", "crop_flip", "resized_crop_flip"] = "none"
    """flip: mirror with probability 1/2; crop_flip: also a random crop after padding by `crop_padding` pixels;
    resized_crop_flip: a window of random area and aspect, resized to `image_size`, then the flip."""
    crop_padding: Count = 4
    crop_scale: tuple[Share, Share] = Field((0.08, 1.0), strict=False)
    """The least and the largest area of the window, as a share of the image's."""
    crop_ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), strict=False)
    """The least and the largest width of the window, in heights."""
    max_train: Count | None = None
    """Keep a random subset of that many training samples, drawn before partitioning."""
    clients: Count | None = 64
    """The population N; null with the natural partition takes every client it has."""
    validation: Fraction = 0.0
    """The share of every client's samples that is held out from its training."""
    partition: PartitionConfig = DirichletPartition(name="dirichlet")


class Cifar10Config(DataSection):
    """The python version's files, as torchvision has them: `cifar-10-batches-py` below root."""

    name: Literal["cifar10"]


class Cifar100Config(DataSection):
    """The python version's files, as torchvision has them: `cifar-100-python` below root."""

    name: Literal["cifar100"]


class Resisc45Config(DataSection):
    """Remote-sensing scenes (Cheng et al. 2017): `NWPU-RESISC45/<class>/<class>_001.jpg` below root."""

    name: Literal["resisc45"]
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Of every class, drawn with `split_seed` and written down beside the decoded images."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    train_list: UserPath | None = None
    """A text file that names a training image a line, relative to root's class folders, or by the file's name alone
    where one file has it; goes with `test_list`."""
    test_list: UserPath | None = None


class PcamConfig(DataSection):
    """PatchCamelyon (Veeling et al. 2018): `pcam/camelyonpatch_level_2_split_train_x.h5` and its like below root."""

    name: Literal["pcam"]


class ImageFolderConfig(DataSection):
    """Any images in class folders, at any depth: `train/<class>/**/*` and `test/<class>/**/*` below root.

    Images are not turned by their EXIF orientation, as in torchvision and timm.
    """

    name: Literal["image_folder"]
    train_folder: UserPath = "train"
    test_folder: UserPath = "test"
    classes: Count | None = None
    """How many there should be: checked against the folders, and what `fedpeft cost` goes by."""
    stored_size: Count = 256
    """Images of differing sizes are stored as squares of this side: resized on the shorter side, then cropped."""


class HuggingFaceConfig(DataSection):
    """A data set of the Hugging Face hub, or a local folder in one of its formats; needs the extra `huggingface`.

    Images are turned by their EXIF orientation, as the library `datasets` does.
    """

    name: Literal["huggingface"]
    path: UserPath
    """The data set's name on the hub, such as `uoft-cs/cifar100`, or a local folder."""
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    """Names (a ClassLabel), text or whole numbers. The train split's are the classes; the test split's go by name."""
    client_column: str | None = None
    """Whose sample it is, for the natural partition."""
    classes: Count | None = None
    """How many there should be: checked against the data, and what `fedpeft cost` goes by."""
    stored_size: Count = 256
    """Images of differing sizes are stored as squares of this side: resized on the shorter side, then cropped."""


class DigitsConfig(DataSection):
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels): 1,297 to train, 500 to test."""

    name: Literal["digits"]
    image_size: Count = 32


class GlyphsConfig(DataSection):
    """Printed letters rendered from matplotlib's bundled fonts; its natural clients are the fonts."""

    name: Literal["glyphs"]
    image_size: Count = 32
    alphabet: Literal["latin", "greek", "cyrillic"] = "greek"
    images_per_letter: Count = 8
    """Training images of each letter in each font; a quarter as many (at least one) are rendered for testing."""


class Glyphs100Config(DataSection):
    """Greek and Cyrillic letters in the bundled fonts, about a hundred classes; one font family is for testing only."""

    name: Literal["glyphs100"]
    image_size: Count = 32
    images_per_letter: Count = 2
    """Training images of each letter in each of the twelve training fonts."""
    test_images_per_letter: Count = 3
    """Test images of each letter in each of the four fonts of the held-out family."""


class SyntheticConfig(DataSection):
    """Random images with random labels: for measuring speed, never accuracy."""

    name: Literal["synthetic"]
    num_train: Count = 4096
    num_test: Count = 512
    classes: Count = 100
    channels: Count = 3
    partition: PartitionConfig = PoolPartition(name="pool")


DataConfig = Annotated[
    Cifar10Config
    | Cifar100Config
    | Resisc45Config
    | PcamConfig
    | ImageFolderConfig
    | HuggingFaceConfig
    | DigitsConfig
    | GlyphsConfig
    | Glyphs100Config
    | SyntheticConfig,
    Field(discriminator="name"),
]
