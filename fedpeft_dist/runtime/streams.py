"""Standard output and error that never end a command: output that cannot be written is dropped.

`train | head`, a closed terminal, a closed descriptor (`>&-`) and a full disk would each raise an OSError in the code
that happens to print, and the run would be marked as failed.
"""

import errno
import io
import os
import sys
from typing import TextIO

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
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _never_failing(descriptor, stream))


def lost_output() -> str | None:
    """Why some of stdout was lost since the last call; None if nothing was, or nobody misses it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Descriptor):
        return None
    sys.stdout.flush()
    error, raw.lost = raw.lost, None
    return None if error is None or error.errno in NO_READER else error.strerror


def _never_failing(descriptor: int, stream: TextIO | None) -> TextIO:
    """
    Args:
        stream: the process's own stream; None if its descriptor was closed when Python started.
    """
    buffer = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
    is_by_line = stream is not None and (stream.line_buffering or stream.write_through)
    # A character that the encoding lacks must not raise an error either.
    return io.TextIOWrapper(buffer, stream and stream.encoding, "backslashreplace", line_buffering=is_by_line)
