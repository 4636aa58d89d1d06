"""FacT (Jie and Deng 2023, arXiv 2212.03145): the updates of all linear layers as one factorised tensor, and the head.

The weights of all layers are cut into N pieces of D x D, D being the width of a block: qkv has 3, proj 1, fc1 and fc2
have 4 each. The update of piece n is s V M_n U, with U [r, D] and V [D, r] for all pieces and M_n [r, r] of its own:

    fact_tt  a tensor train; each M_n is trained
    fact_tk  Tucker's form; M_n = sum over k of P[n, k] C[k], with one core C [r, r, r]

V starts at zero, so round 0 is the backbone. The other factors start as in the paper's code. That code has a dropout of
0.1 in front of V, and a scale s for each data set; here `dropout` is 0 and `scale` is 1 by default.

Parameters: fact_tt 2 D r + N r^2; fact_tk 2 D r + N r + r^3. ViT of L blocks: N = 12 L. ViT-B/16: fact_tt of rank 16
61,440; fact_tk of rank 32 86,528.

Shapes: L lanes, R rows, T tokens, D width, i and e pieces of inputs and of outputs, n = e * i, r rank.
"""

import math

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import FactTkConfig, FactTtConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_linear
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors
from fedpeft_dist.methods.targets import find_targets, replace_layer

U, V, CORE = "fact.u", "fact.v", "fact.core"
PIECES = ".fact_pieces"
"""The ending of the name of what a layer's pieces have of their own: their M_n, or their rows of P."""


class Factors(LaneModule):
    """The factors that all layers share. The layers compute with them; nothing calls this module."""

    def __init__(self, config: FactTtConfig | FactTkConfig, width: int, device: torch.device):
        super().__init__()
        rank = config.rank
        self.declare("u", U, nn.Linear(width, rank, bias=False, device=device).weight)
        self.declare("v", V, torch.zeros(width, rank, device=device))
        self.core = None
        if isinstance(config, FactTkConfig):
            core = nn.init.xavier_uniform_(torch.empty(rank, rank, rank, device=device))
            self.declare("core", CORE, core)


class LaneFact(LaneModule):
    """A frozen linear layer beside the path through the factors; [R, T, i * D] to [R, T, e * D]."""

    def __init__(self, name: str, linear: nn.Linear, factors: Factors, initial: torch.Tensor, config: FactTtConfig):
        super().__init__()
        self.declare("pieces", name + PIECES, initial)
        width = len(factors.declared["v"][1])
        self.inputs, self.outputs = linear.in_features // width, linear.out_features // width
        self.linear, self.factors, self.scale = linear, factors, config.scale
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(x.unflatten(-1, (self.inputs, -1)), self.factors.u).flatten(-2)
        hidden = self.dropout(lane_linear(hidden, self.matrix())) * self.scale
        update = lane_linear(hidden.unflatten(-1, (self.outputs, -1)), self.factors.v)
        return self.linear(x) + update.flatten(-2)

    def matrix(self) -> torch.Tensor:
        """All M_n of the layer in one matrix: [L, e * r, i * r]."""
        pieces, core = self.pieces, self.factors.core
        if core is not None:
            pieces = torch.bmm(pieces, core.flatten(2)).unflatten(-1, core.shape[2:])
        return pieces.unflatten(1, (self.outputs, self.inputs)).transpose(2, 3).flatten(3).flatten(1, 2)


class Fact(Method):
    config: FactTtConfig | FactTkConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        linears = {name: model.get_submodule(name) for name in find_targets(backbone, config.targets, config.blocks)}
        width = self._width(linears, type(model).__name__)
        factors = Factors(config, width, device_of(next(iter(linears.values())).weight))
        counts = {name: linear.weight.numel() // width**2 for name, linear in linears.items()}
        for name, linear in linears.items():
            initial = self._initial_pieces(counts[name], sum(counts.values()), device_of(linear.weight))
            replace_layer(model, name, LaneFact(name, linear, factors, initial, config))
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Adds the products of the factors to the weights, in float64."""
        merged = dict(backbone)
        u, v = trained[U].double(), trained[V].double()
        for name, tensor in trained.items():
            if name.endswith(PIECES):
                weight, pieces = backbone[f"{name.removesuffix(PIECES)}.weight"], tensor.double()
                if CORE in trained:
                    pieces = torch.einsum("nk,kab->nab", pieces, trained[CORE].double())
                pieces = pieces.unflatten(0, (len(weight) // len(v), -1))
                update = torch.einsum("xa,eiab,by->exiy", v, pieces, u).reshape(weight.shape)
                merged[f"{name.removesuffix(PIECES)}.weight"] = (weight.double() + self.config.scale * update).to(
                    weight
                )
            elif name not in (U, V, CORE):
                merged[name] = tensor
        return merged

    def _initial_pieces(self, count: int, all_pieces: int, device: torch.device) -> torch.Tensor:
        rank = self.config.rank
        if isinstance(self.config, FactTkConfig):
            bound = math.sqrt(6 / (rank + all_pieces))  # Xavier's, for the whole of P
            return torch.empty(count, rank, device=device).uniform_(-bound, bound)
        bound = 1 / math.sqrt(rank)
        return torch.empty(count, rank, rank, device=device).uniform_(-bound, bound)

    def _width(self, linears: dict[str, nn.Linear], kind: str) -> int:
        """D.

        Raises:
            ConfigError: the blocks differ in width, or a layer's size is no multiple of it.
        """
        misfit = f"method.name: {self.config.name!r} does not fit {kind}: "
        ends = ("proj", "fc2")  # these layers end in the block's width, the others begin with it
        widths = {layer.out_features if name.endswith(ends) else layer.in_features for name, layer in linears.items()}
        if len(widths) > 1:
            raise ConfigError(f"{misfit}its blocks have the widths {sorted(widths)}; one tensor needs one width")
        (width,) = widths
        for name, layer in linears.items():
            if layer.in_features % width or layer.out_features % width:
                sizes = f"{layer.in_features} x {layer.out_features}"
                raise ConfigError(f"{misfit}{name} ({sizes}) cannot be cut into pieces of {width} x {width}")
        return width
