"""What a config sets up on a rank: data, clients, model, images on the device, and their evaluation.

Shapes: P trainable parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.augment import make_transform
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.partition import IndexPartition, Partition, hold_out, make_partition
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.data.store import DeviceStore, choose_resident
from fedpeft_dist.federation.evaluation import Evaluator, client_accuracies, own_batches
from fedpeft_dist.federation.prefix_cache import Feed, PrefixCache
from fedpeft_dist.federation.start import find_start
from fedpeft_dist.lanes.attention import use_plain_attention
from fedpeft_dist.lanes.onednn import choose_products, use_onednn
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.methods import build_lane_model, make_method
from fedpeft_dist.methods.lane_model import LaneModel, VmapLaneModel
from fedpeft_dist.methods.merged import MergedModel, can_merge
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.run_directory import RunDirectory
from fedpeft_dist.tracking.same_run import check_same
from fedpeft_dist.training.schedule import ClientTask

LANE_BY_LANE = 500_000
"""Parameters of a model from which full fine-tuning goes through its lanes one by one, if oneDNN computes."""


class Setup:
    """
    Raises:
        ConfigError: the data cannot be read, the partition is impossible, or the method does not fit the backbone or
            the folder of `method.init`.
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
        """Samples of the population's largest client."""
        self.batch_size = min(config.client.batch_size, self.largest_client)
        """B, the samples of a lane in a step. No batch has more than the population's largest client, so the bound is
        the same on every rank, in every round and on resume."""
        self.model = build_lane_model(config, self.dataset.num_classes)
        self.start = find_start(config, self.model)
        self.initial_vector = self.start.vector.to(runtime.device)
        freeze(self.model.backbone.model, runtime.compute_dtype, runtime.device)
        self.products = choose_products(config.runtime.products, runtime)
        """What `runtime.products` stands for."""
        if isinstance(self.model, VmapLaneModel):
            self._fit_to_cpu_lane_by_lane(self.model)
        else:
            self._fit_to_cpu(self.model.backbone.model)
        self.train_store, self.test_store = self._make_stores()

    @cached_property
    def cache(self) -> PrefixCache:
        return PrefixCache(self.config, self.model, self.runtime)

    @cached_property
    def training(self) -> Feed:
        """What clients train, and on what."""
        store = self.train_store
        return self.cache.feed(store, len(store), "training images", self.config.data.augment)

    @cached_property
    def test_evaluator(self) -> Evaluator:
        return self._evaluator(self.test_store, torch.arange(len(self.test_store)), "test images")

    @cached_property
    def validation_evaluator(self) -> Evaluator:
        """Evaluates on the samples that clients hold out of their own."""
        assert self.held_out is not None
        return self._evaluator(self.train_store, self.held_out.samples, "validation images")

    @property
    def recipe(self) -> ImageRecipe:
        """How pictures become the backbone's input."""
        own = self.model.backbone
        return ImageRecipe.of(self.config.data, own.interpolation, own.mean, own.std, self.dataset.cropped)

    def evaluate(self, vector: torch.Tensor, is_dropped: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Accuracy of a global vector [P] on the images that `federation.evaluate_on` names, and the clients' own.

        Args:
            is_dropped: asked once in a while, whether to break off.

        Raises:
            StoppedEarlyError: on every rank, if any of them has broken off.
        """
        federation, metrics = self.config.federation, {}
        if self._needs_validation:
            correct = self.validation_evaluator.correct(vector, is_dropped)
            metrics["accuracy"] = float(correct.sum()) / len(correct)
            if federation.evaluate_clients:
                metrics |= client_accuracies(correct, self.held_out.offsets)
        if federation.evaluate_on == "test":
            metrics["accuracy"] = self.test_evaluator.accuracy(vector, is_dropped)
        return metrics

    def tasks(self, clients: Sequence[int], steps: Mapping[int, int] | None = None) -> list[ClientTask]:
        """The clients' work in a round; steps are the local steps of each, None means all of their own."""
        sizes = {client: self.partition.size(client) for client in clients}
        if steps is None:
            steps = {client: self.config.client.num_steps(size) for client, size in sizes.items()}
        return [ClientTask(client, self.partition.indices(client), steps[client], sizes[client]) for client in clients]

    @property
    def cache_notes(self) -> list[str]:
        """Why the frozen prefix is computed again and again, for training or for evaluation."""
        _ = self.training
        _ = self.validation_evaluator if self._needs_validation else None
        _ = self.test_evaluator if self.config.federation.evaluate_on == "test" else None
        return self.cache.notes

    @property
    def _needs_validation(self) -> bool:
        return self.config.federation.evaluate_on == "validation" or self.config.federation.evaluate_clients

    def _make_stores(self) -> list[DeviceStore]:
        """The training and the test images. The model is on the device already, and lanes share what is left."""
        backbone, splits, device = self.model.backbone, [self.dataset.train, self.dataset.test], self.runtime.device
        transform = make_transform(self.config.data, backbone.interpolation)
        return [
            DeviceStore(images, transform, backbone.channels, backbone.mean, backbone.std, device, resident)
            for images, resident in zip(splits, choose_resident(splits, device, self.runtime.launch.gpu_sharers))
        ]

    def _fit_to_cpu(self, model: nn.Module, is_trained: bool = False) -> None:
        """Makes a frozen model's layers compute in the way that is fastest on a CPU, if it is on one."""
        if self.runtime.device.type == "cpu":
            use_plain_attention(model, self.runtime.compute_dtype)
            if self.products == "onednn":
                use_onednn(model, is_trained)

    def _fit_to_cpu_lane_by_lane(self, model: VmapLaneModel) -> None:
        """Large products are faster by oneDNN, one lane after another. Small ones are faster under vmap."""
        if self.products == "onednn" and model.layout.num_parameters >= LANE_BY_LANE:
            self._fit_to_cpu(model.backbone.model, is_trained=True)
            model.lane_by_lane = True

    @cached_property
    def _merged(self) -> LaneModel:
        """The model to evaluate with where the whole one runs: without lanes, if its method allows that."""
        method = make_method(self.config.method)
        if not can_merge(method, self.runtime):
            return self.model
        return MergedModel(self.model, method, self.runtime, self._fit_to_cpu)

    def _evaluator(self, store: DeviceStore, samples: torch.Tensor, what: str) -> Evaluator:
        batch_size = self.config.runtime.evaluate_batch
        own = len(own_batches(len(samples), batch_size, self.runtime)) * batch_size
        feed = self.cache.feed(store, min(own, len(samples)), what)
        model = self._merged if feed.model is self.model else feed.model
        return Evaluator(model, feed.store, samples, batch_size, self.runtime)


def make_clients(config: RunConfig, train: ImageSet) -> tuple[Partition, IndexPartition | None]:
    """The clients' training samples and, if the config holds some out, their validation samples."""
    partition = make_partition(config.data, train, config.seed)
    if not config.data.validation:
        return partition, None
    assert isinstance(partition, IndexPartition)
    kept, held_out = hold_out(partition, config.data.validation, config.seed)
    if not len(held_out.samples):
        raise ConfigError(f"data.validation: {config.data.validation} holds no sample out of any client; give more")
    return kept, held_out


def evaluate_run(config: RunConfig, directory: RunDirectory, runtime: Runtime) -> dict[str, float]:
    """Evaluates the parameters that a run has trained, as the run itself does.

    Raises:
        ConfigError: the parameters cannot be read, or belong to another method or backbone.
    """
    tensors, metadata = directory.read_trainable()
    config = with_values(config, "method", init=None)  # what the run has trained replaces it
    setup = Setup(with_values(config, "runtime", cache="none"), runtime)  # each image is looked at once
    check_same(metadata["backbone_sha256"], setup.model.backbone.sha256, directory.trainable_file, "backbone")
    try:
        vector = setup.model.layout.join(tensors)
    except ValueError as error:
        raise ConfigError(f"{directory.trainable_file}: {error}") from None
    return setup.evaluate(vector.to(runtime.device))
