"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a system says that there is no room."""
_TEMPORARY = ".tmp-"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes what it wrote to disk and renames it into place.

    Raises:
        OSError: with `path` as its filename: a full disk, a missing permission; `path` is then what it was before.
    """
    # The name's end stays last: numpy, matplotlib and others choose a format, or append one, by its suffix. Of a long
    # name no more fits.
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
    """Removes what writers that were killed have left; for whoever is the directory's only writer."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        if not path.is_dir():  # no writer makes a folder here
            path.unlink(missing_ok=True)


def give_usual_mode(path: Path) -> None:
    """Lets others read a file as the umask says: some libraries make theirs for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
