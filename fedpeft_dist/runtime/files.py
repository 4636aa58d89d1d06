"""Files that appear whole or not at all."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The error numbers of a full disk, a used-up quota and a file that is too large."""
_TEMPORARY = ".tmp-"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes what it wrote to disk and renames it into place.

    For a full disk or a missing permission, raises OSError, whose filename is `path`. The file there stays as it was.
    """
    # The suffix stays last, because numpy, matplotlib and others choose a format by it. A long name does not fit whole.
    temporary = path.with_name(f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{path.name[-40:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        give_usual_mode(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(directory: Path) -> None:
    """Removes the files that killed writers have left. Only the sole writer of a directory may call this."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        if not path.is_dir():  # writers make no folders here
            path.unlink(missing_ok=True)


def give_usual_mode(path: Path) -> None:
    """Gives a file the permissions that the umask asks for: some libraries let only the owner read theirs."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
