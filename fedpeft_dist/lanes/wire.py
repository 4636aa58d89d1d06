"""Bytes on the wire: a client sends and receives its P trainable parameters in float32."""

from __future__ import annotations

BYTES_PER_PARAMETER = 4
MIB = 2**20


def uplink_bytes(num_parameters: int, cohort: int) -> int:
    """Bytes that `cohort` clients send in a round. So many clients also receive the same number of bytes."""
    return num_parameters * BYTES_PER_PARAMETER * cohort
