"""Proves at the start of a run that this backbone, method and device keep lanes apart.

A client trains on a few random images beside one neighbour, in the other lane beside another neighbour, and alone.
Where it trains nothing but tensors of the backbone, plain PyTorch trains it, too. A layer that mixes lanes shows here,
whatever the reason, on backbones that no test has met. `runtime.verify` repeats the comparison of places and neighbours
with the run's own shapes: a kernel may split its sums by the place of a row, which shows in large matrices alone.

Shapes: L lanes, R rows, B batch, K classes, C channels, H x W pixels, W columns of the parameter matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedpeft_dist.backbones.timm_backbone import move
from fedpeft_dist.backbones.weight_files import one_line
from fedpeft_dist.config.errors import ConfigError, MachineFaultError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.parameters import LaneParameters, ParameterLayout
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.runtime.accelerator import is_device_fault
from fedpeft_dist.runtime.process import Runtime

BATCH = 2
"""Samples of a client. PyTorch's convolutions on the CPU may compute a wrong gradient for a single row."""
DRAWS = 3
"""A difference must show in as many draws. One draw alone may meet the kink of a ReLU, which amplifies rounding."""
DISTANCE = 0.01
"""Standard deviation of the noise on the clients' initial parameters, at which LoRA would have no gradient."""
TOLERANCE = 0.02
"""Largest relative error of a tensor's gradient. Other shapes round otherwise, and ReLUs near zero amplify it."""
NEGLIGIBLE = 0.01
"""A gradient whose norm is below this share of the whole one's may be nothing but rounding."""


@dataclass(frozen=True)
class _Client:
    """What one client brings to a local step."""

    row: torch.Tensor
    """[W]."""
    images: torch.Tensor
    """[B, C, H, W]."""
    labels: torch.Tensor
    """int64 [B]."""
    keys: torch.Tensor
    """int64 [B]."""

    def first_sample(self) -> "_Client":
        """The same client with one sample: a lane under sample-level privacy."""
        return _Client(self.row, self.images[:1], self.labels[:1], self.keys[:1])


@dataclass(frozen=True)
class _Step:
    """What one client gets out of a local step."""

    scores: torch.Tensor
    """[B, K]."""
    gradient: torch.Tensor
    """[W]."""


def check_lanes(model: LaneModel, config: RunConfig, runtime: Runtime) -> None:
    """
    Args:
        model: on the run's device, frozen in the run's precision.

    Raises:
        ConfigError: a client's scores or gradients depend on its lane or its neighbour, to the bit, or differ in
            float32 from those that it has alone or in plain PyTorch.
    """
    refusal = f"method.name: {config.method.name!r} on backbone.name: {config.backbone.name!r}"
    try:
        changed = _compare(model, config, runtime)
    except RuntimeError as error:
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"{refusal} cannot run in runtime.precision: {runtime.precision} ({one_line(error)})"
        ) from error
    if changed:
        raise ConfigError(f"{refusal} {changed}")


def verify_lanes(rows: int, samples: int, model: LaneModel, store: DeviceStore, runtime: Runtime) -> None:
    """Trains R clients side by side, then in reverse order, then the first of them in every row at once.

    Args:
        rows: R; the run's lanes or, under sample-level privacy, its slots.
        samples: B, of each row.
        store: the training images.

    Raises:
        MachineFaultError: a client's scores or gradient differ between these passes, by a single bit.
    """
    clients = [_make_true_client(model, store, samples, runtime, seed) for seed in range(rows)]
    steps = _step(model, clients, runtime)
    again = _step(model, clients[::-1], runtime)[::-1]
    alike = _step(model, clients[:1] * rows, runtime)
    pairs = [(f"row {rows - 1 - row}", own, steps[row]) for row, own in enumerate(again)]
    pairs += [(f"row {row} beside itself", own, steps[0]) for row, own in enumerate(alike)]
    for where, own, expected in pairs:
        if not (_equal(own.scores, expected.scores) and _equal(own.gradient, expected.gradient)):
            raise MachineFaultError(
                f"runtime.verify: a client's result in {where} of {rows} is another one than in its own row (batch "
                f"{samples}, {runtime.precision} on {runtime.device}), so a run would depend on the number of ranks; "
                "try another runtime.precision, or other versions of PyTorch and the driver"
            )


def _compare(model: LaneModel, config: RunConfig, runtime: Runtime) -> str:
    """The fault of the model on lanes; empty if there is none."""
    is_private, difference = config.privacy.name == "sample", ""
    has_neighbours = is_private or config.runtime.lanes != 1
    for draw in range(DRAWS):
        clients = [_make_client(model, runtime, seed) for seed in range(3 * draw, 3 * draw + 3)]
        if has_neighbours:
            own, left, right = [client.first_sample() for client in clients] if is_private else clients
            beside, _ = _step(model, [own, left], runtime)
            _, again = _step(model, [right, own], runtime)
            if not (_equal(beside.scores, again.scores) and _equal(beside.gradient, again.gradient)):
                changed = _differing(model.layout, beside, again)
                return f"mixes lanes: a neighbour changes {changed}" if changed else "is not exact: lanes round apart"
        if runtime.precision != "fp32":
            return ""  # in half precision, a deep network's gradients may round to anything in other shapes
        difference = ""
        if has_neighbours:
            alone = _step(model, [own, own] if is_private else [own], runtime)[0]  # never a single row: see BATCH
            if changed := _differing(model.layout, beside, alone):
                difference = f"mixes lanes: {changed} is not what a client has alone"
        if not difference and (changed := _differing_from_plain(model, clients[0], runtime)):
            difference = f"trains something else than plain PyTorch: {changed} differs"
        if not difference:
            return ""
    return difference


def _differing_from_plain(model: LaneModel, client: _Client, runtime: Runtime) -> str:
    """The name of a tensor that plain PyTorch computes otherwise, without dropout; empty if there is none.

    It compares methods that train tensors of the backbone alone.
    """
    if not set(model.layout.shapes) <= {name for name, _ in model.backbone.plain.named_parameters()}:
        return ""
    still = _step(model, [client], runtime, with_keys=False)[0]
    return _differing(model.layout, still, _plain_step(model, client, runtime))


def _make_true_client(model: LaneModel, store: DeviceStore, samples: int, runtime: Runtime, seed: int) -> _Client:
    """A client with images of the run's own data."""
    own = (seed * samples + torch.arange(samples)).unsqueeze(0)
    keys = own.to(runtime.device)
    images, labels = store.batch(own % len(store), keys)
    return _Client(_make_row(model, torch.Generator().manual_seed(seed)).to(images), images[0], labels[0], keys[0])


def _make_row(model: LaneModel, generator: torch.Generator) -> torch.Tensor:
    """The initial parameters and noise: [W]."""
    row = model.layout.pad(model.initial_vector())
    return row + DISTANCE * torch.randn(row.shape, generator=generator)


def _make_client(model: LaneModel, runtime: Runtime, seed: int) -> _Client:
    generator = torch.Generator().manual_seed(seed)
    row = _make_row(model, generator)
    size = model.backbone.image_size
    images = torch.randn(BATCH, model.backbone.channels, size, size, generator=generator)
    labels, keys = (torch.randint(high, (BATCH,), generator=generator) for high in (2, 2**62))
    return _Client(*(tensor.to(runtime.device) for tensor in (row, images, labels, keys)))


def _step(model: LaneModel, clients: Sequence[_Client], runtime: Runtime, with_keys: bool = True) -> list[_Step]:
    """The clients' forward and backward pass, side by side."""
    parameters = LaneParameters(model.layout, len(clients), runtime.device, compute_dtype=runtime.compute_dtype)
    for lane, client in enumerate(clients):
        parameters.load(lane, client.row)
    model.bind(parameters)
    images, labels, keys = (torch.stack([getattr(c, name) for c in clients]) for name in ("images", "labels", "keys"))
    with runtime.autocast():
        scores = model.logits(images, keys if with_keys else None)
    _loss(scores, labels).backward()
    return [_Step(*own) for own in zip(scores.detach(), parameters.grad)]


def _plain_step(model: LaneModel, client: _Client, runtime: Runtime) -> _Step:
    """The same pass of one client in plain PyTorch, without dropout."""
    plain, layout = move(model.backbone.plain, runtime.device), model.layout
    values = {name: value.requires_grad_() for name, value in layout.split(layout.unpad(client.row)).items()}
    with runtime.autocast():
        scores = torch.func.functional_call(plain, values, (client.images,))
    gradients = torch.autograd.grad(_loss(scores, client.labels), list(values.values()))
    return _Step(scores.detach(), layout.pad(layout.join(dict(zip(values, gradients)))))


def _loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(scores.float().flatten(0, -2), labels.flatten(), reduction="sum")


def _differing(layout: ParameterLayout, step: _Step, expected: _Step) -> str:
    """The name of what is off by more than rounding; empty where nothing is."""
    pairs = {"the score": (step.scores, expected.scores)}
    for name, start, size in layout.columns():
        pairs[name] = (step.gradient[start : start + size], expected.gradient[start : start + size])
    smallest = NEGLIGIBLE * expected.gradient.norm()
    for name, (found, right) in pairs.items():
        is_near = (found - right).norm() <= TOLERANCE * right.norm().clamp(min=smallest)
        if not (is_near or _equal(found, right)):  # NaN is near nothing
            return name
    return ""


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit; what overflowed to NaN in both is equal, too."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
