"""Matrix products by oneDNN, in place of the library that PyTorch prefers, for layers on the CPU.

PyTorch gives float32 products to MKL, which runs at less than half the speed of an AMD processor. A row of oneDNN's
product depends neither on the other rows nor on the row's place.

Shapes: L lanes, R rows, D inputs, E outputs.
"""

from pathlib import Path

import torch
from torch import nn

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.ops import by_lane, sum_rows
from fedpeft_dist.lanes.patches import PatchConv2d, is_patch_embedding
from fedpeft_dist.runtime.process import Runtime

MIN_WIDTH = 64
"""Each lane's own product is a call of its own, which pays from this number of rows, inputs and outputs."""


def choose_products(wanted: str, runtime: Runtime) -> str:
    """What `runtime.products` stands for on this machine: `torch` or `onednn`.

    `auto` follows the processor and the precision alone, so that it is the same on every rank of one kind of machine
    and after a resume. In bf16, PyTorch uses oneDNN by itself.

    Raises:
        ConfigError: oneDNN is wanted where there is none.
    """
    obstacles = {
        f"the run is on {runtime.device.type}": runtime.device.type != "cpu",
        f"the run is in {runtime.precision}, where PyTorch uses it by itself": runtime.precision != "fp32",
        "this PyTorch is built without it": not torch.backends.mkldnn.is_available(),
    }
    obstacle = next((reason for reason, holds in obstacles.items() if holds), None)
    if wanted == "onednn" and obstacle is not None:
        raise ConfigError(f"runtime.products: 'onednn' is for fp32 on the CPU, and {obstacle}; give auto or torch")
    if wanted != "auto":
        return wanted
    return "onednn" if obstacle is None and _is_amd() else "torch"


def use_onednn(model: nn.Module, is_trained: bool = False) -> None:
    """Makes a model's linear layers compute by oneDNN: the frozen ones, and the lanes' own large ones.

    Args:
        is_trained: the model's own linear layers are not frozen.
    """
    for name, module in list(model.named_modules()):
        if is_patch_embedding(module) and not is_trained:
            module.__class__ = FrozenPatches
        elif type(module) is nn.Linear:
            model.set_submodule(name, (TrainedLinear if is_trained else FrozenLinear)(module))
        elif hasattr(module, "use_onednn"):
            module.use_onednn = True


class FrozenLinear(nn.Linear):
    """A linear layer without gradients for its weight and bias, which it shares with the layer that it replaces."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(x.to(self.weight.dtype), self.weight, self.bias)

    def with_lane_bias(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The layer with each lane's own bias, [L, E], in place of one for all; x [R, ..., D]."""
        return BiasedProduct.apply(x.to(self.weight.dtype), self.weight, bias)


class FrozenPatches(PatchConv2d):
    """A frozen convolution over patches that do not overlap."""

    def multiply(self, patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(patches.to(weight.dtype), weight, self.bias)


class TrainedLinear(FrozenLinear):
    """A linear layer with gradients for its weight and bias, of one lane; they may be replaced by other tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.unsqueeze(0)
        return lane_product(x, self.weight.unsqueeze(0), bias)


class FrozenProduct(torch.autograd.Function):
    """x [..., D] times the transposed weight [E, D], plus the bias [E]; only x has a gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return onednn_product(grad, ctx.saved_tensors[0].t()), None, None


def lane_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`lane_linear` by oneDNN; for at least MIN_WIDTH rows a lane, inputs and outputs."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    return LaneProduct.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[1])


class BiasedProduct(torch.autograd.Function):
    """x [R, ..., D] times the transposed weight [E, D], plus each lane's own bias [L, E]; x and bias have gradients."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.num_lanes = len(bias)
        y = onednn_product(x, weight)
        by_lane(y, len(bias)).add_(bias.unsqueeze(1))
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor]:
        to_x = onednn_product(grad, ctx.saved_tensors[0].t()) if ctx.needs_input_grad[0] else None
        return to_x, None, sum_rows(by_lane(grad, ctx.num_lanes))


class LaneProduct(torch.autograd.Function):
    """x [L, R, D] times each lane's own transposed weight [L, E, D], plus its bias [L, E]: [L, R, E]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.stack(
            [onednn_product(*lane) for lane in zip(x, weight, [None] * len(x) if bias is None else bias)]
        )

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = (
            torch.stack([onednn_product(*lane) for lane in zip(grad, weight.mT)]) if ctx.needs_input_grad[0] else None
        )
        to_weight = torch.stack([onednn_product(*lane) for lane in zip(grad.mT, x.mT)])
        return to_x, to_weight, sum_rows(grad) if ctx.needs_input_grad[2] else None


def onednn_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., D] times the transposed weight [E, D], plus the bias [E]. It has no gradient of its own."""
    product = _opaque_product if torch.compiler.is_compiling() else torch.ops.mkldnn._linear_pointwise
    return product(x, weight, bias, "none", [], "")


@torch.library.custom_op("fedpeft_dist::linear", mutates_args=())
def _opaque_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, post: str, scalars: list[float], algorithm: str
) -> torch.Tensor:
    """The same operator under a name that torch.compile leaves alone. Inductor takes it with packed weights only."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, scalars, algorithm)


@_opaque_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _is_amd() -> bool:
    processor = Path("/proc/cpuinfo")
    return processor.exists() and "AuthenticAMD" in processor.read_text(encoding="utf-8")
