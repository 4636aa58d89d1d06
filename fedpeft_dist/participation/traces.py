"""CSV files that tell what clients do: read as columns, and refused in one line that names the file and the row."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedpeft_dist.config.errors import ConfigError

_KINDS = {"i8": "whole number", "f8": "number"}


def read_columns(path: str, columns: Mapping[str, str], key: str) -> np.ndarray:
    """The rows of a CSV file whose first line names exactly these columns, in this order.

    Args:
        columns: name and numpy type of each.
        key: the config's, for errors.

    Returns:
        A structured array [rows].

    Raises:
        ConfigError: no such file, other columns, a value of another type, no rows.
    """
    names = ",".join(columns)
    try:
        with open(path, encoding="utf-8-sig") as file:
            header = [name.strip() for name in file.readline().split(",")]
            if header != list(columns):
                found = ",".join(header)
                raise ConfigError(f"{key}: '{path}' begins with {found[:120]!r}; its first line should be {names}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of no rows, which is told below
                rows = np.loadtxt(file, dtype=list(columns.items()), delimiter=",", comments=None, ndmin=1)
    except ConfigError:  # which is a ValueError, too
        raise
    except OSError as error:
        raise ConfigError(f"{key}: '{path}' cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: '{path}' cannot be read as text ({error})") from None
    except (ValueError, OverflowError):
        raise ConfigError(f"{key}: '{path}': {_wrong_line(path, columns)}; give {names}") from None
    if not len(rows):
        raise ConfigError(f"{key}: '{path}' has no rows; give some below the line {names}")
    return rows


def _wrong_line(path: str, columns: Mapping[str, str]) -> str:
    """The first line that cannot be read, which numpy counts now from 0, now from 1."""
    with open(path, encoding="utf-8-sig") as file:
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


def check_clients(path: str, clients: np.ndarray, population: int, key: str) -> None:
    """
    Raises:
        ConfigError: a client that the population of N does not have.
    """
    unknown = clients[(clients < 0) | (clients >= population)]
    if len(unknown):
        raise ConfigError(
            f"{key}: '{path}' names client {unknown[0]}, which there is not; clients are 0 to {population - 1}"
        )


def check_all_present(path: str, clients: np.ndarray, population: int, key: str) -> None:
    """
    Raises:
        ConfigError: a client of the population stands in no row.
    """
    missing = np.flatnonzero(np.bincount(clients, minlength=population) == 0)
    if len(missing):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"{key}: '{path}' has no row for client {missing[0]}{more}; give rows for all {population} clients"
        )


def digest(paths: list[str]) -> str:
    """SHA-256 over the content of these files, in this order; the empty text for none."""
    if not paths:
        return ""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return whole.hexdigest()
