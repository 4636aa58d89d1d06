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
from fedpeft_dist.config.schema import RunConfig, ShardingConfig
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
from fedpeft_dist.methods.quantized import quantize_frozen
from fedpeft_dist.methods.sharded import check_sharding, shard_model
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory
from fedpeft_dist.runtime.mesh import spread
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.runtime.sharding import ShardedBlocks
from fedpeft_dist.tracking.run_directory import RunDirectory
from fedpeft_dist.tracking.same_run import check_same
from fedpeft_dist.training.schedule import ClientTask

HOST = torch.device("cpu")
SHARDING_PAYS = 10**9
"""Parameters of a backbone from which sharding pays."""
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
        forget_peak_memory(HOST)
        self.model = build_lane_model(config, self.dataset.num_classes, deferred=runtime.mesh is not None)
        self.start = find_start(config, self.model)
        self.initial_vector = self.start.vector.to(runtime.device)
        self.quantized_weights = self._quantize()
        """The number of frozen weights that are kept as 8-bit integers."""
        freeze(self.model.backbone.model, runtime.compute_dtype, runtime.device)
        self.products = choose_products(config.runtime.products, runtime)
        """What `runtime.products` stands for."""
        if isinstance(self.model, VmapLaneModel):
            self._fit_to_cpu_lane_by_lane(self.model)
        else:
            self._fit_to_cpu(self.model.backbone.model)
        self.train_store, self.test_store = self._make_stores()
        self.weights: ShardedBlocks | None = None
        """The frozen weights that other ranks have parts of."""
        if runtime.mesh is not None:
            check_sharding(self.model, config.backbone.name)

    def share_weights(self) -> None:
        """Keeps this rank's part of the frozen weights, if sharding is on. Every rank must call it, once."""
        if self.runtime.mesh is not None:
            self.weights = shard_model(self.model, self.runtime)
            self.loading_peak = peak_memory(HOST)

    @property
    def sharding_figures(self) -> dict[str, int | str] | None:
        """How the frozen weights are spread, for the summary: bytes of all parts and of a rank's, and the most bytes
        that a process had on the host while they were loaded. None if each rank has all of them."""
        if self.weights is None:
            return None
        config = self.config.runtime.sharding
        return {
            "size": config.size,
            "lanes": config.lanes,
            "offload": config.offload,
            "weight_bytes": self.weights.all_bytes,
            "rank_bytes": self.weights.own_bytes,
            "loading_peak_bytes": self.loading_peak,
        }

    @property
    def sharding_notes(self) -> list[str]:
        """What the log says of the figures, and whether sharding pays."""
        figures = self.sharding_figures
        if figures is None:
            return []
        rank, whole, peak = (figures[f"{key}_bytes"] / 2**20 for key in ("rank", "weight", "loading_peak"))
        notes = [
            f"a rank keeps {rank:,.1f} of {whole:,.1f} MiB of frozen weights; loading took {peak:,.0f} MiB at most"
        ]
        size = self.model.backbone.num_parameters
        if size < SHARDING_PAYS:
            notes.append(
                f"the backbone has {size / 1e6:,.1f} million parameters; below about {SHARDING_PAYS / 1e9:.0f} "
                "billion, ranks that each keep all weights (runtime.sharding.size: 1) are faster"
            )
        return notes

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

    @property
    def padded_batches(self) -> int:
        """Batches of an evaluation that ranks compute for nothing, to stay in step."""
        validation = self.validation_evaluator.all_padded if self._needs_validation else 0
        return validation + (self.test_evaluator.all_padded if self.config.federation.evaluate_on == "test" else 0)

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

    def _quantize(self) -> int:
        sharding, backbone = self.config.runtime.sharding, self.model.backbone
        if sharding.quantize == "none":
            return 0
        count = quantize_frozen(backbone.model, backbone.plain, self.runtime.compute_dtype)
        if not count:
            kind, name = type(backbone.model).__name__, self.config.method.name
            raise ConfigError(
                f"runtime.sharding.quantize: {sharding.quantize} finds no linear layer of {kind} that method {name!r} "
                "leaves frozen; give none"
            )
        return count

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
        if not can_merge(method, self.runtime, are_plain=self.weights is None and not self.quantized_weights):
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
    sharding = config.runtime.sharding
    if runtime.world_size % sharding.size:  # a run of many ranks may be evaluated by one
        sharding = ShardingConfig()
    with spread(runtime, sharding) as runtime:
        setup = Setup(with_values(config, "runtime", cache="none"), runtime)  # each image is looked at once
        check_same(metadata["backbone_sha256"], setup.model.backbone.sha256, directory.trainable_file, "backbone")
        try:
            vector = setup.model.layout.join(tensors)
        except ValueError as error:
            raise ConfigError(f"{directory.trainable_file}: {error}") from None
        setup.share_weights()
        return setup.evaluate(vector.to(runtime.device))
