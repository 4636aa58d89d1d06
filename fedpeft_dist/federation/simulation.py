"""Everything a run computes with, built once from its config: data, clients, model, trainer, evaluation.

Shapes: N clients, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.augment import make_transform
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.partition import IndexPartition, Partition, hold_out, make_partition
from fedpeft_dist.data.pixels import choose_resident
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.federation.aggregation import Aggregator
from fedpeft_dist.federation.evaluation import Evaluator, client_accuracies
from fedpeft_dist.federation.user_aggregation import UserAggregator
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy.noise_seed import derive_noise_seed, draw_noise_seed
from fedpeft_dist.runtime.collectives import min_over_ranks
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.run_directory import RunDirectory, check_same_backbone
from fedpeft_dist.training.lane_count import choose_lanes, choose_private_lanes, choose_slots
from fedpeft_dist.training.lane_schedule import ClientTask
from fedpeft_dist.training.local_training import LocalTrainer
from fedpeft_dist.training.private_training import PrivateTrainer

if TYPE_CHECKING:
    from fedpeft_dist.privacy.plan import PrivacyPlan


class Simulation:
    """
    Raises:
        ConfigError: data that cannot be read, a partition that cannot be, a method that does not fit.
    """

    def __init__(self, config: RunConfig, runtime: Runtime):
        self.config, self.runtime = config, runtime
        self.dataset = load_dataset(config.data, derive_seed(config.seed, "data"))
        self.data_sha256 = self.dataset.fingerprint()
        self.partition, self.held_out = make_clients(config, self.dataset.train)
        if config.federation.cohort > self.partition.num_clients:
            raise ConfigError(
                f"federation.cohort: {config.federation.cohort} is larger than the population of "
                f"{self.partition.num_clients} clients"
            )
        self.largest_client = self.partition.largest_total(1)
        """Samples of the largest client."""
        self.batch_size = min(config.client.batch_size, self.largest_client)
        """B, the samples of a lane in a step. No batch has more than the population's largest client, so the bound is
        the same on every rank, in every round and on resume."""
        self.model = build_lane_model(config, self.dataset.num_classes)
        self.initial_vector = self.model.initial_vector().to(runtime.device)
        freeze(self.model.backbone.model, runtime.compute_dtype, runtime.device)
        self.train_store, self.test_store = self._make_stores()
        self.privacy_plan: PrivacyPlan | None = None
        self.noise_seed: int | None = None

    @cached_property
    def lanes(self) -> int:
        """L, as configured or, for auto, as the shard needs and the memory allows."""
        if self.config.runtime.lanes != "auto":
            return self.config.runtime.lanes
        needed = -(-self.config.federation.cohort // self.runtime.world_size)
        if self.config.privacy.name == "sample":
            lanes = choose_private_lanes(needed, self.model, self.runtime)
        else:
            lanes = choose_lanes(needed, self.batch_size, self.model, self.train_store, self.runtime)
        return min_over_ranks(lanes, self.runtime)

    @cached_property
    def slots(self) -> int:
        """R, the samples that share a pass under sample-level privacy, as configured or as the memory allows."""
        if self.config.privacy.slots != "auto":
            return self.config.privacy.slots
        slots = choose_slots(self.lanes, self.batch_size, self.model, self.train_store, self.runtime)
        return min_over_ranks(slots, self.runtime)

    def plan_privacy(self, noise_multipliers: torch.Tensor | None = None) -> None:
        """Makes `privacy_plan`, which training needs.

        Args:
            noise_multipliers: those that the run has begun with, which stay.

        Raises:
            ConfigError: a target that cannot be met.
        """
        if self.config.privacy.name not in ("none", "paper_noise"):
            from fedpeft_dist.privacy.plan import make_privacy_plan  # dp-accounting takes a second

            self.privacy_plan = make_privacy_plan(self.config, self.participation, noise_multipliers)

    def seed_noise(self, config: RunConfig, stored: int | None = None) -> None:
        """Makes `noise_seed`, where privacy is accounted for; every rank must call it.

        Args:
            config: with what `auto` stood for.
            stored: what the run has begun with.
        """
        if self.privacy_plan is None:
            return
        if stored is not None:
            self.noise_seed = stored
        elif config.privacy.secure_noise:
            self.noise_seed = draw_noise_seed(self.runtime)
        else:
            digests = (self.data_sha256, self.model.backbone.sha256, self.participation.sha256)
            noise = self.privacy_plan.noise_multipliers
            self.noise_seed = derive_noise_seed(config, digests, self.dataset.train, noise, self.runtime)
        if config.privacy.name == "user":  # whose cohorts are secret, and no other run's
            self.participation.draw_cohorts_from(derive_seed(self.noise_seed, "cohorts"))

    def make_aggregator(self) -> Aggregator:
        """What sums the updates of this run's rounds."""
        config, size = self.config, self.model.layout.num_parameters
        if config.privacy.name != "user":
            return Aggregator(size, self.participation.largest_weight, self.runtime)
        cohort, plan = config.federation.cohort, self.privacy_plan
        largest = self.participation.population if config.privacy.sampling == "poisson" else cohort
        noise = (plan.delta_noise_multiplier, plan.count_noise)
        return UserAggregator(size, largest, cohort, config.privacy, *noise, self.runtime, self.noise_seed)

    @cached_property
    def participation(self) -> Participation:
        """Reads traces, which an evaluation has no need of.

        Raises:
            ConfigError: a trace that cannot be read, a cohort or a deadline that cannot be.
        """
        participation = Participation(
            self.config, self.partition, self.model.layout.num_parameters * BYTES_PER_PARAMETER
        )
        participation.check()
        return participation

    @cached_property
    def trainer(self) -> LocalTrainer | PrivateTrainer:
        config, privacy = self.config, self.config.privacy
        work = (self.model, self.train_store, config.client.model_copy(update={"batch_size": self.batch_size}))
        place = (self.runtime, config.seed)
        compiled = {"compile_model": config.runtime.compile}
        if privacy.name == "sample":
            noise, largest = self.privacy_plan.noise_multipliers, self.largest_client
            own = (self.noise_seed, self.lanes, min(self.slots, self.lanes * largest))
            return PrivateTrainer(*work, privacy, noise, largest, *place, *own, **compiled)
        noise = privacy.standard_deviation if privacy.name == "paper_noise" else 0.0
        return LocalTrainer(*work, *place, self.lanes, **compiled, gradient_noise=noise)

    @cached_property
    def test_evaluator(self) -> Evaluator:
        return self._evaluator(self.test_store, torch.arange(len(self.test_store)))

    @cached_property
    def validation_evaluator(self) -> Evaluator:
        """On what the clients hold out of their own samples."""
        assert self.held_out is not None
        return self._evaluator(self.train_store, self.held_out.samples)

    @property
    def recipe(self) -> ImageRecipe:
        """How pictures become the backbone's input."""
        own = self.model.backbone
        return ImageRecipe.of(self.config.data, own.interpolation, own.mean, own.std, self.dataset.cropped)

    def evaluate(self, vector: torch.Tensor, is_dropped: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Accuracy of a global vector [P] on what `federation.evaluate_on` names, and the clients' own on request.

        Args:
            is_dropped: asked once in a while, whether to break off.

        Raises:
            StoppedEarlyError: on every rank, where any of them has broken off.
        """
        federation = self.config.federation
        metrics = {}
        if federation.evaluate_on == "validation" or federation.evaluate_clients:
            correct = self.validation_evaluator.correct(vector, is_dropped)
            metrics["accuracy"] = float(correct.sum()) / len(correct)
            if federation.evaluate_clients:
                metrics |= client_accuracies(correct, self.held_out.offsets)
        if federation.evaluate_on == "test":
            metrics["accuracy"] = self.test_evaluator.accuracy(vector, is_dropped)
        return metrics

    def tasks(self, clients: Sequence[int], steps: Mapping[int, int] | None = None) -> list[ClientTask]:
        """What these clients have to do in a round; steps: how many each takes, where it is not all of its own."""
        sizes = {client: self.partition.size(client) for client in clients}
        if steps is None:
            steps = {client: self.config.client.num_steps(size) for client, size in sizes.items()}
        return [ClientTask(client, self.partition.indices(client), steps[client], sizes[client]) for client in clients]

    def _make_stores(self) -> list[DeviceStore]:
        """Of the training and the test images; after the model is on the device, and before lanes share the rest."""
        backbone, splits, device = self.model.backbone, [self.dataset.train, self.dataset.test], self.runtime.device
        transform = make_transform(self.config.data, backbone.interpolation)
        return [
            DeviceStore(images, transform, backbone.channels, backbone.mean, backbone.std, device, resident)
            for images, resident in zip(splits, choose_resident(splits, device))
        ]

    def _evaluator(self, store: DeviceStore, samples: torch.Tensor) -> Evaluator:
        return Evaluator(self.model, store, samples, self.config.runtime.evaluate_batch, self.runtime)


def make_clients(config: RunConfig, train: ImageSet) -> tuple[Partition, IndexPartition | None]:
    """The clients' training samples and, where the config holds some out, their validation samples."""
    partition = make_partition(config.data, train, config.seed)
    if not config.data.validation:
        return partition, None
    assert isinstance(partition, IndexPartition)
    kept, held_out = hold_out(partition, config.data.validation, config.seed)
    if not len(held_out.samples):
        raise ConfigError(f"data.validation: {config.data.validation} holds no sample out of any client; give more")
    return kept, held_out


def evaluate_run(config: RunConfig, directory: RunDirectory, runtime: Runtime) -> dict[str, float]:
    """Evaluates what a run has trained, as the run itself does.

    Raises:
        ConfigError: the parameters cannot be read, or are not those of the config's method and backbone.
    """
    tensors, metadata = directory.read_trainable()
    simulation = Simulation(config, runtime)
    check_same_backbone(metadata["backbone_sha256"], simulation.model.backbone.sha256, directory.trainable_file)
    try:
        vector = simulation.model.layout.join(tensors)
    except ValueError as error:
        raise ConfigError(f"{directory.trainable_file}: {error}") from None
    return simulation.evaluate(vector.to(runtime.device))
