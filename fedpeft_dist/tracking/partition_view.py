"""What a partition looks like: clients x classes, as a picture and as a table."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

MAX_CLIENTS = 100
"""Shown in a picture or a table; a larger population is cut off and says so."""
_SHADES = " .:-=+*#%@"
_LIGHT, _DARK = np.array([247.0, 251.0, 255.0]), np.array([8.0, 48.0, 107.0])


def partition_figure(counts: np.ndarray, num_clients: int) -> "Figure":
    """A heat map of samples per class (across) and client (down).

    Args:
        counts: int64 [shown clients, classes].
        num_clients: of the whole population.
    """
    from matplotlib.figure import Figure

    shown, classes = counts.shape
    figure = Figure(figsize=(min(4 + classes * 0.12, 12), min(2 + shown * 0.1, 12)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(counts, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="class", ylabel="client")
    axes.set_title(f"samples per class, {shown} of {num_clients:,} clients")
    figure.colorbar(picture, ax=axes, label="samples")
    return figure


def partition_image(counts: np.ndarray) -> np.ndarray:
    """The figure's map alone, drawn without matplotlib, whose import takes a second: the darker, the more samples.

    Returns:
        uint8 [height, width, 3], with a square of 8 x 8 for each count.
    """
    shares = counts / max(int(counts.max()), 1)
    colors = _LIGHT + (_DARK - _LIGHT) * shares[..., None]
    return np.kron(colors.round(), np.ones((8, 8, 1))).astype(np.uint8)


def partition_table(counts: np.ndarray, num_clients: int) -> "Table":
    """One line a client: how many samples, of how many classes, and a strip that darkens with a class's share."""
    from rich.table import Table

    table = Table(title=f"{counts.shape[0]} of {num_clients:,} clients", title_justify="left")
    for name in ("client", "samples", "classes"):
        table.add_column(name, justify="right")
    table.add_column("samples of each class, ' ' none to '@' most", no_wrap=True, overflow="crop")
    most = max(int(counts.max()), 1)
    for client, row in enumerate(counts):
        strip = "".join(_SHADES[-(-int(n) * (len(_SHADES) - 1) // most)] for n in row)
        table.add_row(str(client), f"{row.sum():,}", str((row > 0).sum()), strip)
    return table
