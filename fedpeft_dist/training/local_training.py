"""Local training: the hot loop. Clients are loaded into lanes, trained side by side, and collected.

Shapes: L lanes, B batch, K classes, P trainable parameters, W columns of the parameter matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fedpeft_dist.config.schema import ClientConfig
from fedpeft_dist.data.pixels import send
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.loss_scale import LaneLossScale
from fedpeft_dist.lanes.optimizers import add_proximal, clip_rows, make_lane_optimizer
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.lanes.random import fold_in
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.privacy.mechanisms import keyed_normal
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.lane_schedule import ClientTask, Tick, schedule_lanes

_NOISE = 0x6E6F697365
"""Tells the keys of a step's noise from those of its samples."""


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends."""

    client: int
    weight: int
    delta: torch.Tensor
    """client_after - server_before: [P], on the device."""
    loss: torch.Tensor
    """Mean training loss over its local steps: a float32 scalar on the device."""
    num_samples: int
    """Training samples it went through, repetitions counted."""


class LocalTrainer:
    """Trains a shard of clients on L lanes.

    Args:
        model: the backbone with its method; bound to this trainer's rows while it trains.
        store: the training images.
        num_lanes: L.
        dtype: of the parameter matrix; float32 in a run.
        compile_model: runs the model through torch.compile.
        gradient_noise: standard deviation of Gaussian noise on every gradient: no privacy, see `paper_noise`.
    """

    def __init__(
        self,
        model: LaneModel,
        store: DeviceStore,
        config: ClientConfig,
        runtime: Runtime,
        seed: int,
        num_lanes: int,
        dtype: torch.dtype = torch.float32,
        compile_model: bool = False,
        gradient_noise: float = 0.0,
    ):
        self.model, self.store, self.config, self.runtime, self.seed = model, store, config, runtime, seed
        self.gradient_noise = gradient_noise
        self.parameters = LaneParameters(model.layout, num_lanes, runtime.device, dtype)
        self.optimizer = make_lane_optimizer(config.optimizer, self.parameters.theta)
        self.loss_scale = LaneLossScale(num_lanes, runtime.device) if runtime.precision == "fp16" else None
        self.loss_sums = torch.zeros(num_lanes, device=runtime.device)
        self.samples_seen = [0] * num_lanes
        self.logits = torch.compile(model.logits) if compile_model else model.logits

    def train(
        self,
        tasks: Sequence[ClientTask],
        global_vector: torch.Tensor,
        round_number: int,
        lr_factor: float = 1.0,
        is_dropped: Callable[[], bool] = lambda: False,
    ) -> Iterator[ClientUpdate]:
        """Yields each client's update as soon as it is done; a round's updates are never held all at once.

        Args:
            global_vector: [P] on the device.
            is_dropped: asked before each local step; once it says so, nothing more is trained or yielded.
        """
        self.model.bind(self.parameters)
        start = self.model.layout.pad(global_vector.to(self.parameters.theta.dtype))
        num_lanes, batch_size = self.parameters.num_lanes, self.config.batch_size
        for tick, upcoming in with_next(schedule_lanes(tasks, num_lanes, batch_size, self.seed, round_number)):
            if is_dropped():
                return
            for lane, _ in tick.starting:
                self._load(lane, start)
            self._local_step(tick, upcoming, start, lr_factor)
            for lane, task in tick.finished:
                delta = self.model.layout.unpad(self.parameters.theta[lane] - start)
                loss = self.loss_sums[lane] / task.num_steps
                yield ClientUpdate(task.client, task.weight, delta, loss, self.samples_seen[lane])
        self.parameters.assert_views_alive()

    def _load(self, lane: int, start: torch.Tensor) -> None:
        """A client starts at the global parameters with a fresh optimizer, whoever was in the lane before."""
        self.parameters.load(lane, start)
        self.optimizer.reset(lane)
        self.loss_sums[lane] = 0.0
        self.samples_seen[lane] = 0
        if self.loss_scale is not None:
            self.loss_scale.reset(lane)

    def _local_step(self, tick: Tick, upcoming: Tick | None, start: torch.Tensor, lr_factor: float) -> None:
        """One optimizer step of every lane that has a batch."""
        device, grad = self.runtime.device, self.parameters.grad
        keys = fold_in(tick.lane_keys.unsqueeze(1), tick.indices)
        mask, keys = send(tick.mask, device), send(keys, device)
        active = mask.any(dim=1, keepdim=True)
        images, labels = self.store.batch(tick.indices, keys)
        if upcoming is not None:
            self.store.prefetch(upcoming.indices)
        grad.zero_()
        with self.runtime.autocast():
            logits = self.logits(images.to(self._input_dtype), keys)
        losses = lane_losses(logits, labels, mask)
        # The sum over lanes keeps them apart: each lane's parameters see their own mean loss only.
        (losses if self.loss_scale is None else losses * self.loss_scale.scale).sum().backward()
        if self.loss_scale is not None:
            active = self.loss_scale.unscale(grad, active)
        if self.config.proximal:
            add_proximal(grad, self.parameters.theta, start, self.config.proximal)
        if self.config.clip_norm is not None:
            clip_rows(grad, self.config.clip_norm)
        if self.gradient_noise:
            noise_keys = send(fold_in(tick.lane_keys, _NOISE), device)
            grad.add_(keyed_normal(noise_keys, grad.shape[1]).to(grad.dtype), alpha=self.gradient_noise)
        self.optimizer.step(self.parameters.theta, grad, active, self.config.optimizer.lr * lr_factor)
        # The loss of a step that overflowed in fp16 may not be finite, and the step was not taken: it counts as 0.
        self.loss_sums += torch.where(active.squeeze(1), losses.detach(), 0.0).float()
        for lane, count in enumerate(tick.mask.sum(dim=1).tolist()):
            self.samples_seen[lane] += count

    @property
    def _input_dtype(self) -> torch.dtype:
        """float32, or float64 in tests."""
        return self.parameters.theta.dtype


def with_next(ticks: Iterator[Tick]) -> Iterator[tuple[Tick, Tick | None]]:
    """Each tick with the one after it; None after the last."""
    current = next(ticks, None)
    while current is not None:
        upcoming = next(ticks, None)
        yield current, upcoming
        current = upcoming


def lane_losses(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each lane's cross-entropy, the mean over its real samples; 0 for a lane that has none.

    Args:
        logits: [L, B, K]; computed with in float32, or in float64 where they are.
        labels: int64 [L, B].
        mask: bool [L, B].

    Returns:
        [L].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = torch.where(mask, losses.view(mask.shape), 0.0)
    return losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
