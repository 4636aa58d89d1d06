"""Bytes on the wire, where every number is a float32."""

from typing import NamedTuple

BYTES_PER_PARAMETER = 4
MIB = 2**20


class Traffic(NamedTuple):
    """What one client sends and receives in a round, in bytes."""

    uplink: int
    downlink: int
