"""The `data.partition` section: which client holds which samples."""

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Concentration, Count, Section


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
