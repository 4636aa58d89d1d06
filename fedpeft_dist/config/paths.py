"""Paths that users give: a leading `~` and `$NAME` are replaced as in a shell."""

import hashlib
import os
import re
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

PART_BYTES, PATH_BYTES = 255, 4095
"""Linux's limits for the name of a file or a folder, and for a whole path."""
NAME_BYTES = 200
"""The limit for the name of a run's folder. Tools make longer names from it, such as a temporary folder's."""
FILE_BYTES = 400
"""Room for a run's longest path below its folder."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character, which Python reads for a byte that is not UTF-8. No file of ours can hold it."""
_NOT_IN_NAMES = re.compile(rf"{_CONTROL.pattern}|{SURROGATE.pattern}|[~$]")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def expand_path(path: str, part_bytes: int = PART_BYTES) -> str:
    """The path with `~`, `~user`, `$NAME` and `${NAME}` replaced; a path without them stays as it is.

    Raises ValueError for an unknown user, a variable without a value, or a path that no file system could have.
    """
    if not path:
        raise ValueError(f"{path!r} is no path; give . for the folder that the command runs in")
    if "\0" in path:
        raise ValueError(f"{path!r} holds a NUL character, which no path has; leave it out")

    def value(found: re.Match[str]) -> str:
        name = found[found.lastindex]
        if not os.environ.get(name):
            raise ValueError(f"{path!r}: the environment variable {name!r} has no value here; set it, or write a path")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if expanded.startswith("~"):
        name = expanded.partition("/")[0]
        raise ValueError(
            f"{path!r}: {name} is no user's home folder; give ~/..., a full path, or ./{name} for the name"
        )
    if SURROGATE.search(expanded) and not SURROGATE.search(path):
        raise ValueError(f"{path!r}: {expanded!r} is no UTF-8; give a path that is")
    for part in expanded.split("/"):
        if (size := len(os.fsencode(part))) > part_bytes:
            shown = part if len(part) <= 80 else f"{part[:40]}...{part[-20:]}"
            raise ValueError(f"{shown!r} has {size} bytes; give a name of {part_bytes} bytes at most")
    return expanded


def check_run_name(name: str) -> str:
    """A run's name with its variables replaced: one folder, or several as in `group/run`, all below `output.root`.

    Raises ValueError for a name that leads elsewhere, or leaves no room for names made from it.
    """
    if not name.strip():
        raise ValueError(f"{name!r} is no name for a run's folder; give one, or null to derive it from the config")
    expanded = expand_path(name, NAME_BYTES)
    parts = PurePosixPath(expanded).parts
    if expanded.startswith("/") or ".." in parts or not parts:
        raise ValueError(f"{name!r} is no folder below output.root; give a name, and the folder above as output.root")
    if _CONTROL.search(expanded):
        raise ValueError(f"{name!r} holds a line break or another control character; leave it out")
    return expanded


def check_run_place(root: str, name: str | None) -> None:
    """Raises ValueError if the folder for runs leaves no room for their files."""
    if _CONTROL.search(root):
        raise ValueError(f"root: {root!r} holds a line break or another control character; leave it out")
    size = len(os.fsencode(root)) + (NAME_BYTES if name is None else len(os.fsencode(name)))
    if size > (most := PATH_BYTES - FILE_BYTES):
        raise ValueError(f"root and name have {size} bytes, too many for the paths below them; give {most} at most")


def derived_name(text: str, ending: str = "") -> str:
    """A folder's name from a text: at most NAME_BYTES, with a digest in place of what is cut, then `ending`.

    A text that is a valid name of a run stays as it is.
    """
    text = _NOT_IN_NAMES.sub("_", text)
    room, encoded = NAME_BYTES - len(ending), text.encode()
    if len(encoded) > room:
        digest = f"-{hashlib.sha256(encoded).hexdigest()[:8]}"
        text = encoded[: room - len(digest)].decode(errors="ignore") + digest
    return text + ending


UserPath = Annotated[str, AfterValidator(expand_path)]
"""The type of a config key that holds a path."""

RunName = Annotated[str, AfterValidator(check_run_name)]
"""The type of the key that names a run's folder."""
