"""Rebuild the embedded backbone: supervised pre-training on distorted printed letters, on the CPU.

The task is to name a Latin letter, whatever its font and its distortion. Letters that differ in size only (c and C)
share a class. Neither digits nor handwriting are used. docs/glyph_vit.md reports the results.

Shapes: C letters, F fonts, N images, S the side of an image.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from timm.optim import param_groups_weight_decay
from torch import Generator, Tensor
from torch.nn import functional as F

from fedpeft_dist.backbones.glyph_vit import IMAGE_SIZE, build_glyph_vit
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.glyphs import ALPHABETS, distort, font_files, merge_drawings, render_letters
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.runtime.files import write_atomically

LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 1e-3, 0.05, 0.1
THREADS = 1
Drawings = tuple[Tensor, Tensor]  # drawings [C, F, S, S] uint8, the class of each of the C [C] int64
Batch = tuple[Tensor, Tensor]  # images [N, 1, S, S] float32 in -1..1, labels [N]


def pretrain(
    output: Path,
    *,
    steps: int = 6000,
    batch_size: int = 64,
    held_out_images: int = 8192,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, float | int | str]:
    """Train from scratch and write the weights, without the head, to `output` (safetensors, float32).

    The defaults are the shipped recipe. The learning rate climbs over the first fifteenth of the steps. The process's
    thread count is THREADS meanwhile. On one machine, the same arguments give the same file.

    Returns:
        The held-out accuracy (on new distortions of the same letters and fonts), the seconds, and the file's size and
        sha256.

    Raises:
        ValueError: a size is below 1.
        ConfigError: `output` cannot be written; found before any training.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("held_out_images", held_out_images)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ConfigError(f"--output: '{output}' cannot be written; give a file in a folder that can")
    started, threads_before = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        letters = letter_drawings()
        num_classes = int(letters[1].max()) + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "model"))
            model = build_glyph_vit(num_classes, pretrained=False)
        generator = Generator().manual_seed(derive_seed(seed, "training letters"))
        _train(model, (sample_letters(letters, batch_size, generator) for _ in range(steps)), steps, report)
        held_out = Generator().manual_seed(derive_seed(seed, "held-out letters"))
        accuracy = _accuracy(model, letters, held_out_images, held_out)
    finally:
        torch.set_num_threads(threads_before)
    content = save({name: value for name, value in model.state_dict().items() if not name.startswith("head.")})
    write_atomically(output, lambda temporary: temporary.write_bytes(content))
    result = {"classes": num_classes, "held_out_accuracy": accuracy, "seconds": time.perf_counter() - started}
    result |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    report(", ".join(f"{key} {value}" for key, value in result.items()))
    return result


def letter_drawings() -> Drawings:
    """Every Latin letter in every font, and its class."""
    drawings = render_letters(ALPHABETS["latin"], font_files())
    return drawings, torch.tensor(merge_drawings(drawings))


def sample_letters(letters: Drawings, count: int, generator: Generator) -> Batch:
    """Distorted images and their labels: all classes and fonts equally often."""
    drawings, classes = letters
    odds = 1 / classes.bincount()[classes].float()
    rows = torch.multinomial(odds, count, replacement=True, generator=generator)
    fonts = torch.randint(drawings.shape[1], (count,), generator=generator)
    images = distort(drawings[rows, fonts, None], IMAGE_SIZE, generator)
    return images * 2 - 1, classes[rows]


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate's factor: a linear rise over `warmup_steps`, then a half cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))


def _train(model: torch.nn.Module, batches: Iterable[Batch], steps: int, report: Callable[[str], None]) -> None:
    groups = param_groups_weight_decay(model, WEIGHT_DECAY)  # biases and norms do not decay
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps, math.ceil(steps / 15)))
    for step, (images, labels) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 500 == 0:
            report(f"step {step} of {steps}: loss {loss.item():.3f}")


def _accuracy(model: torch.nn.Module, letters: Drawings, count: int, generator: Generator) -> float:
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, count, 512):
            images, labels = sample_letters(letters, min(512, count - start), generator)
            right += int((model(images).argmax(-1) == labels).sum())
    return right / count
