"""The `data.partition` section: which client holds which samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Concentration, Count, Section


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
