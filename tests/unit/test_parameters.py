"""The parameter matrix: its columns, its wire format, and the views that modules compute with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_dist.lanes.parameters import ALIGNMENT, LaneParameters, ParameterLayout

shape_lists = st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=6)
SHAPES = {"weight": (3, 11), "bias": (3,), "scalar": (), "block": (32, 2)}


def layout_of(shapes: dict[str, tuple[int, ...]]) -> ParameterLayout:
    return ParameterLayout({name: torch.Size(shape) for name, shape in shapes.items()})


def numbered(shapes: list[tuple[int, ...]]) -> ParameterLayout:
    return layout_of({f"tensor{i}": shape for i, shape in enumerate(shapes)})


@settings(deadline=None, derandomize=True, max_examples=100)
@given(shape_lists)
def test_columns_are_aligned_disjoint_and_in_order(shapes: list[tuple[int, ...]]) -> None:
    layout = numbered(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    assert layout.num_parameters == sum(sizes)
    assert [name for name, _, _ in layout.columns()] == list(layout.shapes)
    assert [size for _, _, size in layout.columns()] == sizes
    end = 0
    for _, start, size in layout.columns():
        assert start % 32 == 0
        assert end <= start < end + 32
        end = start + size
    assert layout.width % 32 == 0
    assert end <= layout.width < end + 32
    assert ALIGNMENT == 32


@settings(deadline=None, derandomize=True, max_examples=100)
@given(shape_lists, st.integers(0, 2**31))
def test_pad_and_unpad_are_inverse(shapes: list[tuple[int, ...]], seed: int) -> None:
    layout = numbered(shapes)
    vector = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(seed))
    row = layout.pad(vector)
    assert row.shape == (layout.width,)
    assert torch.equal(layout.unpad(row), vector)
    is_padding = torch.ones(layout.width, dtype=torch.bool)
    for _, start, size in layout.columns():
        is_padding[start : start + size] = False
    assert (row[is_padding] == 0).all()
    assert torch.equal(row[~is_padding], vector)

    named = layout.split(vector)
    assert [(name, tensor.shape) for name, tensor in named.items()] == list(layout.shapes.items())
    assert torch.equal(layout.join(named), vector)
    assert torch.equal(layout.join(dict(reversed(named.items()))), vector)


def test_split_gives_views_and_keeps_the_type() -> None:
    layout = layout_of(SHAPES)
    vector = torch.arange(layout.num_parameters, dtype=torch.float64)
    named = layout.split(vector)
    named["bias"].fill_(-1.0)
    assert vector[33:36].tolist() == [-1.0] * 3
    assert layout.pad(vector).dtype == layout.join(named).dtype == torch.float64


def test_join_names_wrong_tensors() -> None:
    layout = layout_of(SHAPES)
    named = layout.split(torch.zeros(layout.num_parameters))
    with pytest.raises(ValueError, match="bias"):
        layout.join({name: tensor for name, tensor in named.items() if name != "bias"})
    with pytest.raises(ValueError, match="stranger"):
        layout.join(named | {"stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight has shape \(11, 3\), not \(3, 11\)"):
        layout.join(named | {"weight": torch.zeros(11, 3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_lanes", [1, 4])
def test_views_share_memory_with_theta_and_its_gradient(num_lanes: int, dtype: torch.dtype) -> None:
    layout = layout_of(SHAPES)
    parameters = LaneParameters(layout, num_lanes, dtype=dtype)
    assert parameters.num_lanes == num_lanes
    parameters.theta.copy_(torch.arange(parameters.theta.numel()).view_as(parameters.theta))
    for name, start, size in layout.columns():
        view = parameters.views[name]
        assert view.shape == (num_lanes, *SHAPES[name])
        assert view.is_leaf
        assert view.requires_grad
        assert view.dtype == dtype
        assert not isinstance(view, torch.nn.Parameter)
        columns = slice(start, start + size)
        assert torch.equal(view.reshape(num_lanes, -1), parameters.theta[:, columns])
        with torch.no_grad():
            view.mul_(-1.0)
        assert torch.equal(view.reshape(num_lanes, -1), parameters.theta[:, columns])
        view.grad = torch.full_like(view, 3.0)
    for _, start, size in layout.columns():
        assert (parameters.grad[:, start : start + size] == 3.0).all()
    assert parameters.grad.sum() == 3.0 * num_lanes * layout.num_parameters  # the padding has no gradient
    parameters.assert_views_alive()


@pytest.mark.parametrize("cast", [(), ("weight",), tuple(SHAPES)])
def test_each_backward_pass_fills_the_matrix_anew(cast: tuple[str, ...]) -> None:
    layout = ParameterLayout(layout_of(SHAPES).shapes, frozenset(cast))
    parameters = LaneParameters(layout, 2, compute_dtype=torch.bfloat16)
    for repetition in (1, 2):
        factors = {name: torch.randint(-8, 9, (2, *shape)).float() for name, shape in SHAPES.items()}
        sum((view * repetition * factors[name]).sum() for name, view in parameters.views.items()).backward()
        for lane in range(2):
            expected = layout.join({name: repetition * factor[lane] for name, factor in factors.items()})
            assert torch.equal(layout.unpad(parameters.grad[lane]), expected)
            assert torch.equal(layout.pad(expected), parameters.grad[lane])  # the padding is 0
    parameters.assert_views_alive()


def test_cast_views_follow_theta_when_refreshed() -> None:
    layout = ParameterLayout(layout_of(SHAPES).shapes, frozenset({"weight"}))
    parameters = LaneParameters(layout, 2, compute_dtype=torch.bfloat16)
    vector = torch.randn(layout.num_parameters)
    parameters.load(1, layout.pad(vector))
    parameters.refresh()
    for name, tensor in layout.split(vector).items():
        expected = tensor.bfloat16() if name == "weight" else tensor
        assert parameters.views[name].dtype == expected.dtype
        assert torch.equal(parameters.views[name][1], expected)
    assert (
        LaneParameters(layout, 2, dtype=torch.float64, compute_dtype=torch.float32).views["weight"].dtype
        == torch.float64
    )


def test_loading_a_client_changes_only_its_lane() -> None:
    layout = layout_of(SHAPES)
    parameters = LaneParameters(layout, 3)
    vector = torch.randn(layout.num_parameters)
    parameters.load(1, layout.pad(vector))
    assert (parameters.theta[[0, 2]] == 0).all()
    for name, tensor in layout.split(vector).items():
        assert torch.equal(parameters.views[name][1], tensor)
    parameters.assert_views_alive()


def rebind(view: torch.Tensor) -> None:
    """Gives the view other memory, as `module.to(dtype)` does."""
    view.data = view.data.to(torch.float64)


def clone(view: torch.Tensor) -> None:
    view.data = view.data.clone()


def stop_gradient(view: torch.Tensor) -> None:
    """Turns the gradient off, as `model.requires_grad_(False)` does."""
    view.requires_grad_(False)


@pytest.mark.parametrize("cut", [rebind, clone, stop_gradient])
@pytest.mark.parametrize("name", ["weight", "block"])
def test_notices_a_view_that_left_its_matrix(cut, name: str) -> None:
    parameters = LaneParameters(layout_of(SHAPES), 2)
    parameters.assert_views_alive()
    cut(parameters.views[name])
    with pytest.raises(AssertionError, match=name):
        parameters.assert_views_alive()


def test_notices_a_replaced_view() -> None:
    parameters = LaneParameters(layout_of(SHAPES), 2)
    parameters.views["bias"] = parameters.views["bias"].detach().clone().requires_grad_()
    with pytest.raises(AssertionError, match="bias"):
        parameters.assert_views_alive()
