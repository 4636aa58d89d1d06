"""Convpass (Jie & Deng 2022, arXiv 2207.07039): a convolutional bypass beside attention and MLP, and the head.

    n = norm(x);  x + attention(n) + scale * bypass(n), then the same with the MLP
    bypass(n) = up(gelu(conv(gelu(down(n)))))

`conv` is a 3 x 3 convolution over the grid of patch tokens. Each prefix token (class, distillation, registers) is an
image of one pixel to it. `up` and the biases start at zero, so round 0 is the backbone; `conv` starts as the identity.
A bypass has 2DH + 9H^2 + 2H + D parameters, L blocks 2L (2DH + 9H^2 + 2H + D), for width D and bottleneck H: 327,552 on
ViT-B/16 at H = 8.

The paper's code approximates GELU by x sigmoid(1.702 x). It drops 10 % of the hidden values, and draws the bypass's
drop-path apart from the branch's. Here they share drop-path and layer scale. The paper's variant for Swin is left out.

Shapes: L lanes, R rows, T tokens of which P are prefix tokens, D width, H bottleneck.
"""

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import ConvpassConfig
from fedpeft_dist.lanes.ops import lane_aligned, lane_linear
from fedpeft_dist.methods.blocks import Scope, find_branches
from fedpeft_dist.methods.bottleneck import ParallelLayer
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method

GRID_MODELS = (VisionTransformer, Eva, Beit)
"""Models whose blocks take the prefix tokens first and the patch tokens row by row after them."""
KERNEL = 3


class LaneConvpass(LaneModule):
    """scale * up(gelu(conv(gelu(down(x))))), with each lane's own tensors; [R, T, D] to [R, T, D].

    Args:
        grid: rows and columns of patch tokens.
        prefix: P.
    """

    def __init__(self, name: str, down: nn.Linear, grid: tuple[int, int], prefix: int, scale: float):
        super().__init__()
        hidden, width = down.weight.shape
        device = device_of(down.weight)
        conv = nn.init.dirac_(torch.empty(hidden, hidden, KERNEL, KERNEL, device=device))
        self.declare("down_weight", f"{name}.down.weight", nn.init.xavier_uniform_(down.weight))
        self.declare("down_bias", f"{name}.down.bias", nn.init.zeros_(down.bias))
        self.declare("conv_weight", f"{name}.conv.weight", conv)
        self.declare("conv_bias", f"{name}.conv.bias", torch.zeros(hidden, device=device))
        self.declare("up_weight", f"{name}.up.weight", torch.zeros(width, hidden, device=device))
        self.declare("up_bias", f"{name}.up.bias", torch.zeros(width, device=device))
        self.scale = scale
        for name, places in zip(("sources", "uses"), neighbourhoods(grid, prefix)):
            self.register_buffer(name, places.to(device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self._activate(lane_linear(x, self.down_weight, self.down_bias))
        around = Neighbours.apply(hidden, self.sources, self.uses).flatten(2)
        weight = self.conv_weight.flatten(3).mT.flatten(2)  # [L, H, 9H], by neighbour
        hidden = self._activate(lane_linear(around, weight, self.conv_bias))
        return lane_linear(hidden * self.scale, self.up_weight, self.up_bias * self.scale)

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        return lane_aligned(nn.functional.gelu, hidden, len(self.down_weight))


class Neighbours(torch.autograd.Function):
    """The values of each token's neighbours: [R, T, H] to [R, T, 9, H].

    Both passes gather, so that no sum depends on the order of threads. PyTorch's `unfold` would start one kernel for
    each image on a GPU.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, sources: torch.Tensor, uses: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(uses)
        return _gather(x, sources)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad.flatten(1, 2), *ctx.saved_tensors).sum(dim=2), None, None


def neighbourhoods(grid: tuple[int, int], prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at each of a token's 9 places, and the places of all tokens at which a token is: int64 [T, 9] both.

    T stands for no token beyond an edge, 9T for no place. A prefix token has no neighbours but itself.
    """
    count = prefix + grid[0] * grid[1]
    sources = torch.full((count, KERNEL**2), count)
    sources[:prefix, KERNEL**2 // 2] = torch.arange(prefix)
    patches = nn.functional.pad(torch.arange(prefix, count).view(grid), [KERNEL // 2] * 4, value=count)
    sources[prefix:] = patches.unfold(0, KERNEL, 1).unfold(1, KERNEL, 1).flatten(2).flatten(0, 1)
    users = sources.flip(1)  # a token is at place k of the one at its own place 8 - k
    uses = torch.where(users < count, users * KERNEL**2 + torch.arange(KERNEL**2), count * KERNEL**2)
    return sources, uses


def _gather(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x [R, N, H] at places [T, 9]: [R, T, 9, H]. At place N it is 0."""
    return nn.functional.pad(x, (0, 0, 0, 1)).index_select(1, places.flatten()).unflatten(1, places.shape)


class Convpass(Method):
    config: ConvpassConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config, kind = backbone.model, self.config, type(backbone.model).__name__
        scope = Scope(model, config.blocks)
        if not isinstance(model, GRID_MODELS):
            known = ", ".join(own.__name__ for own in GRID_MODELS)
            raise ConfigError(f"method.name: 'convpass' needs a grid of patch tokens ({known}), {kind} has none")
        branches, device = find_branches(model, scope), next(model.parameters()).device
        if not branches:
            raise ConfigError(f"method.name: 'convpass' needs attn and mlp in every block, {kind} has other blocks")
        grid = model.patch_embed.dynamic_feat_size((backbone.image_size, backbone.image_size))
        for name, width in branches.items():
            down = nn.Linear(width, config.bottleneck, device=device)
            own = LaneConvpass(f"{name}.convpass", down, grid, model.num_prefix_tokens, config.scale)
            model.set_submodule(name, ParallelLayer(model.get_submodule(name), own))
        return train_head(backbone)
