"""The progress of building a store: a bar on a terminal, or a line now and then elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30
SECONDS_WORTH_TELLING = 5


class BuildProgress(Progress):
    """A context manager that writes to stderr, apart from the output of a command.

    Args:
        title: the text before the bar and in every line.
        total: the number of images to decode.
    """

    def __init__(self, title: str, total: int):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.bar, self.title, self.total, self.count = self.add_task(title, total=total), title, total, 0
        self.started = self.told = time.monotonic()

    def images_done(self, count: int) -> None:
        """Adds to the number of decoded images."""
        self.count += count
        self.update(self.bar, completed=self.count)
        if not self.console.is_terminal and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self._print(f"{self.title} {self.count:,} of {self.total:,} images")

    def tell_done(self, place: Path) -> None:
        """Tells where the images are, unless decoding took almost no time."""
        seconds = time.monotonic() - self.started
        if seconds > SECONDS_WORTH_TELLING:
            self._print(f"{place}: {self.total:,} images decoded in {seconds:,.0f} s")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
