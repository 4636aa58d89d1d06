"""A live line on a terminal (round, accuracy, samples per second, time left); plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RoundProgress:
    """Shows how a run gets on; a context manager.

    Args:
        visible: False on all ranks but the first.
    """

    def __init__(self, name: str, num_rounds: int, rounds_done: int, visible: bool):
        self.name, self.num_rounds, self.visible = name, num_rounds, visible
        self.console = Console()
        self.seconds: list[float] = []
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (visible and self.console.is_terminal),
        )
        self.task = self.progress.add_task(name, total=num_rounds, completed=rounds_done, status="")

    def __enter__(self) -> RoundProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.visible:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def round_done(self, row: dict[str, Any]) -> None:
        """Shows a round's metrics."""
        if not self.visible:
            return
        shown = (("accuracy", row["accuracy"]), ("loss", row["train_loss"]), ("epsilon", row.get("epsilon")))
        values = "".join(f"{name} {value:.4f}  " for name, value in shown if value is not None)
        status = f"{values}{row['samples_per_second']:,.0f} samples/s"
        if self.console.is_terminal:
            self.progress.update(self.task, completed=row["round"], status=status)
            return
        self.seconds.append(row["seconds"] + row["evaluate_seconds"])
        left = sum(self.seconds) / len(self.seconds) * (self.num_rounds - row["round"])
        # Flushed line by line: a job's log is followed while it runs.
        print(f"{self.name}: round {row['round']}/{self.num_rounds}  {status}  {left:,.0f} s left", flush=True)
