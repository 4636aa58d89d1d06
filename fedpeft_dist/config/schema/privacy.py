"""The `privacy` section: what is protected, and with how much noise."""

import math
from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Count, Positive, Section

CLIP_NORM_LIMIT, NOISE_LIMIT = 1.0e9, 1.0e6
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]
ClipNorm = Annotated[float, Field(ge=1 / CLIP_NORM_LIMIT, le=CLIP_NORM_LIMIT)]
Noise = Annotated[float, Field(gt=0.0, le=NOISE_LIMIT)]


class NoPrivacy(Section):
    name: Literal["none"]


class AccountedPrivacy(Section):
    """The keys of all mechanisms with a guarantee. They add Gaussian noise of `noise_multiplier` times `clip_norm`."""

    clip_norm: ClipNorm = 1.0
    """C, the Euclidean norm that each contribution is clipped to."""
    epsilon: Positive | None = None
    """Target at the end of the run. The noise is calibrated to it. Give this or `noise_multiplier`."""
    noise_multiplier: Noise | None = None
    """Standard deviation of the noise in units of `clip_norm`."""
    dp_delta: Delta = 1.0e-3
    """The delta of (epsilon, delta)-differential privacy; not a client's delta."""
    stop_at_epsilon: Positive | None = None
    """Limit of epsilon. The run ends before the first round that would exceed it. Goes with `noise_multiplier`."""
    secure_noise: bool = False
    """Draw noise, batches and, under user-level privacy, cohorts from the operating system's randomness. Such a run
    cannot be repeated. Otherwise all draws follow from the seed, which must then be kept secret."""

    def problems(self) -> dict[str, bool]:
        epsilon, noise, limit = self.epsilon, self.noise_multiplier, self.stop_at_epsilon
        return {
            f"epsilon: {epsilon} and noise_multiplier: {noise} are both given, and each follows from the other; give "
            "one of them": None not in (epsilon, noise),
            "neither epsilon nor noise_multiplier is given; give one, such as epsilon: 5.0": not (epsilon or noise),
            f"stop_at_epsilon: {limit} goes with noise_multiplier; with epsilon: {epsilon} the noise is such that the "
            "budget lasts for all rounds": None not in (limit, epsilon),
        }


class SamplePrivacy(AccountedPrivacy):
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133) in every client protects single samples from the server.

    Each local step draws every sample of the client independently, with probability q = min(1, batch_size / n). The
    step clips the gradient of each drawn sample, and adds noise to the sum of the gradients.
    """

    name: Literal["sample"]
    accountant: Literal["pld", "rdp"] = "pld"
    max_batch: Count | None = None
    """Largest batch. If more samples are drawn, a random subset of this size is kept; null keeps all of them."""
    slots: Literal["auto"] | Count = "auto"
    """Number of samples whose gradients a rank takes side by side; auto: `runtime.lanes` batches, if memory allows."""

    def problems(self) -> dict[str, bool]:
        return super().problems() | {
            f"max_batch: {self.max_batch} is accounted for by pld alone, not by {self.accountant}; give accountant: "
            "pld, or max_batch: null": self.max_batch is not None and self.accountant != "pld"
        }


class AdaptiveClipping(Section):
    """`clip_norm` follows a quantile of the deltas' norms (Andrew et al. 2021, arXiv 1905.03871)."""

    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    lr: Positive = 0.2
    """Learning rate of the geometric update of `clip_norm`."""
    count_noise: Noise | None = None
    """Standard deviation of the noise on the number of unclipped deltas, which takes a share of the budget; null:
    cohort / 20, but at least the noise multiplier."""


class UserPrivacy(AccountedPrivacy):
    """DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963) protects whole clients.

    Each client's delta is clipped, and noise is added to the sum of the deltas. All clients have the same
    weight. The guarantee holds against anyone who sees the global parameters.
    """

    name: Literal["user"]
    sampling: Literal["poisson", "without_replacement"] = "poisson"
    """How cohorts are drawn; `federation.participation` must agree. without_replacement: uniform cohorts of a fixed
    size, for neighbours that differ in one replaced client."""
    accountant: Literal["auto", "pld", "rdp"] = "auto"
    """Method of accounting. auto: pld, or rdp for without_replacement, which pld cannot account for."""
    adaptive: AdaptiveClipping | None = None

    def problems(self) -> dict[str, bool]:
        return super().problems() | {
            "accountant: pld cannot account for sampling: without_replacement; give rdp, or sampling: poisson": (
                self.sampling == "without_replacement" and self.accountant == "pld"
            )
        }

    @property
    def accountant_name(self) -> Literal["pld", "rdp"]:
        if self.accountant == "auto":
            return "rdp" if self.sampling == "without_replacement" else "pld"
        return self.accountant


class PaperNoise(Section):
    """The noise of the paper's first code, for comparison. It carries no guarantee.

    Nothing is clipped. Noise of standard deviation 2 C sqrt(2 ln(1.25 / delta) / epsilon) is added to each batch's
    gradient.
    """

    name: Literal["paper_noise"]
    clip_norm: Positive = 1.0
    epsilon: Positive = 5.0
    dp_delta: Delta = 1.0e-3

    @property
    def standard_deviation(self) -> float:
        return 2 * self.clip_norm * math.sqrt(2 * math.log(1.25 / self.dp_delta) / self.epsilon)


PrivacyConfig = Annotated[NoPrivacy | SamplePrivacy | UserPrivacy | PaperNoise, Field(discriminator="name")]
