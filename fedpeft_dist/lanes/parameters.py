"""The matrix that holds every lane's trainable parameters, and the names of its columns.

All client state of a rank is `theta [L, W]`: a row is a client. Modules compute with plain leaf tensors `[L, *shape]`,
which are views of theta. Their gradients are views of a second matrix. So loading a client, taking its delta and
stepping an optimizer are operations on rows.

Shapes: L lanes, P trainable parameters, W = P plus the padding columns that align each tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

# An elementwise kernel may round differently in its vectorised body and in its scalar tail. Every tensor starts at a
# multiple of 32 elements. So no tail falls inside a lane, and no result depends on the lane's number.
ALIGNMENT = 32


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and order of the trainable tensors. The wire format is their concatenation, P floats."""

    shapes: Mapping[str, torch.Size]
    """Shape of each tensor without a lane axis, by name."""

    @cached_property
    def num_parameters(self) -> int:
        """P."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def width(self) -> int:
        """W."""
        return sum(_aligned(math.prod(shape)) for shape in self.shapes.values())

    def columns(self) -> list[tuple[str, int, int]]:
        """Each tensor's name, first column, and number of columns without padding."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        return list(zip(self.shapes, accumulate(map(_aligned, sizes), initial=0), sizes))

    def pad(self, vector: torch.Tensor) -> torch.Tensor:
        """A wire vector [P] as a row [W]. The padding is 0."""
        assert vector.shape == (self.num_parameters,)
        parts = [part.flatten() for part in self.split(vector).values()]
        return torch.cat([nn.functional.pad(part, (0, -len(part) % ALIGNMENT)) for part in parts])

    def unpad(self, row: torch.Tensor) -> torch.Tensor:
        """A row [W] as a wire vector [P]."""
        assert row.shape == (self.width,)
        return torch.cat([row[start : start + size] for _, start, size in self.columns()])

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A wire vector [P] as named tensors, which are views of the vector."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Named tensors as one wire vector [P].

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape.
        """
        if set(tensors) != set(self.shapes):
            wrong = sorted(set(tensors) ^ set(self.shapes))
            raise ValueError(f"the tensors do not match the trainable parameters: {', '.join(wrong[:3])}")
        for name, shape in self.shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}")
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])


class LaneParameters:
    """L rows of trainable parameters and their gradients, with views by name.

    Args:
        layout: names and shapes of the columns.
        num_lanes: L.
        dtype: float32 in a run; tests also use float64.
        with_grad: False for rows that are only evaluated. Then there is no gradient matrix.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        num_lanes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        with_grad: bool = True,
    ):
        self.layout, self.num_lanes = layout, num_lanes
        self.theta = torch.zeros(num_lanes, layout.width, device=device, dtype=dtype)
        self.views = self._views_of(self.theta)
        if with_grad:
            self.grad = torch.zeros_like(self.theta)
            for name, grad in self._views_of(self.grad).items():
                self.views[name].requires_grad_().grad = grad

    def _views_of(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        shapes, columns = self.layout.shapes, self.layout.columns()
        return {n: matrix[:, start : start + size].view(-1, *shapes[n]).detach() for n, start, size in columns}

    def load(self, lane: int, row: torch.Tensor) -> None:
        """Copies a client's parameters, a padded row [W], into a lane."""
        self.theta[lane].copy_(row)

    def assert_views_alive(self) -> None:
        """Fails if a view has left its matrix, as after `module.to()` or an optimizer that rebinds `.grad`."""
        element = self.theta.element_size()
        for name, start, _ in self.layout.columns():
            view = self.views[name]
            assert view.data_ptr() == self.theta.data_ptr() + start * element, f"{name} left the parameter matrix"
            assert view.grad is not None, f"{name} lost its gradient"
            assert view.grad.data_ptr() == self.grad.data_ptr() + start * element, f"{name}.grad left its matrix"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
