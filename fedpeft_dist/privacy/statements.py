"""The statements about a run's privacy, in one place for the log, the summary and the report."""

from typing import Any

from fedpeft_dist.config.schema import PaperNoise, PrivacyConfig, SamplePrivacy, UserPrivacy

# Numbers computed from training data, and numbers that tell who was in a cohort.
_FROM_DATA = (
    "train_loss", "rejected", "accuracy", "samples", "samples_per_second", "seconds", "peak_memory_bytes", "partition",
)  # fmt: skip
_FROM_COHORT = (
    "cohort", "uplink_bytes", "downlink_bytes", "selected", "dropped", "late", "partial", "wasted_samples",
    "simulated_seconds", "uplink_bytes_total", "downlink_bytes_total", "participation", "simulated_hours",
)  # fmt: skip


def outside(privacy: PrivacyConfig) -> tuple[str, ...]:
    """The names of a run's numbers that are outside the guarantee.

    They are computed from data or from secret draws, without noise. They are for the experimenter, and must not be
    published with the model.
    """
    return _FROM_DATA + _FROM_COHORT if isinstance(privacy, UserPrivacy) else _FROM_DATA


def guarantee(privacy: PrivacyConfig) -> str:
    """A sentence on what is protected from whom; `none` if nothing is."""
    if isinstance(privacy, SamplePrivacy):
        return (
            "any one training sample of a client, set to zero, against the server and anyone who sees what clients "
            "send; lost and late clients send nothing; clients' sizes, the schedule and the partition are public"
        )
    if isinstance(privacy, UserPrivacy):
        neighbours = "replaced" if privacy.sampling == "without_replacement" else "added or removed"
        return (
            f"any one client's contribution, {neighbours}, against anyone who sees the global parameters; the server "
            "is trusted, and the numbers of clients that have samples and of available clients are public"
        )
    return "none"


def summarize(privacy: PrivacyConfig, figures: dict[str, Any] | None) -> dict[str, Any] | None:
    """The value of `privacy` in a run's summary.

    Args:
        figures: the privacy plan's; None if there is no plan.
    """
    if privacy.name == "none":
        return None
    if isinstance(privacy, PaperNoise):
        figures = {"name": privacy.name, **dict.fromkeys(("epsilon", "dp_delta", "noise_std", "clip_norm"))}
        figures["noise_std"] = privacy.standard_deviation
    return {**figures, "guarantee": guarantee(privacy), "outside": list(outside(privacy))}


def describe(privacy: PrivacyConfig, figures: dict[str, Any] | None, warning: str | None = None) -> list[str]:
    """Lines for a run's log, before its first round.

    Args:
        figures: the privacy plan's; None if there is no plan.
        warning: the privacy plan's.
    """
    if privacy.name == "none":
        return []
    if isinstance(privacy, PaperNoise):
        return [
            f"privacy: paper_noise adds noise of standard deviation {privacy.standard_deviation:.4g} to every gradient "
            "and clips nothing: it carries no guarantee"
        ]
    if privacy.secure_noise:
        secrecy = (
            "secure_noise draws from the operating system, so this run cannot be repeated; never publish the results "
            "of an interrupted round"
        )
    else:
        secrecy = "noise and draws follow from the seed: keep it secret, or give secure_noise: true"
    return [
        f"privacy: epsilon {figures['epsilon']:.4g} at delta {figures['dp_delta']:g} at the end of the run, by "
        f"{figures['accountant']}; protects {guarantee(privacy)}",
        f"privacy: {', '.join(outside(privacy))} are outside the guarantee",
        *([] if warning is None else [f"warning: {warning}"]),
        f"privacy: {secrecy}",
    ]
