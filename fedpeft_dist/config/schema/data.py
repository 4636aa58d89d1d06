"""The `data` section: which images, how they are prepared, and which client holds which of them."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.types import Concentration, Count, Fraction, Positive, Section, Share


class IidPartition(Section):
    """Clients of equal size, each with random samples."""

    name: Literal["iid"]


class DirichletPartition(Section):
    """Each class has its own draw of shares over the clients (Yurochkin et al. 2019, arXiv 1905.12022)."""

    name: Literal["dirichlet"]
    alpha: Concentration = 0.1
    """Shares are a draw from Dir(alpha, ..., alpha): the smaller, the more uneven."""
    min_samples: Annotated[int, Field(ge=0)] = 10
    """The smallest size of a client. The partition is redrawn until every client has this size."""
    top_up: bool = False
    """Draws only once: a client below `min_samples` takes samples from the largest client."""


class DirichletMixPartition(Section):
    """Clients of equal size, each with its own mix of classes (Hsu et al. 2019, arXiv 1909.06335)."""

    name: Literal["dirichlet_mix"]
    alpha: Concentration = 1.0
    """A mix is a draw from Dir(alpha * p), where p are the classes' shares of the training samples and add up to 1.
    `dirichlet` gives alpha to every client; here it is divided among the classes, so the same number is more uneven.
    Samples are drawn without replacement. A class that runs out leaves the mixes, which are then renormalised."""


class QuantityPartition(Section):
    """Clients of very different sizes, all with the same mix of classes."""

    name: Literal["quantity"]
    alpha: Concentration = 0.5
    """Sizes are a draw from Dir(alpha, ..., alpha): the smaller, the more uneven."""
    min_samples: Annotated[int, Field(ge=0)] = 1
    """The smallest size of a client. The sizes are redrawn until every client has this size."""


class ShardsPartition(Section):
    """Each client gets a few shards of samples sorted by class (McMahan et al. 2017, arXiv 1602.05629)."""

    name: Literal["shards"]
    classes_per_client: Count = 2
    """The number of shards of each client."""


class NaturalPartition(Section):
    """The clients that the data set itself knows, such as fonts or writers."""

    name: Literal["natural"]


class PoolPartition(Section):
    """Each client reads a window of one shared pool of samples, so a client costs only an offset."""

    name: Literal["pool"]
    samples: Count = 64
    """The size of each window."""


PartitionConfig = Annotated[
    IidPartition
    | DirichletPartition
    | DirichletMixPartition
    | QuantityPartition
    | ShardsPartition
    | NaturalPartition
    | PoolPartition,
    Field(discriminator="name"),
]


class DataSection(Section):
    """The keys of every data set. A ClassVar says what other sections or rooms must know of it."""

    root_is_identity: ClassVar[bool] = False
    """Whether the folder `root` alone says which data set is meant. Elsewhere root is only where the files lie."""
    upright: ClassVar[bool] = False
    """Whether images are turned by their EXIF orientation."""
    natural_clients: ClassVar[bool] = False
    """Whether the data set may know its samples' natural clients."""

    root: UserPath = "data"
    """The folder with the data set's files."""
    store: UserPath | None = None
    """The folder of the decoded images, written once and shared by all runs; null: the folder `.store` below root."""
    image_size: Count = 224
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """The filter for resizing images, with antialiasing; auto: the backbone's own, from timm's data config."""
    augment: Literal["none", "flip", "crop_flip", "resized_crop_flip"] = "none"
    """flip: mirror with probability 1/2; crop_flip: also a random crop after padding by `crop_padding` pixels;
    resized_crop_flip: a window of random area and aspect, resized to `image_size`, then the flip."""
    crop_padding: Count = 4
    crop_scale: tuple[Share, Share] = Field((0.08, 1.0), strict=False)
    """The smallest and the largest area of the window, as a share of the image's area."""
    crop_ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), strict=False)
    """The smallest and the largest ratio of the window's width to its height."""
    max_train: Count | None = None
    """The number of training samples to keep, drawn at random before partitioning; null: all of them."""
    clients: Count | None = 64
    """The population N; null, for the natural partition only: all clients that the data set has."""
    validation: Fraction = 0.0
    """The share of each client's samples that is held out from training."""
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
    """The share of each class that is drawn for testing, with `split_seed`. The lists lie beside the decoded images."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    train_list: UserPath | None = None
    """A text file with the name of one training image a line, relative to the class folders. A file's name without its
    folder will do if only one file has that name. Goes with `test_list`, which names the test images alike."""
    test_list: UserPath | None = None


class PcamConfig(DataSection):
    """PatchCamelyon (Veeling et al. 2018): `pcam/camelyonpatch_level_2_split_train_x.h5` and its like below root."""

    name: Literal["pcam"]


class ImageFolderConfig(DataSection):
    """Any images in class folders, at any depth: `train/<class>/**/*` and `test/<class>/**/*` below root.

    Images are not turned by their EXIF orientation, as in torchvision and timm.
    """

    root_is_identity = True
    name: Literal["image_folder"]
    train_folder: UserPath = "train"
    test_folder: UserPath = "test"
    classes: Count | None = None
    """The expected number of classes: checked against the folders, and used by `fedpeft cost`."""
    stored_size: Count = 256
    """The side of the stored squares if the images' sizes differ: resized on the shorter side, then cropped."""


class HuggingFaceConfig(DataSection):
    """A data set of the Hugging Face hub, or a local folder in one of its formats; needs the extra `huggingface`.

    Images are turned by their EXIF orientation, as the library `datasets` does.
    """

    upright = True
    natural_clients = True
    name: Literal["huggingface"]
    path: UserPath
    """The data set's name on the hub, such as `uoft-cs/cifar100`, or a local folder."""
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    """A column of names (a ClassLabel), text or whole numbers. The training split's values are the classes; the test
    split's values are matched by name."""
    client_column: str | None = None
    """The column that names each sample's client, for the natural partition."""
    classes: Count | None = None
    """The expected number of classes: checked against the data, and used by `fedpeft cost`."""
    stored_size: Count = 256
    """The side of the stored squares if the images' sizes differ: resized on the shorter side, then cropped."""


class DigitsConfig(DataSection):
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels): 1,297 to train, 500 to test."""

    name: Literal["digits"]
    image_size: Count = 32


class GlyphsConfig(DataSection):
    """Printed letters rendered from matplotlib's bundled fonts. The fonts are natural clients."""

    natural_clients = True
    name: Literal["glyphs"]
    image_size: Count = 32
    alphabet: Literal["latin", "greek", "cyrillic"] = "greek"
    images_per_letter: Count = 8
    """Training images of each letter in each font; a quarter as many (at least one) are rendered for testing."""


class Glyphs100Config(DataSection):
    """Greek and Cyrillic letters in the bundled fonts, about a hundred classes. One font family is for testing only."""

    natural_clients = True
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
