"""What a config will send and spend, in the lines that `cost` and `privacy` print."""

from collections.abc import Mapping
from typing import Any

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.ahead import Cost
from fedpeft_dist.lanes.wire import MIB
from fedpeft_dist.privacy.statements import describe


def cost_lines(config: RunConfig, cost: Cost) -> list[str]:
    sizes = {
        "a client": cost.uplink_bytes_per_client,
        f"a round of {config.federation.cohort} clients": cost.uplink_bytes_per_round,
        f"{config.federation.rounds} rounds": cost.uplink_bytes_total,
    }
    return [
        f"  trained parameters   {cost.trainable_parameters:>14,} of {cost.backbone_parameters:,}",
        *(f"  uplink, {label:<24} {size / MIB:>14,.3f} MiB" for label, size in sizes.items()),
        f"  share of full fine-tuning's bytes {100 * cost.share_of_full:.3f} %",
    ]


def privacy_lines(config: RunConfig, figures: Mapping[str, Any] | None) -> list[str]:
    """
    Args:
        figures: the plan's, after the last round; None where nothing is accounted for.
    """
    alone = {name: value for name, value in (figures or {}).items() if name not in ("name", "clients", "ranges")}
    lines = [f"  {name:<21} {v if isinstance(v, str) else f'{v:.6g}':>10}" for name, v in alone.items()]
    if quantiles := (figures or {}).get("clients"):
        lines.append(f"  {'over the clients':<21} {' '.join(f'{label:>10}' for label in quantiles)}")
        for name in quantiles["max"]:
            lines.append(f"  {name:<21} {' '.join(f'{row[name]:>10.6g}' for row in quantiles.values())}")
        ranges = ", ".join(f"{name} {least:.6g} to {most:.6g}" for name, (least, most) in figures["ranges"].items())
        lines.append(f"Each column is one client, at that quantile of epsilon. Clients that take part have {ranges}.")
    return [*lines, *describe(config.privacy, figures)]
