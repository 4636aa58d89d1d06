"""Every configuration key, its type, its default and its meaning: one file for each section of a config.

A section is a frozen, strict pydantic model that refuses unknown keys. A choice (of a method, a data set, ...) is a
discriminated union on `name`. Each union stands at the end of its section's file, and no other list of names exists.
Defaults are the paper's CIFAR-100 setting (arXiv 2210.01708), without augmentation.
"""

# ruff: noqa: F401

from fedpeft_dist.config.schema.algorithm import (
    AlgorithmConfig,
    FedAvgConfig,
    FedProxConfig,
    MedianConfig,
    ScaffoldConfig,
    TrimmedMeanConfig,
)
from fedpeft_dist.config.schema.backbone import BackboneConfig
from fedpeft_dist.config.schema.client import (
    AdamWConfig,
    ClientConfig,
    ClientOptimizerConfig,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    ScheduleConfig,
    SgdConfig,
)
from fedpeft_dist.config.schema.data import (
    Cifar10Config,
    Cifar100Config,
    DataConfig,
    DataSection,
    DigitsConfig,
    Glyphs100Config,
    GlyphsConfig,
    HuggingFaceConfig,
    ImageFolderConfig,
    PcamConfig,
    Resisc45Config,
    SyntheticConfig,
)
from fedpeft_dist.config.schema.federation import FederationConfig
from fedpeft_dist.config.schema.method import (
    AdapterConfig,
    BiasConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    MethodConfig,
    NormConfig,
    PromptConfig,
)
from fedpeft_dist.config.schema.participation import (
    AlwaysAvailable,
    AvailabilityConfig,
    DevicesConfig,
    DiurnalAvailability,
    DropoutConfig,
    LognormalDevices,
    NoDevices,
    NoDropout,
    OnOffAvailability,
    ParticipationConfig,
    RandomDropout,
    TraceAvailability,
    TraceDevices,
    TraceDropout,
)
from fedpeft_dist.config.schema.partition import (
    DirichletMixPartition,
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    PartitionConfig,
    PoolPartition,
    QuantityPartition,
    ShardsPartition,
)
from fedpeft_dist.config.schema.privacy import (
    CLIP_NORM_LIMIT,
    NOISE_LIMIT,
    AccountedPrivacy,
    AdaptiveClipping,
    ClipNorm,
    Delta,
    Noise,
    NoPrivacy,
    PaperNoise,
    PrivacyConfig,
    SamplePrivacy,
    UserPrivacy,
)
from fedpeft_dist.config.schema.run import RunConfig
from fedpeft_dist.config.schema.runtime import OutputConfig, RuntimeConfig
from fedpeft_dist.config.schema.server import (
    ServerAdagradConfig,
    ServerAdamConfig,
    ServerAdaptiveSection,
    ServerConfig,
    ServerOptimizerConfig,
    ServerSgdConfig,
    ServerYogiConfig,
)
from fedpeft_dist.config.schema.types import (
    Channels,
    Concentration,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Probability,
    Section,
    Share,
)
