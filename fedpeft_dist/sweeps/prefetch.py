"""Fetching the weights and data of runs ahead of them, on a machine with internet."""

from collections.abc import Sequence

from fedpeft_dist.backbones import timm_backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data import prefetch_data


def prefetch(configs: Sequence[RunConfig]) -> None:
    """Fetches what the configs need, each thing once, and prints where it is.

    Raises:
        ConfigError: something cannot be fetched. Everything else has been.
    """
    failures = []
    backbones = {str(config.backbone): config.backbone for config in configs}
    # The number of clients or of samples does not change which files a data set needs.
    data = {str(config.data.model_copy(update={"clients": None, "max_train": None})): config.data for config in configs}
    for kind, fetch, sections in (
        ("weights", timm_backbone.prefetch_weights, backbones),
        ("data", prefetch_data, data),
    ):
        places = []
        for section in sections.values():
            try:
                places.append(fetch(section))
            except ConfigError as error:
                failures.append(str(error))
        for place in dict.fromkeys(places):
            print(f"{kind + ':':<8} {place or 'nothing to download'}", flush=True)
    if failures:
        raise ConfigError("; ".join(dict.fromkeys(failures)))
