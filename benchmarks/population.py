"""Compares rounds over 1,000,000 virtual clients with rounds over 1,000: seconds a round and memory.

    python benchmarks/population.py [rounds] [largest]

The script prints one JSON object. Each population runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  model_args: {{patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}}
method: {{name: bias}}
data:
  {{name: synthetic, image_size: 32, num_train: 4096, num_test: 256, classes: 10, clients: {clients},
   partition: {{name: pool, samples: 32}}}}
federation: {{rounds: {rounds}, cohort: 16, evaluate_every: 0}}
client: {{epochs: 1, batch_size: 16}}
runtime: {{device: cpu, lanes: 8}}
output: {{root: {root}, name: "{clients}", checkpoint_every: 0}}
"""


def main() -> None:
    rounds, largest = (int(sys.argv[n]) if len(sys.argv) > n else (30, 1_000_000)[n - 1] for n in (1, 2))
    with tempfile.TemporaryDirectory() as root:
        runs = {clients: measure(clients, rounds, Path(root)) for clients in (1_000, largest)}
    small, large = runs.values()
    ratio = large["seconds_per_round"] / small["seconds_per_round"]
    extra = (large["peak_memory_bytes"] - small["peak_memory_bytes"]) / 2**20
    print(json.dumps({"round_time_ratio": ratio, "extra_memory_mib": extra, "runs": runs}))


def measure(clients: int, rounds: int, root: Path) -> dict[str, float]:
    """The median seconds of a round without the first, which warms up, and the peak memory of the process."""
    config = root / f"{clients}.yaml"
    config.write_text(CONFIG.format(clients=clients, rounds=rounds, root=root))
    command = [sys.executable, "-m", "fedpeft_dist", "train", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (root / str(clients) / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds_per_round": statistics.median(row["seconds"] for row in rows[1:]),
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
    }


if __name__ == "__main__":
    main()
