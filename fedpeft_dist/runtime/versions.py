"""Versions of the libraries that a run's rounding may depend on."""

import numpy as np
import timm
import torch

import fedpeft_dist


def library_versions() -> dict[str, str]:
    """The version of each of those libraries, by its name."""
    return {
        "fedpeft_dist": fedpeft_dist.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
