"""The memory that a rank takes at its peak, from shapes alone.

A local step and an evaluation run on fake tensors, which have shapes, types and lifetimes but no values. The bytes of
all tensors alive at a time are added up. So the figures follow the code that runs, for any backbone and method, and a
model of billions of parameters takes seconds. What a library takes for itself inside a kernel does not show.

Shapes: L lanes, R rows, B batch, C channels, H x W pixels, P trainable parameters, W columns of the parameter matrix.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedpeft_dist.algorithms import find_algorithm
from fedpeft_dist.algorithms.server_optimizers import make_server_optimizer
from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.setup import LANE_BY_LANE
from fedpeft_dist.lanes.attention import use_plain_attention
from fedpeft_dist.lanes.onednn import choose_products, use_onednn
from fedpeft_dist.lanes.optimizers import LaneAdamW, LaneSgd, clip_rows, make_lane_optimizer
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods import build_lane_model, make_method
from fedpeft_dist.methods.compiled import repeated_blocks
from fedpeft_dist.methods.lane_model import LaneModel, LaneModule, VmapLaneModel
from fedpeft_dist.methods.merged import MergedModel, can_merge
from fedpeft_dist.methods.quantized import quantize_frozen
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.gradients import MeanGradient, row_losses
from fedpeft_dist.training.lane_count import PRIVATE_STATE_BYTES, LiveTensors

CPU = torch.device("cpu")
SUMMING = 5
"""Vectors of P 64-bit numbers alive while an update is added to a round's sums."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank, by what they hold."""

    weights: int
    """The backbone, and the tensors of its own that evaluation merges the trained parameters into."""
    parameters: int
    """The lanes' parameters, with their copy in the compute type."""
    gradients: int
    optimizer: int
    """What the client optimizer, the algorithm or privacy keeps for each lane."""
    server: int
    """The global vector, the round's sums, the server optimizer."""
    activations: int
    """The most that a local step takes beside all of these."""
    evaluation: int
    """The most that the evaluation of a batch, or adding an update up, takes beside all of these."""

    @property
    def lanes(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def step(self) -> int:
        """What grows with the lanes: their own matrices, and what a local step takes beside them."""
        return self.lanes + self.activations

    @property
    def total(self) -> int:
        return self.weights + self.lanes + self.server + max(self.activations, self.evaluation)


@dataclass(frozen=True)
class Blocks:
    """What sharding spreads over a group of ranks: the matrices of the backbone's repeated blocks."""

    forward: int
    """Bytes that a group gathers in a forward pass: all matrices."""
    backward: int
    """Bytes that a group gathers again in a backward pass: those from the first trained block on."""
    largest: int
    """Bytes of the largest block. Two blocks are whole at a time."""


class Outline:
    """A run's model without values.

    Args:
        precision: fp32, bf16 or fp16.
        is_cuda: leaves out the ways in which only the CPU computes.

    Raises:
        ConfigError: the backbone cannot be made, or the method does not fit it.
    """

    def __init__(self, config: RunConfig, num_classes: int, precision: str, is_cuda: bool):
        self.config, self.is_cuda = config, is_cuda
        # CUDA's casts in a transformer are the CPU's, and fp16 takes the memory of bf16.
        self.runtime = Runtime(Launch(), CPU, "bf16" if precision == "fp16" else precision, threads=1)
        self.is_onednn = not is_cuda and choose_products(config.runtime.products, self.runtime) == "onednn"
        self.model = build_lane_model(config, num_classes, device="meta")
        self.model.initial_vector = lambda: torch.empty(self.model.layout.num_parameters, device="meta")
        self.copies = self._merged_copies()
        """Bytes of the weights that evaluation merges, if they are whole on each rank and not in 8 bits."""
        self.evaluated = self._prepare()
        self.has_backward: set[nn.Module] = set()
        """The repeated blocks that a backward pass goes through."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.weights = self._give_fakes()

    def measure(self, num_lanes: int, batch_size: int) -> Footprint:
        """The memory of a rank that trains L lanes in batches of B."""
        layout, privacy, rows, samples = self.model.layout, self.config.privacy, num_lanes, batch_size
        own = num_lanes * layout.width * (4 if find_algorithm(self.config)[1].vectors_sent > 1 else 0)
        if is_private := privacy.name == "sample":
            rows, samples = num_lanes * batch_size if privacy.slots == "auto" else privacy.slots, 1
            own += PRIVATE_STATE_BYTES * num_lanes * layout.width
        with self.mode, LiveTensors() as tensors:
            rule = MeanGradient(layout, rows, self.runtime)
            parameters = sum(matrix.nbytes for matrix in (rule.rows.theta, rule.rows.low) if matrix is not None)
            gradients = tensors.live - parameters
            optimizer = None if is_private else make_lane_optimizer(self.config.client.optimizer, rule.theta)
            kept = tensors.live
            self._train(rule, optimizer, samples)
        return Footprint(
            weights=self.weights,
            parameters=parameters,
            gradients=gradients,
            optimizer=kept - parameters - gradients + own,
            server=self._server(),
            activations=tensors.peak - kept,
            evaluation=max(self._evaluation, SUMMING * 8 * layout.num_parameters),
        )

    def weights_as(self, quantize: str, is_sharded: bool) -> tuple[int, Blocks]:
        """The bytes of all weights, and those of the blocks, if they were kept so. To be asked after `measure`.

        Args:
            is_sharded: ranks gather weights, so that evaluation has no merged copies of them.
        """
        model, itemsize = self.model.backbone.model, self.runtime.compute_dtype.itemsize

        def size(layer: nn.Module) -> int:
            """Bytes of a layer's own matrices."""
            if isinstance(layer, nn.Linear):
                return layer.in_features * layer.out_features * (1 if quantize == "int8" else itemsize)
            return sum(parameter.nbytes for parameter in layer.parameters(recurse=False) if parameter.dim() >= 2)

        sizes = {block: sum(map(size, block.modules())) for block in repeated_blocks(model)}
        backward = sum(own for block, own in sizes.items() if block in self.has_backward)
        weights = self.weights
        if isinstance(self.evaluated, MergedModel):
            weights -= self.copies
        if quantize == "none" and not is_sharded:
            weights += self.copies
        for layer in filter(lambda module: isinstance(module, nn.Linear), model.modules()):
            scales = layer.out_features * itemsize if quantize == "int8" else 0
            now = {"weight", "values", "scale"} & layer._parameters.keys()
            weights += size(layer) + scales - sum(layer._parameters[name].nbytes for name in now)
        return weights, Blocks(sum(sizes.values()), backward, max(sizes.values(), default=0))

    def _prepare(self) -> LaneModel:
        """Readies the model as a run does; returns the one to evaluate with."""
        sharding, backbone, method = self.config.runtime.sharding, self.model.backbone, make_method(self.config.method)
        meta = Runtime(Launch(), torch.device("meta"), self.runtime.precision, threads=1)
        if is_quantized := sharding.quantize != "none":
            quantize_frozen(backbone.model, backbone.plain, meta.compute_dtype)
        freeze(backbone.model, meta.compute_dtype, meta.device)
        if not isinstance(self.model, VmapLaneModel):
            self._fit_to_cpu(backbone.model)
        elif self.is_onednn and self.model.layout.num_parameters >= LANE_BY_LANE:
            self._fit_to_cpu(backbone.model, is_trained=True)
            self.model.lane_by_lane = True
        if not can_merge(method, self.runtime, are_plain=not (is_quantized or sharding.is_on)):
            return self.model
        return MergedModel(self.model, method, meta, self._fit_to_cpu)

    def _merged_copies(self) -> int:
        method = make_method(self.config.method)
        if method.merges_exactly or not can_merge(method, self.runtime):
            return 0
        own = dict(self.model.backbone.plain.named_parameters())
        merged = method.merge(own, self.model.layout.split(self.model.initial_vector()))
        return sum(tensor.nbytes for name, tensor in merged.items() if tensor is not own[name])

    def _fit_to_cpu(self, model: nn.Module, is_trained: bool = False) -> None:
        if not self.is_cuda:
            use_plain_attention(model, self.runtime.compute_dtype)
        if self.is_onednn:
            use_onednn(model, is_trained)

    def _give_fakes(self) -> int:
        """Puts fake tensors on the CPU in the place of those on the meta device; returns the bytes of all."""
        fakes: dict[torch.Tensor, torch.Tensor] = {}

        def fake(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is not None and tensor not in fakes:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                fakes[tensor] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            return None if tensor is None else fakes[tensor]

        models = [self.model.backbone.model, self.model.backbone.plain]
        if isinstance(self.evaluated, MergedModel):
            models.append(self.evaluated.plain)
            for own in (self.evaluated.base, self.evaluated.own):
                own.update({name: fake(tensor) for name, tensor in own.items()})
        for module in {module: None for model in models for module in model.modules()}:
            for own in (module._parameters, module._buffers):
                own.update({name: fake(tensor) for name, tensor in own.items()})
        return sum(tensor.nbytes for tensor in fakes.values())

    def _train(self, rule: MeanGradient, optimizer: LaneSgd | LaneAdamW | None, samples: int) -> None:
        """A local step on all rows, with a batch of so many samples each."""
        self.model.bind(rule.rows)
        images, keys = self._images(len(rule.theta), samples), None
        if self.config.data.augment != "none" or self.model.is_random:
            keys = torch.zeros(images.shape[:2], dtype=torch.int64)
        hooks = [
            block.register_forward_pre_hook(self._note_backward) for block in repeated_blocks(self.model.backbone.model)
        ]
        with self.runtime.autocast():
            logits = self.model.logits(images, keys)
        for hook in hooks:
            hook.remove()
        labels, mask = (torch.ones(images.shape[:2], dtype=dtype) for dtype in (torch.int64, torch.bool))
        rule.scaled(row_losses(logits, labels, mask, mask.sum(dim=1))).sum().backward()
        del logits, images
        if optimizer is not None:
            grad = rule.rows.grad
            if self.config.client.clip_norm is not None:
                clip_rows(grad, self.config.client.clip_norm)
            optimizer.step(rule.theta, grad, rule.everyone, self.config.client.optimizer.lr)

    def _note_backward(self, block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].requires_grad or any(isinstance(module, LaneModule) for module in block.modules()):
            self.has_backward.add(block)

    @cached_property
    def _evaluation(self) -> int:
        """Bytes that the evaluation of a batch takes."""
        with self.mode, LiveTensors() as tensors, torch.no_grad():
            parameters = LaneParameters(
                self.model.layout, 1, CPU, with_grad=False, compute_dtype=self.runtime.compute_dtype
            )
            self.evaluated.bind(parameters)
            with self.runtime.autocast():
                self.evaluated.logits(self._images(1, self.config.runtime.evaluate_batch))
        return tensors.peak

    def _images(self, rows: int, samples: int) -> torch.Tensor:
        """Images as a store gives them, [R, samples, C, H, W]: made of others, without their mean."""
        backbone = self.model.backbone
        return torch.empty(rows, samples, backbone.channels, backbone.image_size, backbone.image_size) - 0.0

    def _server(self) -> int:
        size, (_, section) = self.model.layout.num_parameters, find_algorithm(self.config)
        with self.mode:
            own = make_server_optimizer(self.config.server.optimizer).initial_state(size, CPU)
            moments = sum(tensor.nbytes for tensor in own.values())
        # The state's vector, the initial one, and that with padding; then the sums in 64 bits.
        return 4 * (2 * size + self.model.layout.width) + 8 * section.vectors_sent * size + moments
