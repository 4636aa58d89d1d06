"""Attacks the privacy mechanisms as they run: bounds epsilon from below, and compares it with the plan's claim.

    python benchmarks/privacy_audit.py [--trials N] [--seed S]

A trial trains with one canary or without it, and releases the same vectors as a run. An attacker knows all the rest and
guesses whether the canary was there, from how far the releases lie in the canary's direction. The rate of wrong guesses
bounds epsilon from below (Jagielski et al. 2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535). The canary is
the worst case: its contribution is far beyond the clipping norm, and no other contribution lies in its direction.

The script prints one JSON object a case. It exits with 1 if the bound of a right mechanism is above the claim, or if
the bound of a broken mechanism is not. An audit that no mechanism can fail says nothing.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count, islice
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from scipy.stats import beta

from fedpeft_dist.algorithms import make_algorithm
from fedpeft_dist.algorithms.algorithm import Federation
from fedpeft_dist.algorithms.server_optimizers import make_server_optimizer
from fedpeft_dist.algorithms.state import State
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig, RuntimeConfig
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.partition import SharedPoolPartition
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.federation.aggregation import Aggregation
from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy import user_level
from fedpeft_dist.privacy.mechanisms import noise_on_grid
from fedpeft_dist.privacy.plan import make_privacy_plan
from fedpeft_dist.privacy.user_level import NoisyMean
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training import gradients
from fedpeft_dist.training.batches import PoissonBatches
from fedpeft_dist.training.gradients import NoisyGradient
from fedpeft_dist.training.schedule import ClientTask, Schedule
from fedpeft_dist.training.trainer import ClientUpdate, RoundStart, Trainer

CONFIDENCE, DP_DELTA, CLIP_NORM = 0.95, 1e-3, 1.0
CANARY = 0
STEPS, NOISE_MULTIPLIER = 4, 1.25
"""The noisy sums of a trial, one for each local step or round, and the noise of each."""
NO_TRAFFIC = Traffic(0, 0)  # clients take no simulated time
RIGHT = "right"


class Mechanism(Protocol):
    level: str
    claimed_epsilon: float
    """The epsilon of a trial, by the plan that a run makes."""
    faults: dict[str, AbstractContextManager]
    """Patches that break the mechanism, by name. The patch `right` changes nothing."""

    def scores(self, is_present: bool, num_trials: int) -> np.ndarray:
        """Scores of independent trials with or without the canary: float64 [num_trials], larger if it seems there.

        Each call has fresh randomness.

        Args:
            is_present: whether the trials have the canary.
        """


def make_faults(module: ModuleType, no_sampling: AbstractContextManager) -> dict[str, AbstractContextManager]:
    """
    Args:
        module: the module whose functions clip and make the noise of a mechanism.
        no_sampling: a patch that makes every client or sample contribute every time.
    """
    return {
        RIGHT: nullcontext(),
        "half the noise": mock.patch.object(module, "noise_on_grid", scaled_noise(0.5)),
        "no clipping": mock.patch.object(module, "clip_factors", lambda norms, clip_norm: torch.ones_like(norms)),
        "no sampling": no_sampling,
    }


def scaled_noise(factor: float) -> Callable[..., torch.Tensor]:
    """`noise_on_grid` with another standard deviation."""

    def noise(keys: torch.Tensor, columns: int, standard_deviations: torch.Tensor, bits: int, secure: bool):
        return noise_on_grid(keys, columns, factor * standard_deviations, bits, secure)

    return noise


class SampleMechanism:
    """Sample-level privacy: a trial is a client's local training, and its release is the client's delta.

    Clients train side by side. Each client holds the same samples and has its own draws and noise. In a trial without
    the canary, the canary's gradient is zero. The canary is of class 1. All other samples are of class 0, which the
    head predicts from the start, so their gradients vanish.
    """

    level = "sample"
    SAMPLES, BATCH = 6, 2
    CLIENTS, LANES, SLOTS = 256, 64, 96
    IGNORED = -100
    """cross_entropy's `ignore_index`: the label of a sample whose gradient is zero."""
    CERTAINTY = 20.0
    """The head's bias for class 0, in logits."""

    def __init__(self, runtime: Runtime, seed: int):
        everything = mock.patch.object(PoissonBatches, "draw", lambda _, samples, key: samples)
        self.faults = make_faults(gradients, everything)
        client = {"steps": STEPS, "batch_size": self.BATCH}
        self.config = make_config(seed, self.level, self.CLIENTS, client, {"rounds": 1, "cohort": self.CLIENTS})
        self.model, self.runtime = build_lane_model(self.config, self.config.data.classes), runtime
        partition = SharedPoolPartition(self.CLIENTS, self.SAMPLES, self.SAMPLES)
        participation = Participation(self.config, partition, NO_TRAFFIC)
        self.plan = make_privacy_plan(self.config, participation)
        self.claimed_epsilon = self.plan.epsilon(1)
        steps = participation.plan(0).steps
        self.tasks = [ClientTask(k, partition.indices(k), steps[k], partition.size(k)) for k in range(self.CLIENTS)]
        self.vector = self.model.initial_vector()
        self.model.layout.split(self.vector)["head.bias"][0] += self.CERTAINTY
        self.rounds = count()
        with mock.patch.object(gradients, "noise_on_grid", scaled_noise(0.0)):
            signal = sum(islice(self._deltas(is_present=True), self.CLIENTS))
        self.direction = signal / signal.norm()

    def scores(self, is_present: bool, num_trials: int) -> np.ndarray:
        return np.array([float(delta @ self.direction) for delta in islice(self._deltas(is_present), num_trials)])

    def _deltas(self, is_present: bool) -> Iterator[torch.Tensor]:
        """An endless sequence of deltas, one for each trial: float64 [P]."""
        trainer = self._trainer(is_present)
        for round_number in self.rounds:
            updates = trainer.train(self.tasks, RoundStart(round_number, self.vector))
            # Not as they come: a client with small batches is done sooner, and the last round may be cut short.
            for update in sorted(updates, key=lambda update: update.client):
                yield update.delta.double()

    def _trainer(self, is_present: bool) -> Trainer:
        config, backbone = self.config, self.model.backbone
        size = (self.SAMPLES, backbone.channels, config.data.image_size, config.data.image_size)
        pixels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(config.seed), dtype=torch.uint8)
        labels = torch.zeros(self.SAMPLES, dtype=torch.int64)
        labels[CANARY] = 1 if is_present else self.IGNORED
        place = (backbone.channels, backbone.mean, backbone.std, self.runtime.device)
        store = DeviceStore(ImageSet(pixels, labels), lambda images, keys: images, *place)
        batches = PoissonBatches(self.BATCH, config.seed)
        rule = NoisyGradient(
            self.model.layout,
            self.LANES,
            self.SLOTS,
            privacy=config.privacy,
            batches=batches,
            noise_multipliers=self.plan.noise_multipliers,
            largest_client=self.SAMPLES,
            runtime=self.runtime,
        )
        schedule = Schedule(self.LANES, batches, config.seed, self.SLOTS)
        return Trainer(self.model, store, config.client, self.runtime, schedule=schedule, rule=rule)


class UserMechanism:
    """User-level privacy: a trial is a few rounds, and its releases are their noisy means.

    Cohorts are drawn and deltas are summed as in a run. A client may send any delta, so the deltas are made up. The
    delta of the canary is far too long; the other deltas are at right angles to it. A trial without the canary leaves
    its delta out.
    """

    level = "user"
    CLIENTS, COHORT = 3, 1
    P = 64
    CANARY_NORM, OTHER_NORM = 8.0 * CLIP_NORM, 0.5 * CLIP_NORM

    def __init__(self, runtime: Runtime, seed: int):
        everyone = mock.patch.object(Participation, "select", lambda self, number: np.arange(self.population))
        self.faults = make_faults(user_level, everyone)
        federation = {"rounds": STEPS, "cohort": self.COHORT, "participation": {"name": "poisson"}}
        self.config, self.runtime = make_config(seed, self.level, self.CLIENTS, {}, federation), runtime
        self.participation = Participation(self.config, SharedPoolPartition(self.CLIENTS, 1, 1), NO_TRAFFIC)
        self.plan = make_privacy_plan(self.config, self.participation)
        self.claimed_epsilon = self.plan.epsilon(STEPS)
        self.deltas = torch.randn(self.CLIENTS, self.P, generator=torch.Generator().manual_seed(seed))
        self.deltas[:, 0] = 0.0
        self.deltas *= self.OTHER_NORM / self.deltas.norm(dim=1, keepdim=True)
        self.deltas[CANARY] = self.CANARY_NORM * torch.eye(self.P)[0]
        self.rounds = count()
        server = make_server_optimizer(self.config.server.optimizer)
        federation = Federation(self.P, self.CLIENTS, runtime.device, server, client_lr=1.0)
        self.algorithm = make_algorithm(self.config, federation)
        self.rule = NoisyMean(
            self.config.privacy,
            clip_norm=CLIP_NORM,
            largest_cohort=self.CLIENTS,
            expected_cohort=self.COHORT,
            noise_multiplier=self.plan.delta_noise_multiplier,
            count_noise=self.plan.count_noise,
            noise_seed=seed,
        )

    def scores(self, is_present: bool, num_trials: int) -> np.ndarray:
        releases = (self._release(next(self.rounds), is_present) for _ in range(num_trials * STEPS))
        return np.fromiter(releases, dtype=np.float64).reshape(num_trials, STEPS).sum(axis=1)

    def _release(self, round_number: int, is_present: bool) -> float:
        """The part of a round's mean in the canary's direction."""
        state = State(round_number, torch.zeros(self.P), server={}, algorithm={})
        aggregation = Aggregation(self.algorithm, state, 1.0, self.CLIENTS, self.rule)
        for client in self.participation.plan(round_number).steps:
            if is_present or client != CANARY:
                aggregation.add(ClientUpdate(client, 1, self.deltas[client], torch.tensor(0.0), 1, 1))
        aggregation.add_noise(round_number)
        return float(aggregation.total(aggregation.sums).mean[0])


def make_config(seed: int, privacy: str, clients: int, client: dict[str, Any], federation: dict[str, Any]) -> RunConfig:
    """A config of clients that, if they train at all, take plain steps with the head of a tiny ViT."""
    tiny = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    sgd = {"name": "sgd", "lr": 1.0e-3, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    data = {"name": "synthetic", "classes": 4, "image_size": 16, "clients": clients, "partition": {"name": "iid"}}
    noise = {"clip_norm": CLIP_NORM, "noise_multiplier": NOISE_MULTIPLIER, "dp_delta": DP_DELTA}
    tree = {
        "seed": seed,
        "backbone": {"name": "vit_tiny_patch16_224", "pretrained": False, "model_args": tiny},
        "method": {"name": "head"},
        "data": data,
        "federation": federation,
        "client": {**client, "optimizer": sgd},
        "privacy": {"name": privacy, **noise},
        "runtime": {"device": "cpu"},
    }
    return parse_config(tree, "audit")


def lower_bound(absent: np.ndarray, present: np.ndarray, dp_delta: float, confidence: float = CONFIDENCE) -> float:
    """A lower bound on the epsilon of any mechanism that is (epsilon, dp_delta)-differentially private.

    The attacker's rule is a threshold and the case to look for (with or without the canary). A quarter of the trials
    chooses the rule, and the other trials bound it. So the bound holds with this confidence, whatever the choice.

    Args:
        absent: scores of independent trials without the canary: float64 [n].
        present: scores of as many independent trials with the canary: float64 [n].
    """
    learn, best = len(absent) // 4, -1.0
    for negatives, positives in ((absent, present), (-present, -absent)):
        quantiles = np.quantile([negatives[:learn], positives[:learn]], np.linspace(0, 1, 201))
        for threshold in np.unique(quantiles):
            found = threshold_bound(negatives[:learn] > threshold, positives[:learn] > threshold, dp_delta, confidence)
            if found > best:
                best, guesses = found, (negatives[learn:] > threshold, positives[learn:] > threshold)
    return threshold_bound(*guesses, dp_delta, confidence)


def threshold_bound(negatives: np.ndarray, positives: np.ndarray, dp_delta: float, confidence: float) -> float:
    """ln((TPR - dp_delta) / FPR), or 0, with Clopper and Pearson's bounds on both rates.

    Args:
        negatives: bool [n], the guesses of a fixed rule in trials where "no" is right.
        positives: bool [n], its guesses in trials where "yes" is right.
    """
    false, true, num_trials, error = negatives.sum(), positives.sum(), len(negatives), (1 - confidence) / 2
    most_false = beta.ppf(1 - error, false + 1, num_trials - false) if false < num_trials else 1.0
    least_true = beta.ppf(error, true, num_trials - true + 1) if true else 0.0
    return max(0.0, math.log((least_true - dp_delta) / most_false)) if least_true > dp_delta else 0.0


def audit(mechanism: Mechanism, case: str, num_trials: int) -> dict[str, Any]:
    """
    Args:
        case: `right` or the name of a fault.
        num_trials: the number of trials; half of them have the canary.
    """
    with mechanism.faults[case]:
        absent, present = (mechanism.scores(is_present, num_trials // 2) for is_present in (False, True))
    return {
        "case": f"{mechanism.level}, {case}",
        "claimed_epsilon": mechanism.claimed_epsilon,
        "dp_delta": DP_DELTA,
        "lower_bound": lower_bound(absent, present, DP_DELTA),
        "confidence": CONFIDENCE,
        "trials": len(absent) + len(present),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=14_000, help="trials of each case; half of them have the canary")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    is_sound = True
    with process.start(RuntimeConfig(device="cpu")) as runtime:
        for mechanism in (SampleMechanism(runtime, options.seed), UserMechanism(runtime, options.seed)):
            for case in mechanism.faults:
                found = audit(mechanism, case, options.trials)
                print(json.dumps(found), flush=True)
                keeps_claim = found["lower_bound"] <= found["claimed_epsilon"]
                is_sound = is_sound and keeps_claim == (case == RIGHT)
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
