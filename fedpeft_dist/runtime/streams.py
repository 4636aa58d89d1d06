"""What a command shows: standard streams that never end it, and the progress bar of work that takes long.

`train | head`, a closed terminal, a closed descriptor (`>&-`) and a full disk would each raise an OSError in the code
that happens to print, and the run would be marked as failed. So output that cannot be written is dropped.
"""

import errno
import io
import os
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

NO_READER = (errno.EPIPE, errno.EIO)
"""The reader of a pipe, or the terminal, has gone. Nobody misses the output."""


class _Descriptor(io.FileIO):
    """A descriptor that accepts everything; `lost` is the first error."""

    lost: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def open_streams() -> None:
    """Replaces this process's streams by ones that never fail, unless a caller has redirected them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # no file opened later may take a closed stream's number
        pass
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)  # None if its descriptor was closed when Python started
        if stream is getattr(sys, f"__{name}__"):
            buffer = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
            by_line = stream is not None and (stream.line_buffering or stream.write_through)
            # A character that the encoding lacks must not raise an error either.
            safe = io.TextIOWrapper(buffer, stream and stream.encoding, "backslashreplace", line_buffering=by_line)
            setattr(sys, name, safe)


def lost_output() -> str | None:
    """Why some of stdout was lost since the last call; None if nothing was, or nobody misses it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Descriptor):
        return None
    sys.stdout.flush()
    error, raw.lost = raw.lost, None
    return None if error is None or error.errno in NO_READER else error.strerror


class ProgressBar(Progress):
    """A context manager, which shows a bar on a terminal only.

    Args:
        columns: shown between the count and the time left.
        visible: whether this process shows anything.
        transient: whether the bar disappears at its end.
    """

    def __init__(
        self, console: Console, title: str, total: int, *columns: ProgressColumn, visible: bool = True, transient=False
    ):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn())
        is_shown = visible and console.is_terminal
        super().__init__(*columns, console=console, disable=not is_shown, transient=transient)
        self.title, self.total, self.visible = title, total, visible
        self._task = self.add_task(title, total=total, status="")

    def advance_to(self, done: int, status: str = "") -> None:
        self.update(self._task, completed=done, status=status)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if self.visible:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
