"""What a command shows: standard streams that never end it, and the progress bar of work that takes long.

`train | head`, a closed terminal, a closed descriptor (`>&-`) and a full disk would each raise an OSError in the code
that happens to print, and the run would be marked as failed. So output that cannot be written is dropped.
"""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

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


class ProgressBar:
    """A context manager, which shows a bar on a terminal only, by rich if that is installed.

    Args:
        stream: where to; stdout if None.
        visible: whether this process shows anything.
        status: whether a text and the time so far stand between the count and the time left.
        transient: whether the bar disappears at its end.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        stream: TextIO | None = None,
        visible: bool = True,
        status: bool = False,
        transient: bool = False,
    ):
        self.title, self.total, self.visible = title, total, visible
        self._stream = sys.stdout if stream is None else stream
        self._bar: Any = None
        if visible and self._stream.isatty():
            with suppress(ModuleNotFoundError):
                self._bar = _rich_bar(self._stream, status, transient)
                self._task = self._bar.add_task(title, total=total, status="")

    @property
    def is_bar(self) -> bool:
        """Whether a bar is shown. Otherwise lines are."""
        return self._bar is not None

    def advance_to(self, done: int, status: str = "") -> None:
        if self.is_bar:
            self._bar.update(self._task, completed=done, status=status)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if self.is_bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.visible:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> "ProgressBar":
        if self.is_bar:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.is_bar:
            self._bar.stop()


def _rich_bar(stream: TextIO, status: bool, transient: bool) -> Any:
    from rich import progress  # only here, so that a run without a terminal does not import it
    from rich.console import Console

    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()]
    if status:
        columns += [progress.TextColumn("{task.fields[status]}"), progress.TimeElapsedColumn()]
    columns.append(progress.TimeRemainingColumn())
    return progress.Progress(*columns, console=Console(file=stream), transient=transient)
