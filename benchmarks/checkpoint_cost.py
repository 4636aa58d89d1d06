"""The cost of a checkpoint beside a round of the quickstart, and its size beside the vector that it must hold.

    python benchmarks/checkpoint_cost.py [rounds] [folder]

The runs, and so their checkpoints, lie below the folder, by default a temporary one. Give a folder on the disk that you
want to measure. The script prints one JSON object. Each case is one run with a checkpoint after every round, and
seconds are medians over its rounds. The seconds of a round leave out its evaluation. The seconds of a checkpoint
include its flush to the disk.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from fedpeft_dist.algorithms.state import State
from fedpeft_dist.config.load import load_config
from fedpeft_dist.federation.opening import OpenRun
from fedpeft_dist.federation.run import run
from fedpeft_dist.tracking.run_directory import RunDirectory, read_json, read_metrics

CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
METHODS, SERVERS = ("bias", "full"), ("sgd", "yogi")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as root:
        with redirect_stdout(sys.stderr):  # the runs' progress
            cases = {f"{m}, {s}": measure(m, s, rounds, Path(root)) for m in METHODS for s in SERVERS}
    print(json.dumps({"rounds": rounds, **cases}, indent=1))


def measure(method: str, server: str, rounds: int, root: Path) -> dict[str, float]:
    name = f"{method}-{server}"
    overrides = [
        f"server.optimizer={{name: {server}}}",
        f"federation.rounds={rounds}",
        "runtime.device=cpu",
        f"output.root={root}",
        f"output.name={name}",
        "output.checkpoint_every=1",
    ]
    config, directory = load_config(CONFIGS / f"{method}.yaml", overrides), RunDirectory(root / name)
    with timed_saves() as saves:
        run(config)
    round_seconds = statistics.median(row["seconds"] for row in read_metrics(directory.metrics_file))
    save_seconds = statistics.median(saves)
    size = max(directory.checkpoints.iterdir()).stat().st_size
    vector_bytes = 4 * read_json(directory.summary_file)["trainable_parameters"]
    return {
        "checkpoint_over_round": save_seconds / round_seconds,
        "checkpoint_seconds": save_seconds,
        "round_seconds": round_seconds,
        "file_bytes": size,
        "vector_bytes": vector_bytes,
        "file_over_vector": size / vector_bytes,
    }


@contextmanager
def timed_saves() -> Iterator[list[float]]:
    """Collects the seconds of each checkpoint that is saved inside the context."""
    seconds: list[float] = []
    save = OpenRun.save

    def timed(opened: OpenRun, state: State) -> None:
        started = time.perf_counter()
        save(opened, state)
        seconds.append(time.perf_counter() - started)

    OpenRun.save = timed
    try:
        yield seconds
    finally:
        OpenRun.save = save


if __name__ == "__main__":
    main()
