"""A whole run, and the rules that its sections must meet together."""

from typing import Annotated

from pydantic import Field, model_validator

from fedpeft_dist.config.schema.algorithm import AlgorithmConfig, FedAvgConfig
from fedpeft_dist.config.schema.backbone import BackboneConfig
from fedpeft_dist.config.schema.client import ClientConfig
from fedpeft_dist.config.schema.data import Cifar100Config, DataConfig
from fedpeft_dist.config.schema.federation import FederationConfig
from fedpeft_dist.config.schema.method import BiasConfig, MethodConfig
from fedpeft_dist.config.schema.privacy import NoPrivacy, PrivacyConfig
from fedpeft_dist.config.schema.runtime import OutputConfig, RuntimeConfig
from fedpeft_dist.config.schema.server import ServerConfig
from fedpeft_dist.config.schema.types import Section


class RunConfig(Section):
    """A whole run."""

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

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        data, federation = self.data, self.federation
        if data.clients is None and data.partition.name != "natural":
            raise ValueError(
                f"data.clients: null goes with the natural partition only; give a number for {data.partition.name!r}"
            )
        if data.clients is not None and federation.cohort > data.clients:
            raise ValueError(
                f"federation.cohort: {federation.cohort} is larger than the population, data.clients: {data.clients}; "
                f"give at most {data.clients}"
            )
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(data, key)
            if low > high:
                raise ValueError(f"data.{key}: [{low}, {high}] is no range; give the smaller number first")
        if data.name == "resisc45" and (data.train_list is None) != (data.test_list is None):
            raise ValueError("data.train_list and data.test_list go together: give both, or neither for a random split")
        if data.partition.name == "pool" and data.name != "synthetic":
            raise ValueError(f"data.partition.name: 'pool' goes with synthetic data only, not {data.name!r}")
        if data.partition.name == "pool" and data.validation:
            raise ValueError("data.validation: a pool's clients share their samples, so none can be held out; give 0.0")
        self._check_privacy()
        self.algorithm.check(self)
        if self.runtime.compile and self.method.name == "full":
            raise ValueError("runtime.compile: true does not go with method 'full', which runs under vmap; give false")
        needs_validation = {
            "federation.evaluate_on: validation": federation.evaluate_on == "validation",
            "federation.evaluate_clients: true": federation.evaluate_clients,
        }
        for key, needed in needs_validation.items():
            if needed and data.validation == 0.0:
                raise ValueError(f"{key} needs data.validation above 0.0 (the share held out from every client)")
        return self

    def _check_privacy(self) -> None:
        privacy, participation = self.privacy, self.federation.participation
        if privacy.name == "none":
            return
        if self.runtime.precision == "fp16":
            raise ValueError(
                f"runtime.precision: fp16 does not go with privacy.name: {privacy.name}, for its loss scale and the "
                "steps that it skips depend on the data; give fp32, bf16 or auto"
            )
        if privacy.name == "sample" and self.client.clip_norm is not None:
            raise ValueError(
                f"client.clip_norm: {self.client.clip_norm} clips a batch's gradient, privacy.name: sample each "
                "sample's; give privacy.clip_norm, and client.clip_norm: null"
            )
        if privacy.name == "sample" and self.data.partition.name == "pool":
            raise ValueError(
                "data.partition.name: pool does not go with privacy.name: sample, for its clients share their samples; "
                "give another partition"
            )
        if privacy.name == "paper_noise":
            return
        if participation.over_selection != 1.0:
            reason = {
                "user": "who reports first is no random draw",
                "sample": "what surplus clients send would reach the server uncounted",
            }[privacy.name]
            raise ValueError(
                f"federation.participation.over_selection: {participation.over_selection} does not go with "
                f"privacy.name: {privacy.name}, for {reason}; give 1.0"
            )
        if privacy.secure_noise and self.output.checkpoint_every != 1:
            raise ValueError(
                f"output.checkpoint_every: {self.output.checkpoint_every} does not go with privacy.secure_noise: "
                "true, for rounds that are run again would draw new noise and count once; give 1"
            )
        if privacy.name != "user":
            return
        if participation.name != {"poisson": "poisson", "without_replacement": "uniform"}[privacy.sampling]:
            raise ValueError(
                f"federation.participation.name: {participation.name} does not go with privacy.name: user and "
                f"privacy.sampling: {privacy.sampling}; give federation.participation.name: poisson, or, to draw a "
                "fixed number at a larger epsilon, uniform with privacy.sampling: without_replacement"
            )
