"""Standard output and error that may end before the command does: a closed terminal, a pipe without a reader."""

from __future__ import annotations

import errno
import io
import os
import sys

OUTPUT_LOST = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""How a system says that a pipe has no reader, that a terminal is closed, or that a socket has no other end."""
STDERR = 2


class _Output(io.FileIO):
    """A descriptor that becomes the null device once nobody can read it."""

    def write(self, data: bytes | memoryview) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in OUTPUT_LOST:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() != STDERR:
            print("note: nobody reads the output any more; the command goes on without it", file=sys.stderr, flush=True)
        return memoryview(data).nbytes


def outlive_output() -> None:
    """Lets this process go on, and keep its exit code, when its terminal is closed or the reader of its pipe ends.

    A stream that a caller has put in the place of the process's own stays as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw = _Output(stream.fileno(), "w", closefd=False)
        text = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            newline="\n",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, text)
