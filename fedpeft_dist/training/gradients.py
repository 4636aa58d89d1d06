"""Gradient rules: what a client steps on. The mean over its batch, or a noisy sum of clipped per-sample gradients.

A rule owns the rows that the model computes with. Without privacy a row is a lane. With DP-SGD (Abadi et al. 2016,
arXiv 1607.00133, algorithm 1) a row is one sample with its client's parameters, so that gradients come out per sample,
for any method. They are clipped and summed exactly, as integers; a client steps on the sum plus noise, divided by the
expected batch size.

Shapes: L lanes, R rows, B batch, K classes, W columns of the parameter matrix.
"""

import torch

from fedpeft_dist.config.schema import SamplePrivacy
from fedpeft_dist.data.store import send
from fedpeft_dist.lanes.optimizers import LaneLossScale
from fedpeft_dist.lanes.parameters import LaneParameters, ParameterLayout
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.privacy.mechanisms import clip_factors, column_blocks, grid_bits, noise_on_grid, row_norms, truncate
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.batches import PoissonBatches
from fedpeft_dist.training.schedule import Pass, Seated

_LOSS_BITS = 32
_LOSS_LIMIT = 1024.0


class MeanGradient:
    """The gradient of each lane's mean loss. In fp16 each lane has a loss scale of its own.

    Args:
        dtype: the parameters' type; float32 in a run, float64 in tests.
    """

    def __init__(self, layout: ParameterLayout, num_lanes: int, runtime: Runtime, dtype: torch.dtype = torch.float32):
        self.rows = LaneParameters(layout, num_lanes, runtime.device, dtype, compute_dtype=runtime.compute_dtype)
        """The parameters that the model computes with, [R, W], and their gradients."""
        self.theta = self.rows.theta
        """[L, W], the clients' parameters."""
        self.loss_scale = LaneLossScale(num_lanes, runtime.device) if runtime.precision == "fp16" else None
        self.loss_sums = torch.zeros(num_lanes, device=runtime.device)
        self.everyone = torch.ones(num_lanes, 1, dtype=torch.bool, device=runtime.device)
        self.active = self.everyone

    def start_client(self, lane: int) -> None:
        """A new client is in the lane; its parameters are loaded already."""
        self.loss_sums[lane].zero_()  # `[lane] = 0` would wait for the GPU
        if self.loss_scale is not None:
            self.loss_scale.reset(lane)

    def prepare(self, current: Pass) -> None:
        """Readies `rows` for a forward and a backward pass."""
        self.rows.refresh()

    def scaled(self, losses: torch.Tensor) -> torch.Tensor:
        """The rows' losses [R] as the backward pass takes them."""
        return losses if self.loss_scale is None else losses * self.loss_scale.scale

    def add(self, current: Pass, losses: torch.Tensor, mask: torch.Tensor) -> None:
        """Takes in the gradients of a backward pass; losses [R] are the rows' own, mask is bool [R, B]."""
        if self.loss_scale is None and current.sizes.all():
            self.active = self.everyone
        else:
            self.active = mask.any(dim=1, keepdim=True)
            if self.loss_scale is not None:
                self.active = self.loss_scale.unscale(self.rows.grad, self.active)
            # A step that overflowed in fp16 is not taken. Its loss may not be finite, and counts as 0.
            losses = torch.where(self.active.squeeze(1), losses, 0.0)
        self.loss_sums += losses.float()

    def gradient(self, current: Pass, round_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient [L, W] to step on, and which lanes step: bool [L, 1]."""
        return self.rows.grad, self.active

    def mean_loss(self, client: Seated) -> torch.Tensor:
        """The mean training loss of a client that has finished: a float32 scalar."""
        return self.loss_sums[client.lane] / client.task.num_steps


class NoisyGradient(MeanGradient):
    """DP-SGD's gradient: per-sample gradients, clipped and summed, plus noise, over the expected batch size.

    Args:
        num_lanes: L.
        num_slots: R.
        batches: how clients draw their batches; its seed is also the noise's, which no other release may have used.
        noise_multipliers: float64 [N], one for each client, on the host.
        largest_client: the number of samples of the population's largest client.
        dtype: the parameters' type; float32 in a run, float64 in tests.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        num_lanes: int,
        num_slots: int,
        privacy: SamplePrivacy,
        batches: PoissonBatches,
        noise_multipliers: torch.Tensor,
        largest_client: int,
        runtime: Runtime,
        dtype: torch.dtype = torch.float32,
    ):
        self.privacy, self.batches, self.noise_multipliers = privacy, batches, noise_multipliers
        super().__init__(layout, num_slots, runtime, dtype)
        self.theta = torch.zeros(num_lanes, layout.width, device=runtime.device, dtype=dtype)
        self.grad = torch.zeros_like(self.theta)
        self.sums = torch.zeros_like(self.theta, dtype=torch.int64)
        self.loss_sums = torch.zeros(num_lanes, device=runtime.device, dtype=torch.int64)
        noise = privacy.clip_norm * float(noise_multipliers.max())
        self.bits = grid_bits(largest_client * privacy.clip_norm, noise)

    def start_client(self, lane: int) -> None:
        super().start_client(lane)
        self.sums[lane].zero_()

    def prepare(self, current: Pass) -> None:
        torch.index_select(self.theta, 0, send(current.lanes, self.theta.device), out=self.rows.theta)
        super().prepare(current)

    def add(self, current: Pass, losses: torch.Tensor, mask: torch.Tensor) -> None:
        lanes = send(current.lanes, self.theta.device)
        clipped_sums(self.rows.grad, mask.squeeze(1), lanes, self.privacy.clip_norm, self.bits, self.sums)
        shown = torch.nan_to_num(losses.double(), nan=_LOSS_LIMIT).clamp(max=_LOSS_LIMIT)
        self.loss_sums.index_add_(0, lanes, (shown * 2.0**_LOSS_BITS).to(torch.int64))

    def gradient(self, current: Pass, round_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        device, clients = self.theta.device, current.stepping
        lanes = torch.tensor([client.lane for client in clients])
        keys = torch.tensor([self._noise_key(client, round_number) for client in clients])
        expected = torch.tensor([self.batches.expected(len(client.task.samples)) for client in clients]).double()
        multipliers = self.noise_multipliers[[client.task.client for client in clients]]
        assert (multipliers > 0).all(), "a client without noise"
        active = torch.zeros(len(self.theta), 1, dtype=torch.bool).index_fill_(0, lanes, True)
        lanes, keys, expected, multipliers, active = (
            send(tensor, device) for tensor in (lanes, keys, expected, multipliers, active)
        )
        deviations = multipliers * self.privacy.clip_norm
        noise = noise_on_grid(keys, self.theta.shape[1], deviations, self.bits, self.privacy.secure_noise)
        noisy = (self.sums[lanes] + noise).double() * 2.0**-self.bits
        self.grad[lanes] = (noisy / expected.unsqueeze(1)).to(self.grad.dtype)
        self.sums.index_fill_(0, lanes, 0)
        return self.grad, active

    def mean_loss(self, client: Seated) -> torch.Tensor:
        loss = self.loss_sums[client.lane].double() * 2.0**-_LOSS_BITS
        task = client.task
        return (loss / (task.num_steps * self.batches.expected(len(task.samples)))).float()

    def _noise_key(self, client: Seated, round_number: int) -> int:
        secret = derive_seed(self.batches.seed, "client", round_number, client.task.client)
        return derive_seed(secret, "noise", client.step)


def clipped_sums(
    grad: torch.Tensor, mask: torch.Tensor, lanes: torch.Tensor, clip_norm: float, bits: int, sums: torch.Tensor
) -> None:
    """Adds every sample's gradient, clipped to norm C, to its lane's sum, in multiples of 2^-bits.

    A gradient that is not finite counts as zero.

    Args:
        grad: [R, W], one row for each sample.
        mask: bool [R]: the rows that count.
        lanes: int64 [R], the lane of each row.
        sums: int64 [L, W], changed in place.
    """
    factors = torch.where(mask, clip_factors(row_norms(grad), clip_norm), 0.0)
    for columns in column_blocks(grad):
        sums[:, columns].index_add_(0, lanes, truncate(grad[:, columns], factors, bits))


def row_losses(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row: the mean over its samples, or 0 for a row without samples.

    Args:
        logits: [R, B, K]; computed in float32, or in float64 if they are float64.
        labels: int64 [R, B].
        mask: bool [R, B].
        sizes: [R], the samples of each row, but at least 1.

    Returns:
        [R].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = torch.where(mask, losses.view(mask.shape), 0.0)
    return losses.sum(dim=1) / sizes
