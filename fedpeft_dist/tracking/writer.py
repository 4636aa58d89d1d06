"""TensorBoard beside metrics.jsonl: scalars, the config as text, the partition as a picture."""

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft_dist.config.load import dump_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.tracking.partition_view import partition_image
from fedpeft_dist.tracking.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes each round's metrics to metrics.jsonl and TensorBoard.

    Args:
        num_rounds_done: rounds in a checkpoint that this run goes on from; later ones in the files are dropped.
    """

    def __init__(self, directory: RunDirectory, num_rounds_done: int):
        self.directory = directory
        self._excepthook, threading.excepthook = threading.excepthook, self._tell
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.cut_metrics(num_rounds_done)
        self.board = _open_board(directory, num_rounds_done)

    def write_setting(self, config: RunConfig, counts: np.ndarray, num_clients: int) -> None:
        """The config and the partition, once a run."""
        text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())
        title = f"samples per class (across) and client (down), {len(counts)} of {num_clients:,} clients"
        if self.board is not None:
            self.board.add_text("config", text)
            self.board.add_text("partition", title)
            self.board.add_image("partition", partition_image(counts), dataformats="HWC")

    def write_round(self, row: dict[str, Any]) -> None:
        self.directory.append_metrics(row)
        for name, value in row.items():
            if self.board is not None and name != "round" and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["round"])

    def flush(self) -> None:
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        try:
            if self.board is not None:
                self.board.close()
        finally:
            threading.excepthook = self._excepthook

    def _tell(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; what a full disk stops there is raised again here, at the next call."""
        if not issubclass(failure.exc_type, OSError):
            self._excepthook(failure)


def _open_board(directory: RunDirectory, num_rounds_done: int) -> "SummaryWriter | None":
    """TensorBoard's writer; None where TensorBoard is not installed."""
    try:  # here, because the import takes a second, which only the rank that writes should spend
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        print(f"{directory.path}: without curves for TensorBoard, because {error.name} is missing", flush=True)
        return None
    return SummaryWriter(str(directory.tensorboard), purge_step=num_rounds_done + 1)
