"""What a config will send, spend and take, in the lines that `cost`, `privacy` and `fit` print."""

from collections.abc import Mapping
from typing import Any

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.ahead import Cost
from fedpeft_dist.federation.fit import Fit, Option
from fedpeft_dist.lanes.wire import MIB
from fedpeft_dist.privacy.statements import describe

GIB = 2**30
LARGE = 1_000_000_000
"""Parameters of a backbone from which sharding pays. A smaller one is cheaper to keep whole on every rank."""


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


def fit_lines(config: RunConfig, fit: Fit) -> list[str]:
    own, parts, balance, kept = fit.footprint, "weights of the backbone", fit.balance, fit.option
    if kept.size > 1:
        parts = f"weights, 1/{kept.size} of the blocks'"
    memory = {
        parts: kept.weights,
        "two whole blocks": kept.gathered,
        f"parameters of {fit.lanes} lane(s)": own.parameters,
        "their gradients": own.gradients,
        "their optimizer": own.optimizer,
        f"activations at B = {fit.batch_size}": own.activations,
        "evaluation, in their place": own.evaluation,
        "global vector and sums": own.server,
        "images": fit.images,
        f"peak, of {fit.memory / GIB:,.1f} GiB": fit.total,
    }
    wire = {
        "clients send": fit.uplink_per_round,
        "clients receive": fit.downlink_per_round,
        "a rank's sums": fit.reduced_per_round,
        "a rank receives in its group": fit.gathered_per_round,
    }
    name = f"{config.method.name} on {config.backbone.name}"
    lines = [f"{name}: memory of each of {fit.ranks} rank(s), {fit.device} in {fit.precision}"]
    lines += [f"  {label:<30} {size / MIB:>12,.1f} MiB" for label, size in memory.items()]
    lines += ["a round's traffic", *(f"  {label:<30} {size / MIB:>12,.1f} MiB" for label, size in wire.items())]
    lines += [
        f"balance over {balance.rounds} round(s); clients: {fit.clients_from}",
        f"  passes of a rank, and most     {balance.passes:>12,.1f} {balance.longest:,.1f}",
        f"  idle share of a round          {100 * balance.idle_share:>12.1f} %",
        f"  lanes without a client         {100 * balance.empty_lanes:>12.1f} %",
        f"  empty passes within groups     {100 * balance.padded_share:>12.1f} %",
        f"ways to keep the weights; a rank needs {fit.needed_lanes} lane(s)",
        "  sharding.size  quantize   weights, MiB  two blocks, MiB  gathered a pass, MiB  lanes that fit",
        *map(_option_line, fit.options),
    ]
    if fit.backbone_parameters < LARGE and kept.size > 1:
        lines.append(
            f"note: sharding pays from about a billion parameters; this backbone has {fit.backbone_parameters:,}"
        )
    if not any(option.lanes for option in fit.options):
        remedy = "runtime.sharding.lanes: shared divides each batch among the ranks of a group"
        lines.append(f"note: no lane of {fit.batch_size} samples fits; {remedy}")
    if not fit.proposal:
        return [*lines, "proposal: none; not even a batch of one sample fits: take more ranks, or GPUs of more memory"]
    return [*lines, "proposal: " + " ".join(f"{key}={value}" for key, value in fit.proposal.items())]


def _option_line(option: Option) -> str:
    sizes = [size / MIB for size in (option.weights, option.gathered, option.gathered_per_pass)]
    return "  {:>13}  {:>8} {:>14,.0f} {:>16,.0f} {:>21,.0f} {:>15}".format(
        option.size, option.quantize, *sizes, option.lanes or "none"
    )
