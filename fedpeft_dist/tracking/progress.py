"""How far a run is: a live line on a terminal, plain lines anywhere else."""

from typing import Any

from fedpeft_dist.runtime.streams import ProgressBar


class RoundProgress(ProgressBar):
    """Shows round, accuracy, samples per second and time left; a context manager.

    Args:
        visible: False on all ranks but the first.
    """

    def __init__(self, name: str, num_rounds: int, rounds_done: int, visible: bool):
        super().__init__(name, num_rounds, visible=visible, status=True)
        self.advance_to(rounds_done)
        self.seconds: list[float] = []

    def round_done(self, row: dict[str, Any]) -> None:
        """Shows a round's metrics."""
        if not self.visible:
            return
        shown = (("accuracy", row["accuracy"]), ("loss", row["train_loss"]), ("epsilon", row.get("epsilon")))
        values = "".join(f"{name} {value:.4f}  " for name, value in shown if value is not None)
        status = f"{values}{row['samples_per_second']:,.0f} samples/s"
        if self.is_bar:
            self.advance_to(row["round"], status)
            return
        self.seconds.append(row["seconds"] + row["evaluate_seconds"])
        left = sum(self.seconds) / len(self.seconds) * (self.total - row["round"])
        # Flushed line by line: a job's log is followed while it runs.
        print(f"{self.title}: round {row['round']}/{self.total}  {status}  {left:,.0f} s left", flush=True)
