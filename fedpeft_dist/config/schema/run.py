"""A whole run, the rules that its sections must meet together, and its machine and files: `runtime` and `output`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpeft_dist.config.paths import RunName, UserPath, check_run_place
from fedpeft_dist.config.schema.algorithm import AlgorithmConfig, ClientConfig, FedAvgConfig, ServerConfig
from fedpeft_dist.config.schema.data import Cifar100Config, DataConfig
from fedpeft_dist.config.schema.federation import FederationConfig
from fedpeft_dist.config.schema.method import BackboneConfig, BiasConfig, MethodConfig
from fedpeft_dist.config.schema.privacy import NoPrivacy, PrivacyConfig
from fedpeft_dist.config.schema.types import Count, Section


class ShardingConfig(Section):
    """How the frozen backbone is spread over ranks. The ranks of a group keep one copy of it together."""

    size: Count = 1
    """Ranks of a group; 1 gives each rank the whole backbone. A multiple of it are the ranks of the run."""
    lanes: Literal["split", "shared"] = "split"
    """split: each rank of a group trains clients of its own. shared: the group trains the same clients, each rank a
    part of every batch, where even one rank's activations are too many."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank keeps its part of the weights: on its device, in the machine's memory, or in files."""
    nvme_path: UserPath | None = None
    """A folder for these files, on a fast local disk."""
    quantize: Literal["none", "int8"] = "none"
    """int8: keeps the weights of frozen linear layers as 8-bit integers with a scale for each output channel. They take
    a quarter of the memory of fp32, half of that of bf16, and as little to gather from a group. Results differ from
    those of whole weights, and are the same for every size and offload."""

    @property
    def is_on(self) -> bool:
        """Whether a rank gathers weights layer by layer instead of keeping them all on its device."""
        return self.size > 1 or self.offload != "none"

    def problems(self) -> dict[str, bool]:
        return {
            "offload: 'nvme' needs nvme_path, a folder on a local disk": self.offload == "nvme" and not self.nvme_path,
            f"nvme_path: {str(self.nvme_path)!r} goes with offload: nvme only, not {self.offload!r}": (
                self.offload != "nvme" and self.nvme_path is not None
            ),
            f"lanes: 'shared' needs a group of ranks; give size: 2 or more, not {self.size}": (
                self.lanes == "shared" and self.size == 1
            ),
        }


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the computation; auto: bf16 on CUDA, fp32 on the CPU."""
    lanes: Literal["auto"] | Count = "auto"
    """Clients that a rank trains side by side; auto: as many as its share of the cohort needs and memory allows."""
    products: Literal["auto", "torch", "onednn"] = "auto"
    """The library of linear layers, which changes results by rounding. auto: oneDNN in fp32 on AMD processors, else
    PyTorch's own choice. oneDNN is for fp32 on the CPU alone."""
    threads: Count = 1
    """CPU threads of each rank."""
    compile: bool = False
    """Compile the model with torch.compile, which may round differently; not for method full."""
    cache: Literal["auto", "none"] | Count = "auto"
    """Bytes of a rank for what the frozen layers in front of the first trained one give for each image, which is then
    computed once. auto: as the free memory of the device and of the machine, and then the disk, allow."""
    evaluate_batch: Count = 256
    sharding: ShardingConfig = ShardingConfig()
    """For backbones that are larger than a GPU, from about a billion parameters on."""
    verify: bool = False
    """Before the first round, check with the run's own lanes, batch and images that a client's gradient depends neither
    on its lane nor on its neighbours."""


class OutputConfig(Section):
    root: UserPath = "runs"
    """Folder of all runs, relative to the folder that the command runs in."""
    name: RunName | None = None
    """The run's folder below `root`, such as `lora4` or `ablation/lora4`; null: from the config and its path."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1
    """Rounds between two checkpoints; 0 writes one at the end only."""

    @model_validator(mode="after")
    def _place_leaves_room(self) -> "OutputConfig":
        check_run_place(self.root, self.name)
        return self


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0)] = 1
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = BiasConfig(name="bias")
    data: DataConfig = Cifar100Config(name="cifar100")
    federation: FederationConfig = FederationConfig()
    client: ClientConfig = ClientConfig()
    algorithm: AlgorithmConfig = FedAvgConfig(name="fedavg")
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = NoPrivacy(name="none")
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    def problems(self) -> dict[str, bool]:
        data, federation, partition = self.data, self.federation, self.data.partition.name
        clients, is_pool, is_held_out = data.clients, partition == "pool", data.validation > 0.0
        lists = [getattr(data, name, None) is None for name in ("train_list", "test_list")]
        unmet = "needs data.validation above 0.0 (the share held out from every client)"
        return {
            f"data.clients: null goes with the natural partition only; give a number for {partition!r}": (
                clients is None and partition != "natural"
            ),
            f"federation.cohort: {federation.cohort} is larger than the population, data.clients: {clients}; give at "
            f"most {clients}": clients is not None and federation.cohort > clients,
            **{
                f"data.{key}: [{low}, {high}] is no range; give the smaller number first": low > high
                for key, (low, high) in (("crop_scale", data.crop_scale), ("crop_ratio", data.crop_ratio))
            },
            "data.train_list and data.test_list go together: give both, or neither for a random split": (
                any(lists) and not all(lists)
            ),
            f"data.partition.name: 'pool' goes with synthetic data only, not {data.name!r}": (
                is_pool and data.name != "synthetic"
            ),
            "data.validation: a pool's clients share their samples, so none can be held out; give 0.0": (
                is_pool and is_held_out
            ),
            **self._privacy_problems(),
            **self.algorithm.conflicts(self),
            "runtime.compile: true does not go with method 'full', which runs under vmap; give false": (
                self.runtime.compile and self.method.name == "full"
            ),
            **self._sharding_problems(),
            f"federation.evaluate_on: validation {unmet}": not is_held_out and federation.evaluate_on == "validation",
            f"federation.evaluate_clients: true {unmet}": not is_held_out and federation.evaluate_clients,
        }

    def _sharding_problems(self) -> dict[str, bool]:
        runtime, where = self.runtime, f"runtime.sharding.size: {self.runtime.sharding.size}"
        if runtime.sharding.size == 1:
            where = f"runtime.sharding.offload: {runtime.sharding.offload}"
        is_on, is_shared = runtime.sharding.is_on, runtime.sharding.lanes == "shared"
        return {
            f"{where} does not go with method 'full', which has no frozen weights; give another method": (
                is_on and self.method.name == "full"
            ),
            f"{where} does not go with runtime.compile: true; give false": is_on and runtime.compile,
            "runtime.sharding.quantize: int8 does not go with method 'full', which has no frozen weights; give none": (
                runtime.sharding.quantize == "int8" and self.method.name == "full"
            ),
            "runtime.sharding.lanes: 'shared' does not go with privacy.name: sample, whose gradients are each one "
            "sample's; give split": is_shared and self.privacy.name == "sample",
        }

    def _privacy_problems(self) -> dict[str, bool]:
        privacy, participation, clip_norm = self.privacy, self.federation.participation, self.client.clip_norm
        is_sample, is_user = privacy.name == "sample", privacy.name == "user"
        surplus = "what surplus clients send would reach the server uncounted"
        reason = "who reports first is no random draw" if is_user else surplus
        sampling = getattr(privacy, "sampling", None)
        needed = {"poisson": "poisson", "without_replacement": "uniform"}.get(sampling)
        return {
            f"runtime.precision: fp16 does not go with privacy.name: {privacy.name}, for its loss scale and the steps "
            "that it skips depend on the data; give fp32, bf16 or auto": (
                self.runtime.precision == "fp16" and privacy.name != "none"
            ),
            f"client.clip_norm: {clip_norm} clips a batch's gradient, privacy.name: sample each sample's; give "
            "privacy.clip_norm, and client.clip_norm: null": is_sample and clip_norm is not None,
            "data.partition.name: pool does not go with privacy.name: sample, for its clients share their samples; "
            "give another partition": is_sample and self.data.partition.name == "pool",
            f"federation.participation.over_selection: {participation.over_selection} does not go with privacy.name: "
            f"{privacy.name}, for {reason}; give 1.0": (is_sample or is_user) and participation.over_selection != 1.0,
            f"output.checkpoint_every: {self.output.checkpoint_every} does not go with privacy.secure_noise: true, for "
            "rounds that are run again would draw new noise and count once; give 1": (
                getattr(privacy, "secure_noise", False) and self.output.checkpoint_every != 1
            ),
            f"federation.participation.name: {participation.name} does not go with privacy.name: user and "
            f"privacy.sampling: {sampling}; give federation.participation.name: poisson, or, to draw a fixed number at "
            "a larger epsilon, uniform with privacy.sampling: without_replacement": (
                is_user and participation.name != needed
            ),
        }
