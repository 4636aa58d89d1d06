"""CSV files that record what clients do. A file that does not fit is refused in one line."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fedpeft_dist.config.errors import ConfigError

_KINDS = {"i8": (int, "whole number"), "f8": (float, "number")}


class TraceFile:
    """A CSV file that a section of `federation.participation` names."""

    def __init__(self, section: str, path: str):
        self.path, self.name = path, f"federation.participation.{section}.path: '{path}'"

    def error(self, problem: str) -> ConfigError:
        """An error that names the key and the file before the problem."""
        return ConfigError(f"{self.name} {problem}")

    def read(self, columns: Mapping[str, str], population: int, *, every_client: bool = False) -> np.ndarray:
        """The rows of the file, whose first line names exactly these columns in this order.

        Args:
            columns: name and numpy type of each column; one of them is `client`.
            population: number of clients.
            every_client: whether each client needs a row.

        Returns:
            A structured array [rows].

        Raises:
            ConfigError: the file cannot be read, or it has other columns, no rows, a value of another type, an unknown
                client, or no row for a client that needs one.
        """
        clients = (rows := self._parse(columns))["client"]
        unknown = clients[(clients < 0) | (clients >= population)]
        if len(unknown):
            raise self.error(f"names client {unknown[0]}, which does not exist; clients are 0 to {population - 1}")
        missing = np.flatnonzero(np.bincount(clients, minlength=population) == 0) if every_client else ()
        if len(missing):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self.error(f"has no row for client {missing[0]}{more}; give rows for all {population} clients")
        return rows

    def _parse(self, columns: Mapping[str, str]) -> np.ndarray:
        names, rows = ",".join(columns), ()
        try:
            with open(self.path, encoding="utf-8-sig") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # numpy warns if there are no rows
                header = ",".join(name.strip() for name in file.readline().split(","))
                if header == names:
                    rows = np.loadtxt(file, dtype=list(columns.items()), delimiter=",", comments=None, ndmin=1)
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"cannot be read ({getattr(error, 'strerror', error)})") from None
        except (ValueError, OverflowError):
            raise self.error(f"cannot be read: {self._wrong_line(columns)}; give {names}") from None
        if header != names:
            raise self.error(f"begins with {header[:120]!r}; its first line should be {names}")
        if not len(rows):
            raise self.error(f"has no rows; give some below the line {names}")
        return rows

    def _wrong_line(self, columns: Mapping[str, str]) -> str:
        """The first line that cannot be read. The line numbers in numpy's own errors are inconsistent."""
        for number, line in enumerate(Path(self.path).read_text("utf-8-sig").split("\n")[1:], 2):
            values = line.split(",")
            if line.strip() and len(values) != len(columns):
                return f"line {number} has {len(values)} columns"
            for value, (name, kind) in zip(values if line.strip() else (), columns.items()):
                convert, what = _KINDS.get(kind, (str, "text"))
                try:
                    convert(value)
                except ValueError:
                    return f"line {number} has {value.strip()[:40]!r} for {name}, no {what}"
        return "a number is out of range"


def digest(paths: Iterable[str]) -> str:
    """SHA-256 of the content of these files, in this order; the empty text if there are none."""
    contents = [hashlib.sha256(Path(path).read_bytes()).digest() for path in paths]
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else ""
