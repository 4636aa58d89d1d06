"""What a config would send, computed on the meta device: no data, no weights, seconds."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.lanes.wire import uplink_bytes


@dataclass(frozen=True)
class Cost:
    """Parameters and bytes of a run. Downlink equals uplink: a client receives as many parameters as it sends."""

    trainable_parameters: int
    backbone_parameters: int
    uplink_bytes_per_client: int
    uplink_bytes_per_round: int
    uplink_bytes_total: int
    share_of_full: float
    """Of the bytes that full fine-tuning of the same backbone would send."""


def compute_cost(config: RunConfig) -> Cost:
    """
    Raises:
        ConfigError: the backbone cannot be made, or the method does not fit it.
    """
    from fedpeft_dist.data import count_classes  # here, so that a report has no need of timm
    from fedpeft_dist.methods import build_lane_model

    model = build_lane_model(config, count_classes(config.data), device="meta")
    parameters = model.layout.num_parameters
    per_client = uplink_bytes(parameters, 1)
    per_round = uplink_bytes(parameters, config.federation.cohort)
    return Cost(
        trainable_parameters=parameters,
        backbone_parameters=model.backbone.num_parameters,
        uplink_bytes_per_client=per_client,
        uplink_bytes_per_round=per_round,
        uplink_bytes_total=per_round * config.federation.rounds,
        share_of_full=parameters / model.backbone.num_parameters,
    )
