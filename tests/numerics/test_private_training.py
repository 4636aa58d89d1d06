"""Sample-level privacy against DP-SGD written out: one sample at a time, one client after another, plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedpeft_dist.config.schema import SamplePrivacy
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.privacy.mechanisms import keyed_normal
from fedpeft_dist.training.batches import PoissonBatches
from fedpeft_dist.training.gradients import NoisyGradient
from fedpeft_dist.training.schedule import Schedule
from fedpeft_dist.training.trainer import RoundStart, Trainer

from .cases import (
    MEAN,
    METHODS,
    OPTIMIZERS,
    ROUND,
    SEED,
    STD,
    VIT,
    assert_same_delta,
    client_config,
    make_algorithm,
    make_images,
    make_lane_model,
    make_model,
    make_runtime,
    make_store,
    make_tasks,
    start_vector,
)
from .plain import make_optimizer, make_plain

LANES, SLOTS, BATCH = 3, 5, 4
SIZES, STEPS = (9, 3, 6, 1, 11), (4, 2, 3, 3, 3)
NOISE_SEED = 77
NOISE = torch.tensor([0.5, 1.0, 0.3, 2.0, 0.8], dtype=torch.float64)


def make_private_trainer(
    lane_model, images, client, clip_norm=1.0, noise=NOISE, lanes=LANES, slots=SLOTS, dtype=torch.float64, **privacy
) -> Trainer:
    config = SamplePrivacy(name="sample", clip_norm=clip_norm, noise_multiplier=1.0, **privacy)
    batches = PoissonBatches(client.batch_size, NOISE_SEED, config.max_batch, config.secure_noise)
    rule = NoisyGradient(
        lane_model.layout,
        lanes,
        slots,
        privacy=config,
        batches=batches,
        noise_multipliers=noise,
        largest_client=max(SIZES),
        runtime=make_runtime(),
        dtype=dtype,
    )
    return Trainer(
        lane_model,
        make_store(images),
        client,
        make_runtime(),
        schedule=Schedule(lanes, batches, SEED, slots),
        rule=rule,
        term=make_algorithm(lane_model.layout.num_parameters, client.proximal).add_to_gradient,
    )


def plain_gradient(plain, image, label) -> list[torch.Tensor]:
    loss = F.cross_entropy(plain.model(image.unsqueeze(0)), label.unsqueeze(0))
    return list(torch.autograd.grad(loss, list(plain.trainable.values())))


def plain_private_training(plain, layout, start, images, task, client, clip_norm, noise_multiplier, optimizer):
    """The client's delta by name, and the norms of the gradients met."""
    plain.load(start)
    parameters = list(plain.trainable.values())
    optimizer = make_optimizer(parameters, optimizer)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    batches = PoissonBatches(client.batch_size, NOISE_SEED)
    key, norms = derive_seed(NOISE_SEED, "client", ROUND, task.client), []
    for step in range(task.num_steps):
        total = [torch.zeros_like(p) for p in parameters]
        for index in batches.draw(task.samples, derive_seed(key, "draw", step)):
            image = ((images.images[index] / 255 - mean) / std).double()
            gradient = plain_gradient(plain, image, images.labels[index])
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
            norms.append(norm)
            for part, g in zip(total, gradient):
                part += g * min(1.0, clip_norm * (1 - 2**-20) / norm)
        noise_key = torch.tensor([derive_seed(key, "noise", step)])
        noise = layout.split(layout.unpad(keyed_normal(noise_key, layout.width)[0]))
        for (name, p), part in zip(plain.trainable.items(), total):
            p.grad = (part + noise_multiplier * clip_norm * noise[name]) / min(BATCH, len(task.samples))
        optimizer.step()
    after = plain.values()
    return {name: after[name] - value for name, value in start.items()}, norms


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_gradients_are_those_of_single_backward_passes(method):
    """float64, to 1e-9 of the largest; every sample in a slot of its own, for clients at different parameters."""
    model, images = make_model(*VIT), make_images()
    lane_model = make_lane_model(model, METHODS[method], dtype=torch.float64)
    plain = make_plain(model, METHODS[method], ("head",))
    plain.model.double()
    layout = lane_model.layout
    trainer = make_private_trainer(lane_model, images, client_config(OPTIMIZERS["sgd"], BATCH), slots=6)
    lane_model.bind(trainer.rule.rows)
    vectors = [start_vector(lane_model, torch.float64, noise) for noise in (0.1, 0.2)]
    samples, lanes = torch.tensor([3, 8, 1, 20, 33, 7]), [0, 1, 1, 0, 0, 1]
    for slot, lane in enumerate(lanes):
        trainer.rule.rows.load(slot, layout.pad(vectors[lane]))
    pixels, labels = trainer.store.batch(samples.unsqueeze(1))
    F.cross_entropy(lane_model.logits(pixels.double()).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for slot, (sample, lane) in enumerate(zip(samples, lanes)):
        plain.load(layout.split(vectors[lane]))
        image = ((images.images[sample] / 255 - mean) / std).double()
        expected = dict(zip(plain.trainable, plain_gradient(plain, image, images.labels[sample])))
        actual = layout.split(layout.unpad(trainer.rule.rows.grad[slot]))
        assert_same_delta(actual, {name: expected[name] for name in actual}, 1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_dp_sgd_written_out(method, optimizer):
    """Ragged clients, batches of several passes, a bound that some gradients exceed, and each client's own noise."""
    model, images, tasks = make_model(*VIT), make_images(), make_tasks(SIZES, STEPS)
    lane_model = make_lane_model(model, METHODS[method], dtype=torch.float64)
    vector, layout = start_vector(lane_model, torch.float64), lane_model.layout
    client = client_config(OPTIMIZERS[optimizer], BATCH)
    clip_norm = {"full": 12.0, "head": 5.0, "ia3": 5.0, "prefix": 5.0, "vera": 5.0, "fact-tk": 5.0}.get(method, 7.0)
    trainer = make_private_trainer(lane_model, images, client, clip_norm)
    updates = {update.client: update for update in trainer.train(tasks, RoundStart(ROUND, vector))}
    plain = make_plain(model, METHODS[method], ("head",))
    plain.model.double()
    all_norms = []
    for task in tasks:
        expected, norms = plain_private_training(
            plain,
            layout,
            layout.split(vector),
            images,
            task,
            client,
            clip_norm,
            float(NOISE[task.client]),
            OPTIMIZERS[optimizer],
        )
        all_norms += norms
        assert_same_delta(layout.split(updates[task.client].delta), expected, 1e-9)
        assert updates[task.client].weight == len(task.samples)
        assert updates[task.client].num_samples == len(norms)
    assert min(all_norms) < clip_norm < max(all_norms)


@pytest.mark.parametrize("lanes_and_slots", [(1, 1), (2, 3), (5, 20)])
@pytest.mark.parametrize("method", ["full", "bias", "adapter-shared", "lora-all", "prompt-deep"])
def test_a_client_does_not_depend_on_its_neighbours(method, lanes_and_slots):
    """The same bits with others and alone, in whichever lane, for a fixed number of slots."""
    lanes, slots = lanes_and_slots
    model, images, tasks = make_model(*VIT), make_images(), make_tasks(SIZES, STEPS)
    lane_model = make_lane_model(model, METHODS[method])
    client = client_config(OPTIMIZERS["adamw"], BATCH, proximal=0.1)
    trainer = make_private_trainer(lane_model, images, client, lanes=lanes, slots=slots, dtype=torch.float32)
    vector = start_vector(lane_model)
    together = {update.client: update for update in trainer.train(tasks, RoundStart(ROUND, vector))}
    for order in (tasks[::-1], tasks[2:3], tasks[4:] + tasks[:1]):
        for update in trainer.train(order, RoundStart(ROUND, vector)):
            assert torch.equal(update.delta, together[update.client].delta)
            assert torch.equal(update.loss, together[update.client].loss)


def test_an_empty_batch_is_a_step_of_noise():
    model, images = make_model(*VIT), make_images()
    lane_model = make_lane_model(model, METHODS["head"], dtype=torch.float64)
    (task,) = make_tasks((11,), (1,))
    batches = PoissonBatches(1, NOISE_SEED)
    round_number = next(number for number in range(1000) if not len(next(batches.of(task.samples, 0, number))))
    client = client_config({"name": "sgd", "lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}, 1)
    trainer = make_private_trainer(lane_model, images, client, clip_norm=2.0)
    (update,) = trainer.train([task], RoundStart(round_number, start_vector(lane_model, torch.float64)))
    key = derive_seed(derive_seed(NOISE_SEED, "client", round_number, 0), "noise", 0)
    noise = lane_model.layout.unpad(keyed_normal(torch.tensor([key]), lane_model.layout.width)[0])
    torch.testing.assert_close(update.delta, -0.5 * 2.0 * float(NOISE[0]) * noise, rtol=0, atol=1e-9)
    assert update.num_samples == 0


def test_a_gradient_that_is_not_finite_counts_as_zero():
    """A sample whose image is beyond float32 spoils nothing but its own contribution."""
    model, images = make_model(*VIT), make_images()
    lane_model = make_lane_model(model, METHODS["bias"])
    client = client_config({**OPTIMIZERS["sgd"], "weight_decay": 0.0}, 11)
    (task,) = make_tasks((11,), (1,))
    trainer = make_private_trainer(lane_model, images, client, dtype=torch.float32, noise=NOISE * 1e-9)
    vector, batch = start_vector(lane_model), trainer.store.batch

    def spoil(indices, keys=None):
        pixels, labels = batch(indices, keys)
        return torch.where((indices == 4).view(-1, 1, 1, 1, 1), torch.inf, pixels), labels

    trainer.store.batch = spoil
    (spoiled,) = trainer.train([task], RoundStart(ROUND, vector))
    trainer.store.batch = batch
    without = type(task)(task.client, task.samples[task.samples != 4], 1, 10)
    (expected,) = trainer.train([without], RoundStart(ROUND, vector))
    assert spoiled.delta.isfinite().all()
    torch.testing.assert_close(spoiled.delta, expected.delta * 10 / 11, rtol=1e-3, atol=1e-6)


def test_the_delta_without_noise_is_bounded_by_the_clip_norm():
    """One step of plain SGD at rate 1: whatever the data, no delta is longer than C times the samples drawn."""
    model, images = make_model(*VIT), make_images()
    lane_model = make_lane_model(model, METHODS["full"], dtype=torch.float64)
    client = client_config({"name": "sgd", "lr": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}, 9)
    trainer = make_private_trainer(lane_model, images, client, clip_norm=1e-3, noise=NOISE * 1e-9)
    (task,) = make_tasks((9,), (1,))
    (update,) = trainer.train([task], RoundStart(ROUND, start_vector(lane_model, torch.float64)))
    assert 1e-5 < update.delta.norm() <= 1e-3


def test_secure_noise_is_another_each_time():
    model, images = make_model(*VIT), make_images()
    lane_model = make_lane_model(model, METHODS["head"])
    trainer = make_private_trainer(
        lane_model, images, client_config(OPTIMIZERS["sgd"], 4), dtype=torch.float32, secure_noise=True
    )
    tasks, vector = make_tasks((9,), (2,)), start_vector(lane_model)
    first, second = (next(iter(trainer.train(tasks, RoundStart(ROUND, vector)))).delta for _ in range(2))
    assert not torch.equal(first, second)
