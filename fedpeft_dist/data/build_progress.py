"""How far the building of a store is: a bar on a terminal; anywhere else a line now and then, where it takes long."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30
SECONDS_WORTH_TELLING = 5


class BuildProgress:
    """A context manager; everything goes to stderr, where it does not mix with what a command prints.

    Args:
        title: stands before the bar and in every line.
        total: images to come.
    """

    def __init__(self, title: str, total: int):
        self.title, self.total, self.count = title, total, 0
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task(title, total=total)
        self.started = self.told = time.monotonic()

    def __enter__(self) -> BuildProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, count: int) -> None:
        """So many more images are written."""
        self.count += count
        self.bar.update(self.task, completed=self.count)
        if not self.console.is_terminal and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self._print(f"{self.title} {self.count:,} of {self.total:,} images")

    def done(self, place: Path) -> None:
        """Tells where the images are now, unless it took no time to bring them there."""
        seconds = time.monotonic() - self.started
        if seconds > SECONDS_WORTH_TELLING:
            self._print(f"{place}: {self.total:,} images decoded in {seconds:,.0f} s")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
