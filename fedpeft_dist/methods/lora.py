"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of each transformer block, and the head.

    y = frozen(x) + alpha / rank * B(A(dropout(x)))

B starts at zero, so round 0 is the backbone.

Shapes: R rows, T tokens, D inputs, E outputs, r rank.
"""

import math
from typing import Any

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import LoraConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_linear
from fedpeft_dist.methods.blocks import Scope
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors

# The places of a target in a block: `proj` is the attention's, never the patch embedding's.
TARGETS = {
    "qkv": ("attn.qkv", "token_mixer.qkv", "xca.qkv"),
    "proj": ("attn.proj", "token_mixer.proj", "xca.proj"),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}

A, B = ".lora_A.weight", ".lora_B.weight"
"""The endings of the trained matrices' names, after the name of the linear layer."""


class LaneLora(LaneModule):
    """A frozen linear layer with each lane's own low-rank update beside it; [R, T, D] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, config: LoraConfig, device: torch.device):
        super().__init__()
        a = nn.init.kaiming_uniform_(torch.empty(config.rank, linear.in_features, device=device), a=math.sqrt(5))
        self.declare("a", name + A, a)
        self.declare("b", name + B, torch.zeros(linear.out_features, config.rank, device=device))
        self.linear = linear
        self.scale = config.alpha / config.rank
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(self.dropout(x), self.a) * self.scale  # scales `rank` columns, not all outputs
        return self.linear(x) + lane_linear(hidden, self.b)


class Lora(Method):
    config: LoraConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        scope, device = Scope(model, config.blocks), next(model.parameters()).device
        linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name in scope]
        layers = [(name, linear) for name, linear in linears if linear not in backbone.shared_layers]
        endings = {target: tuple(f".{place}" for place in TARGETS[target]) for target in config.targets}
        for target, ending in endings.items():
            if not any(f".{name}".endswith(ending) for name, _ in layers):
                sought = f"{target!r} matches no linear layer ({' or '.join(TARGETS[target])})"
                raise ConfigError(f"method.targets: {sought} in {type(model).__name__}")
        for name, linear in layers:
            if f".{name}".endswith(sum(endings.values(), ())):
                model.set_submodule(name, LaneLora(name, linear, config, device))
                attention = model.get_submodule(name.rpartition(".")[0])
                if name.endswith("qkv") and hasattr(attention, "qkv_bias_separate"):
                    attention.qkv_bias_separate = True  # BEiT, EVA and SwinV2 would read only the frozen weight
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Adds the matrices' products to the weights, in float64."""
        merged, scale = dict(backbone), self.config.alpha / self.config.rank
        for name, tensor in trained.items():
            if name.endswith(A):
                layer = name.removesuffix(A)
                weight, product = backbone[f"{layer}.weight"], trained[layer + B].double() @ tensor.double()
                merged[f"{layer}.weight"] = (weight.double() + scale * product).to(weight.dtype)
            elif not name.endswith(B):
                merged[name] = tensor
        return merged

    def to_peft(self, model: nn.Module, trained: Tensors) -> tuple[dict[str, Any], Tensors]:
        """
        Raises:
            ConfigError: the model reads a layer's weight by itself, so peft could not replace the layer.
        """
        config = self.config
        if "qkv" in config.targets and any(getattr(m, "q_bias", None) is not None for m in model.modules()):
            raise ConfigError(
                f"--format peft: {type(model).__name__} reads the weight of qkv itself and would pass peft's layer by; "
                "give --format timm or safetensors"
            )
        return {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": [name.removesuffix(A) for name in trained if name.endswith(A)],
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
        }, trained
