"""Federated parameter-efficient fine-tuning: many virtual clients side by side on one frozen backbone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__version__ = "0.1.0"


def train(config: str, *overrides: str) -> str:
    """Runs a config file, as `fedpeft train CONFIG KEY=VALUE ...` does.

    Returns:
        `complete`, or `interrupted` if a signal stopped the run.
    """
    from fedpeft_dist.config.load import load_run_config  # importing the package alone loads nothing heavy
    from fedpeft_dist.federation.run import run

    return run(load_run_config(config, overrides))


def load_model(run: "str | Path") -> "nn.Module":
    """The model that a finished run has trained, on the CPU, in float32 and in eval mode.

    It takes normalised images [B, C, H, W] and returns scores [B, K]. `model.transform` makes such an image [C, H, W]
    from a PIL picture of any size. A method that merges gives timm's own model with the trained parameters in its
    weights. Another gives timm's model with the method's modules in it, whose tensors have a leading axis of 1.

    Args:
        run: the run's directory.

    Raises:
        ConfigError: the run has not finished, or its parameters or its backbone's weights cannot be read.
    """
    from fedpeft_dist.export.plain_model import load_model

    return load_model(run)
