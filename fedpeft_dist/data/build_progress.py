"""How far the building of a store is: a bar on a terminal, a line now and then anywhere else."""

import time
from pathlib import Path

from rich.console import Console

from fedpeft_dist.runtime.streams import ProgressBar

SECONDS_BETWEEN_LINES = 30
SECONDS_WORTH_TELLING = 5


class BuildProgress(ProgressBar):
    """A context manager. It writes to stderr, apart from what a command prints.

    Args:
        title: stands before the bar and in every line.
        total: the number of images to decode.
    """

    def __init__(self, title: str, total: int):
        super().__init__(Console(stderr=True), title, total, transient=True)
        self.count = 0
        self.started = self.told = time.monotonic()

    def images_done(self, count: int) -> None:
        """Adds images that have been written."""
        self.count += count
        self.advance_to(self.count)
        if not self.console.is_terminal and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self.note(f"{self.title} {self.count:,} of {self.total:,} images")

    def tell_done(self, place: Path) -> None:
        """Prints where the images are, if decoding them took noticeable time."""
        seconds = time.monotonic() - self.started
        if seconds > SECONDS_WORTH_TELLING:
            self.note(f"{place}: {self.total:,} images decoded in {seconds:,.0f} s")
