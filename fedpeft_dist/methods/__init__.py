"""PEFT methods. METHODS maps a method's config class to the method. No other list of methods exists."""

from dataclasses import replace

import torch

from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone
from fedpeft_dist.config.schema import MethodConfig, RunConfig, Section
from fedpeft_dist.config.schema import method as sections
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.methods.adapter import Adapter
from fedpeft_dist.methods.adaptformer import Adaptformer
from fedpeft_dist.methods.convpass import Convpass
from fedpeft_dist.methods.diffit import Diffit
from fedpeft_dist.methods.dora import Dora
from fedpeft_dist.methods.fact import Fact
from fedpeft_dist.methods.houlsby import Houlsby
from fedpeft_dist.methods.ia3 import Ia3
from fedpeft_dist.methods.in_place import Bias, Full, Head, Norm
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.methods.lora import Lora
from fedpeft_dist.methods.method import Method
from fedpeft_dist.methods.partial import Partial
from fedpeft_dist.methods.prefix import Prefix
from fedpeft_dist.methods.prompt import Prompt
from fedpeft_dist.methods.repadapter import Repadapter
from fedpeft_dist.methods.ssf import Ssf
from fedpeft_dist.methods.structure import check_backbone, check_structure, copy_model, find_shared_layers
from fedpeft_dist.methods.vera import Vera

METHODS: dict[type[Section], type[Method]] = {
    sections.FullConfig: Full,
    sections.HeadConfig: Head,
    sections.BiasConfig: Bias,
    sections.NormConfig: Norm,
    sections.PromptConfig: Prompt,
    sections.AdapterConfig: Adapter,
    sections.LoraConfig: Lora,
    sections.PartialConfig: Partial,
    sections.AdaptformerConfig: Adaptformer,
    sections.HoulsbyConfig: Houlsby,
    sections.RepadapterConfig: Repadapter,
    sections.DiffitConfig: Diffit,
    sections.ConvpassConfig: Convpass,
    sections.PrefixConfig: Prefix,
    sections.SsfConfig: Ssf,
    sections.Ia3Config: Ia3,
    sections.DoraConfig: Dora,
    sections.VeraConfig: Vera,
    sections.FactTtConfig: Fact,
    sections.FactTkConfig: Fact,
}


def make_method(config: MethodConfig) -> Method:
    """The method that a config section names."""
    return METHODS[type(config)](config)


def attach_method(
    backbone: Backbone, config: MethodConfig, seed: int, shared_layers: frozenset[str] | None = None
) -> LaneModel:
    """Changes the backbone in place into one that the method trains.

    Args:
        seed: for the method's own initial values. The global generator is not touched.
        shared_layers: what `find_shared_layers` finds in this backbone, if that is known.

    Raises:
        ConfigError: the method does not fit the backbone.
    """
    names = find_shared_layers(backbone) if shared_layers is None else shared_layers
    shared = frozenset(backbone.model.get_submodule(name) for name in names)
    backbone = replace(backbone, plain=copy_model(backbone.model), shared_layers=shared)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make_method(config).build(backbone)


def build_lane_model(config: RunConfig, num_classes: int, device: str = "cpu", deferred: bool = False) -> LaneModel:
    """The run's backbone with its method, on the CPU (or, for shapes alone, on "meta"), in float32.

    Args:
        deferred: leave the frozen matrices of the repeated blocks to `shard_model`.

    Raises:
        ConfigError: the backbone cannot be made, or the method does not fit it.
    """
    seed, own_seed = derive_seed(config.seed, "backbone"), derive_seed(config.seed, "method")

    def build(device: str) -> Backbone:
        later = deferred and device != "meta"
        return build_backbone(config.backbone, num_classes, config.data.image_size, seed, device, later)

    outline = build("meta")
    shared_layers = check_backbone(outline, config.backbone.name)
    model = attach_method(outline, config.method, own_seed, shared_layers)
    check_structure(model, config.method.name)
    return model if device == "meta" else attach_method(build(device), config.method, own_seed, shared_layers)
