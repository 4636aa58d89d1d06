"""The matrix that holds every lane's trainable parameters, and the names of its columns.

All client state of a rank is `theta [L, W]`: a row is a client. Modules compute with plain leaf tensors `[L, *shape]`,
which are views of theta. Their gradients are laid into a second matrix. So loading a client, taking its delta and
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
    cast: frozenset[str] = frozenset()
    """The tensors that enter matrix products alone, and so are computed with in the run's compute type."""

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
        return self._columns

    @cached_property
    def _columns(self) -> list[tuple[str, int, int]]:
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

    A view in the compute type reads a copy of theta, which `refresh` brings up to date: one cast a step, whatever the
    number of tensors. Without such a type, all views are views of theta.

    Args:
        layout: names and shapes of the columns.
        num_lanes: L.
        dtype: float32 in a run; tests also use float64.
        with_grad: False for rows that are only evaluated. Then there is no gradient matrix.
        compute_dtype: the type of the tensors in `layout.cast`, if it is a 16-bit type; else they stay in `dtype`.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        num_lanes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        with_grad: bool = True,
        compute_dtype: torch.dtype | None = None,
    ):
        self.layout, self.num_lanes = layout, num_lanes
        self.theta = torch.zeros(num_lanes, layout.width, device=device, dtype=dtype)
        has_low = layout.cast and compute_dtype in (torch.bfloat16, torch.float16)
        self.low = self.theta.to(compute_dtype) if has_low else None
        self.views = {
            name: self._matrix_of(name)[:, columns].view(-1, *layout.shapes[name]).detach()
            for name, columns in self._columns()
        }
        self._grad = torch.zeros_like(self.theta) if with_grad else None
        if with_grad:
            for view in self.views.values():
                view.requires_grad_()
            self._padding = torch.zeros(num_lanes, ALIGNMENT, device=device, dtype=dtype)

    def load(self, lane: int, row: torch.Tensor) -> None:
        """Copies a client's parameters, a padded row [W], into a lane."""
        self.theta[lane].copy_(row)

    def refresh(self) -> None:
        """Brings the copy in the compute type up to date with theta. To be called before each forward pass."""
        if self.low is not None:
            self.low.copy_(self.theta)

    @property
    def grad(self) -> torch.Tensor:
        """The gradients of the backward pass before: [L, W], with zeros in the padding. The next one overwrites them.

        Autograd leaves each gradient in a tensor of its own. All of them are laid into the matrix at the first reading,
        by two or three kernels instead of one for each tensor.
        """
        own = {name: view.grad for name, view in self.views.items()}
        if all(gradient is None for gradient in own.values()):
            return self._grad
        own = {
            name: (torch.zeros_like(self.views[name]) if gradient is None else gradient).reshape(self.num_lanes, -1)
            for name, gradient in own.items()
        }
        low = [name for name in own if own[name].dtype != self.theta.dtype]
        if low:
            widths = [own[name].shape[1] for name in low]
            cast = torch.cat([own[name] for name in low], dim=1).to(self.theta.dtype)
            own.update(zip(low, cast.split(widths, dim=1)))
        parts = [part for gradient in own.values() for part in (gradient, self._pad_after(gradient)) if part.shape[1]]
        torch.cat(parts, dim=1, out=self._grad)
        self.drop_grad()
        return self._grad

    def drop_grad(self) -> None:
        """Forgets the gradients of the backward pass before."""
        for view in self.views.values():
            view.grad = None

    def assert_views_alive(self) -> None:
        """Fails if a view has left its matrix, as after `module.to()`, or no longer has a gradient."""
        for name, columns in self._columns():
            view, matrix = self.views[name], self._matrix_of(name)
            expected = matrix.data_ptr() + columns.start * matrix.element_size()
            assert (view.data_ptr(), view.dtype) == (expected, matrix.dtype), f"{name} left the parameter matrix"
            assert view.requires_grad, f"{name} lost its gradient"

    def _matrix_of(self, name: str) -> torch.Tensor:
        return self.low if self.low is not None and name in self.layout.cast else self.theta

    def _columns(self) -> list[tuple[str, slice]]:
        return [(name, slice(start, start + size)) for name, start, size in self.layout.columns()]

    def _pad_after(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._padding[:, : -gradient.shape[1] % ALIGNMENT]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
