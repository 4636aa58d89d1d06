"""Local training, the hot loop: clients are loaded into lanes, trained side by side, and collected.

Shapes: L lanes, R rows, B batch, P trainable parameters, W columns of the parameter matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fedpeft_dist.config.schema import ClientConfig
from fedpeft_dist.data.feature_store import FeatureStore
from fedpeft_dist.data.store import DeviceStore, send
from fedpeft_dist.lanes.optimizers import clip_rows, make_lane_optimizer
from fedpeft_dist.lanes.random import fold_in
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.privacy.mechanisms import keyed_normal
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.gradients import MeanGradient, row_losses
from fedpeft_dist.training.lockstep import in_step
from fedpeft_dist.training.schedule import ClientTask, Pass, Schedule, Seated

_NOISE = 0x6E6F697365
"""Separates the keys of a step's noise from those of its samples."""


@dataclass(frozen=True)
class ClientUpdate:
    """What local training gives for one client."""

    client: int
    weight: int
    """The client's number of samples."""
    delta: torch.Tensor
    """client_after - server_before: [P], on the device."""
    loss: torch.Tensor
    """Mean training loss over its local steps: a float32 scalar on the device."""
    num_samples: int
    """Training samples that the client went through, repetitions counted."""
    num_steps: int
    """Local steps taken."""


@dataclass(frozen=True)
class RoundStart:
    """What the clients of a round start with."""

    number: int
    """The round, counted from 0."""
    vector: torch.Tensor
    """The global parameters: [P], on the device."""
    lr_factor: float = 1.0
    """Factor on the client's learning rate."""
    offset: Callable[[int], torch.Tensor] | None = None
    """A constant that the algorithm adds to a client's gradients, by the client: [P]."""


class Trainer:
    """Trains a shard of clients on L lanes.

    Args:
        model: the backbone with its method, or the part of it after a cut; bound to the rule's rows while it trains.
        store: what the model takes: the training images, or their features at the cut.
        rule: the gradient that clients step on.
        term: what the algorithm adds to it, `Algorithm.add_to_gradient`.
        gradient_noise: standard deviation of the noise of privacy `paper_noise`, which gives no privacy.
        needs_keys: whether the store or the model draws random numbers for samples.
    """

    def __init__(
        self,
        model: LaneModel,
        store: DeviceStore | FeatureStore,
        config: ClientConfig,
        runtime: Runtime,
        *,
        schedule: Schedule,
        rule: MeanGradient,
        term: Callable[..., None] | None = None,
        gradient_noise: float = 0.0,
        needs_keys: bool = True,
    ):
        self.model, self.store, self.config, self.runtime = model, store, config, runtime
        self.schedule, self.rule, self.term, self.gradient_noise = schedule, rule, term, gradient_noise
        self.needs_keys = needs_keys
        self.optimizer = make_lane_optimizer(config.optimizer, rule.theta)
        self.offsets: torch.Tensor | None = None
        self.logits = model.logits
        self.num_passes = self.num_padded = 0
        """Passes of the last round, and how many of them were empty, to stay in step with other ranks."""

    def train(
        self, tasks: Sequence[ClientTask], start: RoundStart, is_dropped: Callable[[], bool] = lambda: False
    ) -> Iterator[ClientUpdate]:
        """Yields each client's update as soon as it is done, so a round's updates are never held all at once.

        Args:
            is_dropped: asked before each local step; once it is true, nothing more is trained or yielded.
        """
        self.model.bind(self.rule.rows)
        self.store.expect([task.samples for task in tasks if task.num_steps])
        row = self.model.layout.pad(start.vector.to(self.rule.theta.dtype))
        self.num_passes = self.num_padded = 0
        passes = with_next(self.schedule.passes(tasks, start.number))
        for current, upcoming in in_step(passes, self.runtime.mesh, is_dropped):
            self.num_passes += 1
            if current is None:
                self.num_padded += 1
                self._local_step(self.schedule.empty_pass(), None, row, start)
                continue
            for client in current.starting:
                self._load(client, row, start)
            self._local_step(current, upcoming, row, start)
            for client in current.finished:
                yield self._collect(client, row)
        self.rule.rows.assert_views_alive()

    def warm_up(self, rows: int, samples: int) -> None:
        """One pass forward and backward over rows of any images, which compiles a model that is to be compiled."""
        self.model.bind(self.rule.rows)
        indices = torch.zeros(rows, samples, dtype=torch.int64)
        keys = send(indices, self.runtime.device) if self.needs_keys else None
        inputs, _ = self.store.batch(indices, keys)
        with self.runtime.autocast():
            logits = self.logits(inputs, keys)
        logits.float().sum().backward()
        self.rule.rows.grad.zero_()
        self.store.forget()

    def _load(self, client: Seated, row: torch.Tensor, start: RoundStart) -> None:
        """A client starts at the global parameters with a fresh optimizer, whoever was in the lane before."""
        self.rule.theta[client.lane].copy_(row)
        self.rule.start_client(client.lane)
        self.optimizer.reset(client.lane)
        if start.offset is not None:
            if self.offsets is None:
                self.offsets = torch.zeros_like(self.rule.theta)
            offset = start.offset(client.task.client).to(self.offsets)
            self.offsets[client.lane].copy_(self.model.layout.pad(offset))

    def _collect(self, client: Seated, row: torch.Tensor) -> ClientUpdate:
        delta = self.model.layout.unpad(self.rule.theta[client.lane] - row)
        task = client.task
        loss = self.rule.mean_loss(client)
        return ClientUpdate(task.client, task.weight, delta, loss, client.num_samples, task.num_steps)

    def _local_step(self, current: Pass, upcoming: Pass | None, row: torch.Tensor, start: RoundStart) -> None:
        """One pass forward and backward, then an optimizer step of every lane whose batch is complete."""
        device, theta, is_empty = self.runtime.device, self.rule.theta, not current.mask.any()
        if not is_empty or self.runtime.mesh is not None:  # a batch that is drawn at random may be empty
            own = self._own_part(current)
            keys = send(fold_in(own.row_keys.unsqueeze(1), own.indices), device) if self.needs_keys else None
            self.rule.prepare(current)
            inputs, labels = self.store.batch(own.indices, keys)
            if upcoming is not None:
                self.store.prefetch(self._own_part(upcoming).indices)
            with self.runtime.autocast():
                logits = self.logits(inputs, keys)
            losses = row_losses(logits, labels, send(own.mask, device), send(current.sizes.clamp(min=1), device))
            # The sum over rows keeps them apart: each row's parameters see their own loss only.
            self.rule.scaled(losses).sum().backward()
            if is_empty:
                self.rule.rows.drop_grad()
            else:
                losses = losses.detach() if own is current else self._sum_over_group(losses.detach())
                self.rule.add(current, losses, send(current.mask, device))
        if not current.stepping:
            return
        grad, active = self.rule.gradient(current, start.number)
        if self.term is not None:
            self.term(grad, theta, row, self.offsets)
        if self.config.clip_norm is not None:
            clip_rows(grad, self.config.clip_norm)
        if self.gradient_noise:
            noise_keys = send(fold_in(current.row_keys, _NOISE), device)
            grad.add_(keyed_normal(noise_keys, grad.shape[1]).to(grad.dtype), alpha=self.gradient_noise)
        self.optimizer.step(theta, grad, active, self.config.optimizer.lr * start.lr_factor)

    def _own_part(self, current: Pass) -> Pass:
        """The columns of a pass that this rank computes: all, unless a group shares its lanes."""
        mesh = self.runtime.mesh
        return current.part(mesh.place, mesh.size) if mesh is not None and mesh.is_shared else current

    def _sum_over_group(self, losses: torch.Tensor) -> torch.Tensor:
        """Adds up the gradients [R, W] and the losses [R] of a group that shares its lanes, by one all-reduce."""
        grad = self.rule.rows.grad
        both = self.runtime.mesh.sum(torch.cat([grad, losses.unsqueeze(1).to(grad.dtype)], dim=1))
        grad.copy_(both[:, :-1])
        return both[:, -1].to(losses.dtype)


def with_next(passes: Iterator[Pass]) -> Iterator[tuple[Pass, Pass | None]]:
    """Each pass with the one after it; None after the last."""
    current = next(passes, None)
    while current is not None:
        upcoming = next(passes, None)
        yield current, upcoming
        current = upcoming
