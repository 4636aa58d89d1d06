"""Passes of a group that shares weights: as many on every rank, because a rank that stopped would not give its part."""

from collections.abc import Callable, Iterator

from fedpeft_dist.runtime.mesh import Mesh
from fedpeft_dist.training.schedule import Pass

Pair = tuple[Pass | None, Pass | None]


def in_step(passes: Iterator[Pair], mesh: Mesh | None, is_dropped: Callable[[], bool]) -> Iterator[Pair]:
    """Each pass with the one after it, until the round is dropped.

    Under sharding, the ranks of a group agree before each pass. A rank whose passes are done gets None, until all are.
    """
    if mesh is None:
        for pair in passes:
            if is_dropped():
                return
            yield pair
        return
    while True:
        current, upcoming = next(passes, (None, None))
        some_busy, some_dropped = mesh.agree(current is not None, is_dropped())
        if some_dropped or not some_busy:
            return
        yield current, upcoming
