"""Every configuration key, its type, its default and its meaning. The single home of defaults.

A section is a frozen, strict pydantic model that refuses unknown keys. Choices ("methods", "data sets", ...) are
discriminated unions on `name`: these unions are the only lists of names in the project.
Defaults are the paper's CIFAR-100 setting (arXiv 2210.01708), but for augmentation, which a config asks for.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpeft_dist.config.paths import RunName, UserPath, check_run_place

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Channels = Annotated[tuple[Probability, ...], Field(strict=False, min_length=1)]
Concentration = Annotated[float, Field(ge=1e-9, le=1e9)]
"""A Dirichlet distribution's alpha, as far as float64 can draw from it."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BackboneConfig(Section):
    name: str = "vit_base_patch16_224.augreg_in21k"
    """Any timm model, with its pre-training tag, or `glyph_vit`, the small one that the package carries."""
    pretrained: bool = True
    """Take timm's own weights, which must be on this machine (`fedpeft prefetch` downloads them), or the package's."""
    checkpoint: UserPath | None = None
    """A local file to take the weights from instead: .safetensors, .pth, .pth.tar, .pt, .bin, .npz, or the
    .index.json of several .safetensors or .bin files.

    It may be wrapped as public pre-trainings wrap it. It must fill all of the model but a classifier, and may hold no
    more of an encoder than the model has."""
    model_args: dict[str, Any] = {}
    """Passed to `timm.create_model` as they are."""
    mean: Channels | None = None
    """Per channel, for images scaled to 0 .. 1; null takes what timm has for `name`. A checkpoint may want others."""
    std: Channels | None = None
    """The same, given together with `mean`."""

    @model_validator(mode="after")
    def _mean_and_std_go_together(self) -> BackboneConfig:
        if (self.mean is None) != (self.std is None):
            given, absent = ("std", "mean") if self.mean is None else ("mean", "std")
            raise ValueError(f"{given}: {list(getattr(self, given))} without {absent}; give both, or neither")
        if self.std is not None and 0.0 in self.std:
            raise ValueError(f"std: {list(self.std)} holds 0; give values above 0 and up to 1")
        return self


# --- methods -----------------------------------------------------------------------------------------------------


class FullConfig(Section):
    name: Literal["full"]


class HeadConfig(Section):
    name: Literal["head"]


class BiasConfig(Section):
    name: Literal["bias"]


class NormConfig(Section):
    name: Literal["norm"]


class PromptConfig(Section):
    name: Literal["prompt"]
    depth: Literal["shallow", "deep"] = "deep"
    tokens: Count = 10
    dropout: Fraction = 0.1


class AdapterConfig(Section):
    name: Literal["adapter"]
    bottleneck: Count = 96
    shared: bool = True
    """One module for all blocks (the paper's), or one per block."""


class LoraConfig(Section):
    name: Literal["lora"]
    rank: Count = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    targets: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(("qkv",), strict=False, min_length=1)
    """Linear layers of a block: qkv and proj are the attention's, fc1 and fc2 the MLP's."""


MethodConfig = Annotated[
    FullConfig | HeadConfig | BiasConfig | NormConfig | PromptConfig | AdapterConfig | LoraConfig,
    Field(discriminator="name"),
]


# --- data --------------------------------------------------------------------------------------------------------


class IidPartition(Section):
    name: Literal["iid"]


class DirichletPartition(Section):
    """Every class is dealt out by a draw of its own over the clients (Yurochkin et al. 2019, arXiv 1905.12022)."""

    name: Literal["dirichlet"]
    alpha: Concentration = 0.1
    min_samples: Annotated[int, Field(ge=0)] = 10
    """The partition is redrawn until every client has as many."""
    top_up: bool = False
    """Draw once in place of redrawing: a client below `min_samples` takes samples from the largest client."""


class DirichletMixPartition(Section):
    """Every client draws a mix of classes of its own (Hsu et al. 2019, arXiv 1909.06335); all have the same size."""

    name: Literal["dirichlet_mix"]
    alpha: Concentration = 1.0
    """A mix is a draw from Dir(alpha * p), where p are the classes' shares of the training samples and add up to 1.
    `dirichlet` gives alpha to every client, this one shares it out among the classes: the same number is more uneven
    here. Samples are drawn without replacement; a class that runs out leaves the mixes, which are renormalised."""


class QuantityPartition(Section):
    """Clients of very different sizes, each with the same mix of classes."""

    name: Literal["quantity"]
    alpha: Concentration = 0.5
    """Sizes are a draw from Dir(alpha, ..., alpha): the smaller, the more uneven."""
    min_samples: Annotated[int, Field(ge=0)] = 1
    """The sizes are redrawn until every client has as many."""


class ShardsPartition(Section):
    name: Literal["shards"]
    classes_per_client: Count = 2


class NaturalPartition(Section):
    name: Literal["natural"]


class PoolPartition(Section):
    """Every client reads a window of one shared pool of samples: a client costs an offset."""

    name: Literal["pool"]
    samples: Count = 64


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


# --- federation --------------------------------------------------------------------------------------------------


class AlwaysAvailable(Section):
    name: Literal["always"]


class OnOffAvailability(Section):
    """Every client goes on and off by itself, at random."""

    name: Literal["on_off"]
    share: Share = 0.5
    """Of the rounds, in which a client is available."""
    spread: Fraction = 0.0
    """Clients differ: each has a share of its own, uniform between share - spread and share + spread."""
    rounds: Count = 1
    """How long a client stays as it is before it is drawn anew; each is drawn at other rounds."""

    @model_validator(mode="after")
    def _shares_are_probabilities(self) -> OnOffAvailability:
        room = min(self.share, 1.0 - self.share)
        if self.spread > room:
            raise ValueError(f"share {self.share} with spread {self.spread} leaves 0 to 1; give a spread of {room:.6g}")
        return self


class DiurnalAvailability(Section):
    """The probability that a client is available follows its time of day, as a cosine between `low` and `high`."""

    name: Literal["diurnal"]
    low: Probability = 0.1
    high: Share = 0.9
    period: Positive = 86_400.0
    """Seconds of a day; round r starts r * `seconds_per_round` seconds into the first."""
    spread: Probability = 1.0
    """Of a day, over which the clients' days begin: 0 is one time zone, 1 is around the world."""

    @model_validator(mode="after")
    def _low_is_lower(self) -> DiurnalAvailability:
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high: {self.high}; give the smaller as low")
        return self


class TraceAvailability(Section):
    """From a CSV file with the columns `client,start,end,available`, in any order of rows.

    A row says whether a client (counted from 0) is available (1) or not (0) from second `start` up to, but without,
    second `end`. The rows of a client follow each other without gap or overlap, from 0 to an end that all clients
    share; after it the trace begins again. Round r looks at second r * `seconds_per_round`.
    """

    name: Literal["trace"]
    path: UserPath


AvailabilityConfig = Annotated[
    AlwaysAvailable | OnOffAvailability | DiurnalAvailability | TraceAvailability, Field(discriminator="name")
]


class NoDropout(Section):
    name: Literal["none"]


class RandomDropout(Section):
    """In every round each selected client is lost with these probabilities, at most one of them."""

    name: Literal["random"]
    before: Probability = 0.0
    """It has received the parameters, and trains nothing."""
    during: Probability = 0.0
    """It trains a share of its local steps, which is drawn, too, and sends nothing."""
    after: Probability = 0.0
    """It trains in vain: what it would send does not arrive."""

    @model_validator(mode="after")
    def _add_up(self) -> RandomDropout:
        total = self.before + self.during + self.after
        if total > 1.0 + 1e-9:
            raise ValueError(
                f"before, during and after add up to {total:.6g}; give probabilities of at most 1 together"
            )
        return self


class TraceDropout(Section):
    """From a CSV file with the columns `round,client,when`, where `when` is before, during or after.

    A row says that a client (counted from 0), should it be selected in that round (counted from 1, as in
    metrics.jsonl), is lost then; the meaning is that of `RandomDropout`. Whoever stands in no row stays.
    """

    name: Literal["trace"]
    path: UserPath


DropoutConfig = Annotated[NoDropout | RandomDropout | TraceDropout, Field(discriminator="name")]


class NoDevices(Section):
    """Clients take no simulated time."""

    name: Literal["none"]


class LognormalDevices(Section):
    """Each client has a speed and a link of its own for the whole run: a median times exp(sigma * normal)."""

    name: Literal["lognormal"]
    samples_per_second: Positive = 100.0
    """The median client's, in local training."""
    uplink_bytes_per_second: Positive = 1.0e6
    downlink_bytes_per_second: Positive = 4.0e6
    compute_sigma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    bandwidth_sigma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Of the link; a client with a slow one is slow both ways."""


class TraceDevices(Section):
    """From a CSV file with the columns `client,samples_per_second,uplink_bytes_per_second,downlink_bytes_per_second`.

    It has one row for each client (counted from 0), in any order; all speeds are above 0.
    """

    name: Literal["trace"]
    path: UserPath


DevicesConfig = Annotated[NoDevices | LognormalDevices | TraceDevices, Field(discriminator="name")]


class ParticipationConfig(Section):
    """Who takes part in a round, and what becomes of them. Paths are relative to the folder the command runs in."""

    name: Literal["uniform", "poisson", "weighted"] = "uniform"
    """uniform: `cohort` of the available clients; poisson: each of them by itself, with probability cohort / N
    (under user-level privacy, cohort over the number available);
    weighted: `cohort` of them, drawn one after another in proportion to their samples. In the mean of updates a client
    weighs as many as it has samples, whichever way it was drawn. N counts the clients that have samples: no others
    are selected."""
    over_selection: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.0
    """So many times `cohort` clients are selected, and the first `cohort` to report count; not for poisson."""
    availability: AvailabilityConfig = AlwaysAvailable(name="always")
    seconds_per_round: Positive = 3600.0
    """The clock of `availability`: round r, counted from 0, starts after r times as many seconds."""
    dropout: DropoutConfig = NoDropout(name="none")
    devices: DevicesConfig = NoDevices(name="none")
    """How fast clients receive, train and send: what a round's simulated seconds follow from."""
    deadline: Positive | None = None
    """Simulated seconds after which a round ends, whoever is still at work; null waits for all."""
    late: Literal["drop", "partial"] = "drop"
    """A client that cannot meet the deadline. drop: it does not count; partial: it sends what it has after those local
    steps that leave time for it, which counts with its usual weight; without time for a single step it is dropped."""

    @property
    def is_ideal(self) -> bool:
        """Whether everyone is there, nobody is lost, and nothing takes simulated time."""
        names = (self.availability.name, self.dropout.name, self.devices.name)
        return names == ("always", "none", "none") and self.over_selection == 1.0

    @model_validator(mode="after")
    def _fields_agree(self) -> ParticipationConfig:
        if self.name == "poisson" and self.over_selection != 1.0:
            raise ValueError(
                f"over_selection: {self.over_selection} does not go with poisson, whose cohorts vary; give 1.0"
            )
        if self.deadline is not None and self.devices.name == "none":
            raise ValueError(
                f"deadline: {self.deadline} needs devices, which say how long a client takes; "
                "give devices: {name: lognormal} or {name: trace}, or deadline: null"
            )
        if self.deadline is None and self.late == "partial":
            raise ValueError("late: partial needs a deadline, which nobody can miss where it is null; give one")
        return self


class FederationConfig(Section):
    rounds: Count = 50
    cohort: Count = 8
    """M, the number of clients that take part in a round; under poisson the number to expect."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1
    """In rounds; 0 evaluates at the end only."""
    evaluate_on: Literal["test", "validation"] = "test"
    evaluate_clients: bool = False
    """Also report the mean and the 10th percentile of the clients' own accuracies (needs `data.validation`)."""
    participation: ParticipationConfig = ParticipationConfig()


class ConstantSchedule(Section):
    name: Literal["constant"]


class CosineSchedule(Section):
    name: Literal["cosine"]
    final: Fraction = 0.0
    """The factor that would follow the last round's; it is approached, so that no round trains for nothing."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Rounds over which the factor climbs linearly to 1."""


class ExponentialSchedule(Section):
    name: Literal["exponential"]
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99


ScheduleConfig = Annotated[ConstantSchedule | CosineSchedule | ExponentialSchedule, Field(discriminator="name")]


class SgdConfig(Section):
    name: Literal["sgd"]
    lr: Positive = 0.01
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 1.0e-4

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdConfig:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov: true needs a momentum above 0; set nesterov: false or momentum: 0.9")
        return self


class AdamWConfig(Section):
    name: Literal["adamw"]
    lr: Positive = 1.0e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1.0e-8
    weight_decay: NonNegative = 0.01


ClientOptimizerConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class ClientConfig(Section):
    epochs: Count = 10
    steps: Count | None = None
    """Where given, every client takes this many local steps in place of `epochs`."""
    batch_size: Count = 64
    """A client with fewer samples takes all of them in every step; what exceeds the largest client costs nothing."""
    proximal: NonNegative = 0.0
    """FedProx's mu (arXiv 1812.06127): adds mu * (theta - global) to the gradient."""
    clip_norm: Positive | None = None
    """Clip each client's gradient to this Euclidean norm at every local step."""
    schedule: ScheduleConfig = ConstantSchedule(name="constant")
    """A factor on the client's learning rate, by round."""
    optimizer: ClientOptimizerConfig = SgdConfig(name="sgd")

    def num_steps(self, num_samples: int) -> int:
        """Local steps that a client with that many samples takes in a round."""
        if self.steps is not None:
            return self.steps if num_samples else 0
        return self.epochs * math.ceil(num_samples / self.batch_size)


class ServerSgdConfig(Section):
    name: Literal["sgd"]
    lr: Positive = 1.0
    momentum: Fraction = 0.0


class ServerAdaptiveSection(Section):
    """FedOpt's adaptive server optimizers (Reddi et al. 2021, arXiv 2003.00295)."""

    lr: Positive = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1.0e-3


class ServerAdamConfig(ServerAdaptiveSection):
    name: Literal["adam"]


class ServerYogiConfig(ServerAdaptiveSection):
    name: Literal["yogi"]


class ServerAdagradConfig(ServerAdaptiveSection):
    name: Literal["adagrad"]
    beta1: Fraction = 0.0


ServerOptimizerConfig = Annotated[
    ServerSgdConfig | ServerAdamConfig | ServerYogiConfig | ServerAdagradConfig, Field(discriminator="name")
]


class ServerConfig(Section):
    optimizer: ServerOptimizerConfig = ServerSgdConfig(name="sgd")


CLIP_NORM_LIMIT, NOISE_LIMIT = 1.0e9, 1.0e6
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]
ClipNorm = Annotated[float, Field(ge=1 / CLIP_NORM_LIMIT, le=CLIP_NORM_LIMIT)]
Noise = Annotated[float, Field(gt=0.0, le=NOISE_LIMIT)]


class NoPrivacy(Section):
    name: Literal["none"]


class AccountedPrivacy(Section):
    """What the mechanisms with a guarantee have: Gaussian noise of `noise_multiplier` times `clip_norm`."""

    clip_norm: ClipNorm = 1.0
    """C, the Euclidean norm that one contribution is clipped to."""
    epsilon: Positive | None = None
    """The target at the end of the run: the noise is calibrated to it. Give this or `noise_multiplier`."""
    noise_multiplier: Noise | None = None
    """Standard deviation of the noise in units of `clip_norm`."""
    dp_delta: Delta = 1.0e-3
    """The delta of (epsilon, delta)-differential privacy; not a client's delta."""
    stop_at_epsilon: Positive | None = None
    """Ends the run before the first round after which epsilon would be above; goes with `noise_multiplier`."""
    secure_noise: bool = False
    """Draw noise, batches and, under user-level privacy, cohorts from the operating system's randomness, in place of
    the seed, which must else be kept secret. Such a run cannot be repeated."""

    @model_validator(mode="after")
    def _one_of_epsilon_and_noise(self) -> AccountedPrivacy:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"epsilon: {self.epsilon} and noise_multiplier: {self.noise_multiplier} are both given, and each "
                "follows from the other; give one of them"
            )
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("neither epsilon nor noise_multiplier is given; give one, such as epsilon: 5.0")
        if self.stop_at_epsilon is not None and self.epsilon is not None:
            raise ValueError(
                f"stop_at_epsilon: {self.stop_at_epsilon} goes with noise_multiplier; with epsilon: {self.epsilon} the "
                "noise is such that the budget lasts for all rounds"
            )
        return self


class SamplePrivacy(AccountedPrivacy):
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133) in every client: protects single samples from the server.

    Each local step draws every sample of the client by itself with probability q = min(1, batch_size / n), clips each
    sample's gradient, and adds the noise to their sum.
    """

    name: Literal["sample"]
    accountant: Literal["pld", "rdp"] = "pld"
    max_batch: Count | None = None
    """Keep a random subset of so many where more samples were drawn; null keeps all of them."""
    slots: Literal["auto"] | Count = "auto"
    """Samples that a rank takes gradients of side by side; auto: `runtime.lanes` batches, as far as memory allows."""

    @model_validator(mode="after")
    def _truncation_needs_pld(self) -> SamplePrivacy:
        if self.max_batch is not None and self.accountant != "pld":
            raise ValueError(
                f"max_batch: {self.max_batch} is accounted for by pld alone, not by {self.accountant}; give "
                "accountant: pld, or max_batch: null"
            )
        return self


class AdaptiveClipping(Section):
    """`clip_norm` follows a quantile of the deltas' norms (Andrew et al. 2021, arXiv 1905.03871)."""

    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    lr: Positive = 0.2
    """Of the geometric update."""
    count_noise: Noise | None = None
    """Standard deviation of the noise on the number of unclipped deltas; null: cohort / 20, but at least the noise
    multiplier, of which it takes its share."""


class UserPrivacy(AccountedPrivacy):
    """Each client's delta is clipped, and noise is added to their sum (McMahan et al. 2018, arXiv 1710.06963): protects
    whole clients from whoever sees the global parameters. Clients count alike, whatever they hold."""

    name: Literal["user"]
    sampling: Literal["poisson", "without_replacement"] = "poisson"
    """How cohorts are drawn, which `federation.participation` must agree with. without_replacement: uniform cohorts of
    a fixed size, for neighbours that differ in a replaced client."""
    accountant: Literal["auto", "pld", "rdp"] = "auto"
    """auto: pld, and rdp for without_replacement, which pld cannot account for."""
    adaptive: AdaptiveClipping | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> UserPrivacy:
        if self.sampling == "without_replacement" and self.accountant == "pld":
            raise ValueError(
                "accountant: pld cannot account for sampling: without_replacement; give rdp, or sampling: poisson"
            )
        return self

    @property
    def accountant_name(self) -> Literal["pld", "rdp"]:
        if self.accountant == "auto":
            return "rdp" if self.sampling == "without_replacement" else "pld"
        return self.accountant


class PaperNoise(Section):
    """What the paper's first code did, for comparison: nothing is clipped, and noise of standard deviation
    2 C sqrt(2 ln(1.25 / delta) / epsilon) is added to each batch's gradient. It carries no guarantee."""

    name: Literal["paper_noise"]
    clip_norm: Positive = 1.0
    epsilon: Positive = 5.0
    dp_delta: Delta = 1.0e-3

    @property
    def standard_deviation(self) -> float:
        return 2 * self.clip_norm * math.sqrt(2 * math.log(1.25 / self.dp_delta) / self.epsilon)


PrivacyConfig = Annotated[NoPrivacy | SamplePrivacy | UserPrivacy | PaperNoise, Field(discriminator="name")]


# --- the machine and the files -----------------------------------------------------------------------------------


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    lanes: Literal["auto"] | Count = "auto"
    """Clients that a rank trains side by side; auto takes what its share of the cohort needs and memory allows."""
    threads: Count = 1
    """CPU threads of each rank."""
    compile: bool = False
    """Compile the model with torch.compile, which may round otherwise; not for method full."""
    evaluate_batch: Count = 256


class OutputConfig(Section):
    root: UserPath = "runs"
    """The folder of all runs, relative to the folder that the command runs in."""
    name: RunName | None = None
    """The run's directory below root, such as `lora4` or `ablation/lora4`; null derives it from the config's path and
    content."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1
    """In rounds; 0 writes one at the end only."""

    @model_validator(mode="after")
    def _place_leaves_room(self) -> OutputConfig:
        check_run_place(self.root, self.name)
        return self


class RunConfig(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = 1
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = BiasConfig(name="bias")
    data: DataConfig = Cifar100Config(name="cifar100")
    federation: FederationConfig = FederationConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = NoPrivacy(name="none")
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        data, federation = self.data, self.federation
        if data.clients is None and data.partition.name != "natural":
            raise ValueError(
                f"data.clients: null goes with the natural partition only; give a number for {data.partition.name!r}"
            )
        if data.clients is not None and federation.cohort > data.clients:
            raise ValueError(
                f"federation.cohort: {federation.cohort} is larger than the population, data.clients: {data.clients}; "
                f"give at most {data.clients}"
            )
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(data, key)
            if low > high:
                raise ValueError(f"data.{key}: [{low}, {high}] is no range; give the smaller number first")
        if data.name == "resisc45" and (data.train_list is None) != (data.test_list is None):
            raise ValueError("data.train_list and data.test_list go together: give both, or neither for a random split")
        if data.partition.name == "pool" and data.name != "synthetic":
            raise ValueError(f"data.partition.name: 'pool' goes with synthetic data only, not {data.name!r}")
        if data.partition.name == "pool" and data.validation:
            raise ValueError("data.validation: a pool's clients share their samples, so none can be held out; give 0.0")
        self._check_privacy()
        if self.runtime.compile and self.method.name == "full":
            raise ValueError("runtime.compile: true does not go with method 'full', which runs under vmap; give false")
        needs_validation = {
            "federation.evaluate_on: validation": federation.evaluate_on == "validation",
            "federation.evaluate_clients: true": federation.evaluate_clients,
        }
        for key, needed in needs_validation.items():
            if needed and data.validation == 0.0:
                raise ValueError(f"{key} needs data.validation above 0.0 (the share held out from every client)")
        return self

    def _check_privacy(self) -> None:
        privacy, participation = self.privacy, self.federation.participation
        if privacy.name == "none":
            return
        if self.runtime.precision == "fp16":
            raise ValueError(
                f"runtime.precision: fp16 does not go with privacy.name: {privacy.name}, for its loss scale and the "
                "steps that it skips depend on the data; give fp32, bf16 or auto"
            )
        if privacy.name == "sample" and self.client.clip_norm is not None:
            raise ValueError(
                f"client.clip_norm: {self.client.clip_norm} clips a batch's gradient, privacy.name: sample each "
                "sample's; give privacy.clip_norm, and client.clip_norm: null"
            )
        if privacy.name == "sample" and self.data.partition.name == "pool":
            raise ValueError(
                "data.partition.name: pool does not go with privacy.name: sample, for its clients share their samples; "
                "give another partition"
            )
        if privacy.name == "paper_noise":
            return
        if participation.over_selection != 1.0:
            reason = {
                "user": "who reports first is no random draw",
                "sample": "what surplus clients send would reach the server uncounted",
            }[privacy.name]
            raise ValueError(
                f"federation.participation.over_selection: {participation.over_selection} does not go with "
                f"privacy.name: {privacy.name}, for {reason}; give 1.0"
            )
        if privacy.secure_noise and self.output.checkpoint_every != 1:
            raise ValueError(
                f"output.checkpoint_every: {self.output.checkpoint_every} does not go with privacy.secure_noise: "
                "true, for rounds that are run again would draw new noise and count once; give 1"
            )
        if privacy.name != "user":
            return
        if participation.name != {"poisson": "poisson", "without_replacement": "uniform"}[privacy.sampling]:
            raise ValueError(
                f"federation.participation.name: {participation.name} does not go with privacy.name: user and "
                f"privacy.sampling: {privacy.sampling}; give federation.participation.name: poisson, or, to draw a "
                "fixed number at a larger epsilon, uniform with privacy.sampling: without_replacement"
            )
