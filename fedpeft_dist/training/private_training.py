"""Local training under sample-level privacy: DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1) in every client.

A sample is a lane: the model runs with R lanes of one sample each, every one with its client's parameters, so gradients
come out per sample, for any method. They are clipped, summed exactly as integers, and a client's step takes their sum
plus noise, divided by the number of samples to expect.

Shapes: L lanes, R slots, K classes, P trainable parameters, W columns of the parameter matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fedpeft_dist.config.schema import ClientConfig, SamplePrivacy
from fedpeft_dist.data.pixels import send
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.lanes.optimizers import add_proximal, make_lane_optimizer
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.lanes.random import fold_in
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.privacy.mechanisms import clip_factors, column_blocks, grid_bits, noise_on_grid, row_norms, truncate
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.lane_schedule import ClientTask
from fedpeft_dist.training.local_training import ClientUpdate, lane_losses, with_next
from fedpeft_dist.training.sample_schedule import BatchDraw, Pass, schedule_samples

_LOSS_BITS = 32
_LOSS_LIMIT = 1024.0


class PrivateTrainer:
    """Trains a shard of clients on L lanes, whose samples share R slots.

    Args:
        model: the backbone with its method; bound to this trainer's rows while it trains.
        store: the training images.
        noise_multipliers: float64 [N], each client's, on the host.
        largest_client: the number of samples of the largest client of the population.
        noise_seed: what batches and noise follow from; no other release may have used it.
        num_lanes: L.
        num_slots: R.
        dtype: of the parameter matrices; float32 in a run.
        compile_model: runs the model through torch.compile.
    """

    def __init__(
        self,
        model: LaneModel,
        store: DeviceStore,
        config: ClientConfig,
        privacy: SamplePrivacy,
        noise_multipliers: torch.Tensor,
        largest_client: int,
        runtime: Runtime,
        seed: int,
        noise_seed: int,
        num_lanes: int,
        num_slots: int,
        dtype: torch.dtype = torch.float32,
        compile_model: bool = False,
    ):
        self.model, self.store, self.config, self.runtime, self.seed = model, store, config, runtime, seed
        self.privacy, self.noise_multipliers, self.noise_seed = privacy, noise_multipliers, noise_seed
        self.draw = BatchDraw(config.batch_size, privacy.max_batch, privacy.secure_noise)
        device = runtime.device
        self.samples = LaneParameters(model.layout, num_slots, device, dtype)
        self.theta = torch.zeros(num_lanes, model.layout.width, device=device, dtype=dtype)
        self.grad = torch.zeros_like(self.theta)
        self.optimizer = make_lane_optimizer(config.optimizer, self.theta)
        self.sums = torch.zeros(num_lanes, model.layout.width, device=device, dtype=torch.int64)
        self.loss_sums = torch.zeros(num_lanes, device=device, dtype=torch.int64)
        self.samples_seen = [0] * num_lanes
        self.bits = grid_bits(largest_client * privacy.clip_norm, privacy.clip_norm * float(noise_multipliers.max()))
        self.logits = torch.compile(model.logits) if compile_model else model.logits

    def train(
        self,
        tasks: Sequence[ClientTask],
        global_vector: torch.Tensor,
        round_number: int,
        lr_factor: float = 1.0,
        is_dropped: Callable[[], bool] = lambda: False,
    ) -> Iterator[ClientUpdate]:
        """Yields each client's update as soon as it is done, as `LocalTrainer.train` does.

        An update's delta is private; its loss and number of samples are not.
        """
        self.model.bind(self.samples)
        start = self.model.layout.pad(global_vector.to(self.theta.dtype))
        num_lanes, num_slots = len(self.theta), self.samples.num_lanes
        seeds = (self.seed, self.noise_seed)
        passes = schedule_samples(tasks, num_lanes, num_slots, self.draw, *seeds, round_number)
        for current, upcoming in with_next(passes):
            if is_dropped():
                return
            for lane, _ in current.starting:
                self._load(lane, start)
            if current.mask.any():
                self._add_gradients(current, upcoming)
            if current.stepping:
                self._step(current, start, lr_factor)
            for lane, task in current.finished:
                delta = self.model.layout.unpad(self.theta[lane] - start)
                loss = self.loss_sums[lane].double() * 2.0**-_LOSS_BITS
                loss = (loss / (task.num_steps * self.draw.expected(len(task.samples)))).float()
                yield ClientUpdate(task.client, task.weight, delta, loss, self.samples_seen[lane])
        self.samples.assert_views_alive()

    def _load(self, lane: int, start: torch.Tensor) -> None:
        """A client starts at the global parameters with a fresh optimizer, whoever was in the lane before."""
        self.theta[lane].copy_(start)
        self.optimizer.reset(lane)
        self.sums[lane] = 0
        self.loss_sums[lane] = 0
        self.samples_seen[lane] = 0

    def _add_gradients(self, current: Pass, upcoming: Pass | None) -> None:
        """Adds the clipped gradient of every slot's sample to its lane's sum."""
        device = self.runtime.device
        lanes, mask = send(current.lanes, device), send(current.mask, device).unsqueeze(1)
        keys = send(fold_in(current.step_keys, current.indices).unsqueeze(1), device)
        torch.index_select(self.theta, 0, lanes, out=self.samples.theta)
        images, labels = self.store.batch(current.indices.unsqueeze(1), keys)
        if upcoming is not None:
            self.store.prefetch(upcoming.indices)
        self.samples.grad.zero_()
        with self.runtime.autocast():
            logits = self.logits(images.to(self.theta.dtype), keys)
        losses = lane_losses(logits, labels, mask)
        losses.sum().backward()
        clipped_sums(self.samples.grad, mask.squeeze(1), lanes, self.privacy.clip_norm, self.bits, self.sums)
        shown = torch.nan_to_num(losses.detach().double(), nan=_LOSS_LIMIT).clamp(max=_LOSS_LIMIT)
        self.loss_sums.index_add_(0, lanes, (shown * 2.0**_LOSS_BITS).to(torch.int64))
        for lane in current.lanes[current.mask].tolist():
            self.samples_seen[lane] += 1

    def _step(self, current: Pass, start: torch.Tensor, lr_factor: float) -> None:
        """One optimizer step of the lanes whose batch is through."""
        device, num_lanes = self.runtime.device, len(self.theta)
        lanes = torch.tensor([lane for lane, _, _ in current.stepping])
        keys = torch.tensor([key for _, _, key in current.stepping])
        expected = torch.tensor([self.draw.expected(len(task.samples)) for _, task, _ in current.stepping]).double()
        multipliers = self.noise_multipliers[[task.client for _, task, _ in current.stepping]]
        assert (multipliers > 0).all(), "a client without noise"
        active = torch.zeros(num_lanes, 1, dtype=torch.bool).index_fill_(0, lanes, True)
        lanes, keys, expected, multipliers, active = (
            send(tensor, device) for tensor in (lanes, keys, expected, multipliers, active)
        )
        deviations = multipliers * self.privacy.clip_norm
        noise = noise_on_grid(keys, self.theta.shape[1], deviations, self.bits, self.privacy.secure_noise)
        noisy = (self.sums[lanes] + noise).double() * 2.0**-self.bits
        self.grad[lanes] = (noisy / expected.unsqueeze(1)).to(self.grad.dtype)
        self.sums.index_fill_(0, lanes, 0)
        if self.config.proximal:
            add_proximal(self.grad, self.theta, start, self.config.proximal)
        self.optimizer.step(self.theta, self.grad, active, self.config.optimizer.lr * lr_factor)


def clipped_sums(
    grad: torch.Tensor, mask: torch.Tensor, lanes: torch.Tensor, clip_norm: float, bits: int, sums: torch.Tensor
) -> None:
    """Adds every sample's gradient, clipped to C, to its lane's sum, in multiples of 2^-bits.

    A gradient that is not finite counts as zero.

    Args:
        grad: [R, W], a row a sample.
        mask: bool [R]: the rows that count.
        lanes: int64 [R], each row's.
        sums: int64 [L, W], in place.
    """
    factors = torch.where(mask, clip_factors(row_norms(grad), clip_norm), 0.0)
    for columns in column_blocks(grad):
        sums[:, columns].index_add_(0, lanes, truncate(grad[:, columns], factors, bits))
