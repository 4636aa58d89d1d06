"""CSV files that record what clients do. A file that does not fit is refused in one line."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft_dist.config.errors import ConfigError

_KINDS = {"i8": "whole number", "f8": "number"}


@dataclass(frozen=True)
class TraceFile:
    """A CSV file, and the config key that names it."""

    key: str
    path: str

    def error(self, problem: str) -> ConfigError:
        """An error that names the key and the file before the problem."""
        return ConfigError(f"{self.key}: '{self.path}' {problem}")

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
        rows = self._parse(columns)
        clients = rows["client"]
        unknown = clients[(clients < 0) | (clients >= population)]
        if len(unknown):
            raise self.error(f"names client {unknown[0]}, which does not exist; clients are 0 to {population - 1}")
        missing = np.flatnonzero(np.bincount(clients, minlength=population) == 0) if every_client else ()
        if len(missing):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self.error(f"has no row for client {missing[0]}{more}; give rows for all {population} clients")
        return rows

    def _parse(self, columns: Mapping[str, str]) -> np.ndarray:
        names = ",".join(columns)
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                header = ",".join(name.strip() for name in file.readline().split(","))
                if header != names:
                    raise self.error(f"begins with {header[:120]!r}; its first line should be {names}")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # numpy warns if there are no rows
                    rows = np.loadtxt(file, dtype=list(columns.items()), delimiter=",", comments=None, ndmin=1)
        except ConfigError:  # ConfigError is a ValueError
            raise
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise self.error(f"cannot be read as text ({error})") from None
        except (ValueError, OverflowError):
            raise self.error(f"cannot be read: {self._wrong_line(columns)}; give {names}") from None
        if not len(rows):
            raise self.error(f"has no rows; give some below the line {names}")
        return rows

    def _wrong_line(self, columns: Mapping[str, str]) -> str:
        """The first line that cannot be read. The line numbers in numpy's own errors are inconsistent."""
        with open(self.path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                values = line.split(",")
                if number == 1 or not line.strip():
                    continue
                if len(values) != len(columns):
                    return f"line {number} has {len(values)} columns"
                for value, (name, kind) in zip(values, columns.items()):
                    try:
                        {"i8": int, "f8": float}.get(kind, str)(value)
                    except ValueError:
                        return f"line {number} has {value.strip()[:40]!r} for {name}, no {_KINDS[kind]}"
        return "a number is out of range"


def digest(paths: Iterable[str]) -> str:
    """SHA-256 of the content of these files, in this order; the empty text if there are none."""
    contents = [hashlib.sha256(Path(path).read_bytes()).digest() for path in paths]
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else ""
