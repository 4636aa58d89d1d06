"""TensorBoard beside metrics.jsonl: scalars, the config as text, the partition as a picture."""

import threading
from typing import Any

import numpy as np

from fedpeft_dist.config.load import dump_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.tracking.partition_view import partition_figure
from fedpeft_dist.tracking.run_directory import RunDirectory


class MetricsWriter:
    """Writes each round's metrics to metrics.jsonl and TensorBoard.

    Args:
        num_rounds_done: rounds in a checkpoint that this run goes on from; later ones in the files are dropped.
    """

    def __init__(self, directory: RunDirectory, num_rounds_done: int):
        # Importing TensorBoard takes a second, which only the rank that writes should spend.
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        self._excepthook, threading.excepthook = threading.excepthook, self._tell
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.cut_metrics(num_rounds_done)
        self.board = SummaryWriter(str(directory.tensorboard), purge_step=num_rounds_done + 1)

    def write_setting(self, config: RunConfig, counts: np.ndarray, num_clients: int) -> None:
        """The config and the partition, once a run."""
        text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())
        self.board.add_text("config", text)
        self.board.add_figure("partition", partition_figure(counts, num_clients))

    def write_round(self, row: dict[str, Any]) -> None:
        self.directory.append_metrics(row)
        for name, value in row.items():
            if name != "round" and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["round"])

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        try:
            self.board.close()
        finally:
            threading.excepthook = self._excepthook

    def _tell(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; what a full disk stops there is raised again here, at the next call."""
        if not issubclass(failure.exc_type, OSError):
            self._excepthook(failure)
