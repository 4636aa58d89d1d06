"""Dropout and drop-path. Their masks are functions of the sample's key, not of a generator's history.

Shapes: B batch, R = L * B rows of L lanes.
"""

from collections.abc import Set

import torch
from timm.layers import DropPath, PatchDropout
from torch import nn

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.random import derive_seed, random_bits


class SampleKeys:
    """The keys that all stochastic modules of a model share, and the random bits that follow from them.

    Two words of 32 bits, u and v, are drawn once a forward pass for each sample and element. A module's own word is
    u + a * v modulo 2^32, with a factor a of its own. So the words of two modules are nearly independent, as in the
    hashing of Carter and Wegman (1979). A module takes one kernel for them instead of a hash of its own.
    """

    def __init__(self) -> None:
        self._numbers = torch.empty(0, dtype=torch.int64)
        self.rows = None

    @property
    def rows(self) -> torch.Tensor | None:
        """A key for each row, int64 [R]; None turns the modules off."""
        return self._rows

    @rows.setter
    def rows(self, rows: torch.Tensor | None) -> None:
        self._rows, self._words = rows, None
        if rows is not None and len(self._numbers):
            self._fill(len(self._numbers))  # as many as the passes before have taken

    def draw(self, factor: torch.Tensor, elements: int) -> torch.Tensor:
        """The words of the module with this factor: int32 [R, elements], uniform over all values."""
        if self._words is None or self._words.shape[1] < elements:
            self._fill(elements)
        u, v = self._words[:, :elements].unbind(-1)
        return torch.addcmul(u, v, factor)

    def _fill(self, elements: int) -> None:
        if len(self._numbers) != elements or self._numbers.device != self._rows.device:
            self._numbers = random_bits(torch.arange(elements, device=self._rows.device))
        words = random_bits(self._rows.unsqueeze(1) ^ self._numbers)
        self._words = words.view(torch.int32).unflatten(1, (-1, 2))


class KeyedModule(nn.Module):
    """A module that drops at random. Its name makes its masks differ from those of other modules."""

    def __init__(self, probability: float, name: str):
        super().__init__()
        self.probability, self.scale = probability, 1 / (1 - probability) if probability < 1 else 0.0
        numbers = {"site": derive_seed(0, name) % 2**32, "threshold": min(round(probability * 2**32), 2**32 - 1)}
        for key, value in numbers.items():  # tensors, because numbers would be constants of a compiled block
            self.register_buffer(key, torch.tensor(value - 2**31, dtype=torch.int32), persistent=False)
        self.register_buffer("factor", torch.tensor(self.scale), persistent=False)
        self.keys = SampleKeys()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keys.rows is None:
            return x
        scale = self.factor if torch.compiler.is_compiling() else self.scale
        return Drop.apply(x, self.words(x) >= self.threshold, scale)

    def words(self, x: torch.Tensor) -> torch.Tensor:
        """The words that decide which parts of x are kept: int32, in a shape that broadcasts over x."""
        raise NotImplementedError


class KeyedDropout(KeyedModule):
    """Dropout of single elements."""

    def words(self, x: torch.Tensor) -> torch.Tensor:
        # A windowed layer cuts each sample into several leading entries, which stay next to each other.
        return self.keys.draw(self.site, x.numel() // len(self.keys.rows)).view(x.shape)


class KeyedDropPath(KeyedModule):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops a residual branch for a whole sample."""

    def __init__(self, probability: float, scale_by_keep: bool, name: str):
        super().__init__(probability, name)
        if not scale_by_keep:
            self.scale, self.factor = 1.0, torch.ones(())

    def words(self, x: torch.Tensor) -> torch.Tensor:
        return self.keys.draw(self.site, 1).view(-1, *[1] * (x.dim() - 1))


class Drop(torch.autograd.Function):
    """x * scale where `keep` holds, else 0. On CUDA it is one kernel, forward as backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, keep: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        if x.is_cuda and isinstance(scale, float):
            return torch.ops.aten.native_dropout_backward(x, keep, scale)
        return torch.where(keep, x * scale, 0.0)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        _, keep, ctx.scale = inputs
        ctx.save_for_backward(keep)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return Drop.apply(grad, ctx.saved_tensors[0], ctx.scale), None, None


def make_dropout(probability: float, name: str) -> nn.Module:
    """A keyed dropout for the module called `name`, or the identity if the probability is 0."""
    return KeyedDropout(probability, name) if probability else nn.Identity()


def key_dropout(model: nn.Module, shared: Set[nn.Module]) -> SampleKeys:
    """Replaces a model's dropout and drop-path layers by keyed ones, and removes those with probability 0.

    Args:
        shared: layers whose result all samples share. They get no dropout, because no sample's key can decide it.

    Returns:
        The keys that all keyed layers of the model use from now on, with the method's layers.

    Raises:
        ConfigError: dropout that cannot be keyed, because it is inside the fused attention, drops patches, or has no
            layer of its own.
    """
    named = list(model.named_modules())
    if getattr(model, "drop_rate", 0.0) and not any(isinstance(m, nn.Dropout) and m.p for _, m in named):
        raise ConfigError(f"backbone.model_args: drop_rate of {type(model).__name__} cannot be keyed; give 0.0")
    for name, module in named:
        if isinstance(module, PatchDropout):
            raise ConfigError(f"backbone.model_args: patch dropout ({name}) cannot be keyed; give patch_drop_rate: 0.0")
        if isinstance(module, nn.Dropout):
            if name.endswith("attn_drop") and module.p:
                raise ConfigError(
                    f"backbone.model_args: dropout {module.p} at {name} is inside the fused attention; "
                    "give attn_drop_rate: 0.0 (proj_drop_rate and drop_path_rate are supported)"
                )
            model.set_submodule(name, make_dropout(0.0 if module in shared else module.p, name))
        elif isinstance(module, DropPath):
            live = module.drop_prob and module not in shared
            keyed = KeyedDropPath(module.drop_prob, module.scale_by_keep, name) if live else nn.Identity()
            model.set_submodule(name, keyed)
    keys = SampleKeys()
    for module in model.modules():
        if isinstance(module, KeyedModule):
            module.keys = keys
    return keys
