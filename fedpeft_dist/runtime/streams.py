"""Standard output and error that never end a command: what nobody can read is dropped.

`train | head`, a terminal that closes, a closed descriptor (`>&-`) and a full disk would each raise an OSError in
whatever happens to print, and a run would be marked failed for it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

NO_READER = (errno.EPIPE, errno.EIO)
"""A pipe's reader has gone, or the terminal has. Nobody misses what is dropped then."""


class _Descriptor(io.FileIO):
    """A descriptor that takes everything; `lost` is the first error that it met."""

    lost: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def open_streams() -> None:
    """Puts streams that never fail in the place of this process's own; those that a caller has redirected stay."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file that is opened would take its place
        pass
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _never_failing(descriptor, stream))


def lost_output() -> str | None:
    """Why some of stdout was lost since the last call, where somebody may miss it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Descriptor):
        return None
    sys.stdout.flush()
    error, raw.lost = raw.lost, None
    return None if error is None or error.errno in NO_READER else error.strerror


def _never_failing(descriptor: int, stream: TextIO | None) -> TextIO:
    """
    Args:
        stream: the process's own; None where its descriptor was closed when Python started.
    """
    buffer = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
    is_by_line = stream is not None and (stream.line_buffering or stream.write_through)
    # A character that the encoding lacks must not fail either.
    return io.TextIOWrapper(buffer, stream and stream.encoding, "backslashreplace", line_buffering=is_by_line)
