"""Compares all methods on the offline tasks: accuracy against bytes, and which differences can be told from zero.

    python launch/compare_methods.py [runs/offline]

It reads the runs of configs/sweeps/offline/{digits,glyphs100}/methods.yaml. A method's rate is the one of the grid with
the best accuracy on held-out samples: the clients' own mean, at the end, averaged over the seeds. Accuracies in the
tables are on test images. A difference between two methods is taken seed by seed, as in compare_hypotheses.py, and can
be told from zero if its 95 % t-interval does not hold zero. A picture is written into each folder of runs.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from compare_hypotheses import SEEDS, SIZES, judge
from matplotlib.figure import Figure

KIB = 1024
BASELINE = "bias"


class Result(NamedTuple):
    """A method at its chosen rate. Accuracies are in points, one for each seed."""

    rate: float
    parameters: int
    kib: float
    """Of one client, one way, in one round."""
    accuracies: list[float]
    held_out: float

    @property
    def told(self) -> tuple[float, float]:
        """Mean and standard deviation over the seeds, as shares."""
        return statistics.fmean(self.accuracies) / 100, statistics.stdev(self.accuracies) / 100


def main(root: Path) -> None:
    for data in SIZES:
        folder = root / data / "methods"
        results = read_results(folder)
        print(f"\n# {data}\n")
        print_methods(results)
        print("\nDifferences that can be told from zero, over all pairs:\n")
        print_pairs(results)
        draw(results, data).savefig(folder / "accuracy_of_methods.png", dpi=120)


def read_results(folder: Path) -> dict[str, Result]:
    """The methods of a sweep's runs, the fewest bytes first.

    Raises:
        SystemExit: a run is missing or not complete.
    """
    found: dict[str, dict[float, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*/config.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[config["method"]["name"]][config["client"]["optimizer"]["lr"]][config["seed"]] = path.parent
    if not found:
        sys.exit(f"error: {folder} has no runs; run `fedpeft sweep run` with its methods.yaml first")
    tried = set.union(*map(set, found.values()))
    for method, rates in found.items():
        if missing := tried - set(rates):
            sys.exit(f"error: {folder} has no runs of {method} at rate {min(missing)}; run the sweep again")
    chosen = {
        method: max((read_rate(rate, runs) for rate, runs in rates.items()), key=lambda one: one.held_out)
        for method, rates in found.items()
    }
    return dict(sorted(chosen.items(), key=lambda item: item[1].kib))


def read_rate(rate: float, runs: Mapping[int, Path]) -> Result:
    """What a method's runs with one rate have reached; they are given by their seeds."""
    if set(runs) != set(SEEDS):
        folder = next(iter(runs.values())).parent
        sys.exit(f"error: {folder} has the seeds {sorted(runs)} at rate {rate}; {sorted(SEEDS)} are compared")
    summaries, held_out = [], []
    for seed in SEEDS:
        if not (runs[seed] / "summary.json").exists():
            sys.exit(f"error: {runs[seed]} is not complete; run the sweep again")
        summaries.append(json.loads((runs[seed] / "summary.json").read_text(encoding="utf-8")))
        rows = (runs[seed] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        held_out.append(json.loads(rows[-1])["client_accuracy_mean"])
    parameters = summaries[0]["trainable_parameters"]
    accuracies = [100 * summary["final_accuracy"] for summary in summaries]
    return Result(rate, parameters, 4 * parameters / KIB, accuracies, statistics.fmean(held_out))


def difference(first: Result, second: Result) -> list[float]:
    return [a - b for a, b in zip(first.accuracies, second.accuracies)]


def print_methods(results: Mapping[str, Result]) -> None:
    print(f"| method | rate | parameters | KiB a client | accuracy | points over {BASELINE} | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    words = {"holds": "above", "fails": "below", "open": "open"}
    for method, one in results.items():
        (mean, std), compared = one.told, " | "
        if method != BASELINE:
            points, half, verdict = judge(difference(one, results[BASELINE]))
            compared = f"{points:+.1f} ± {half:.1f} | {words[verdict]}"
        print(
            f"| {method} | {one.rate:g} | {one.parameters:,} | {one.kib:,.1f} | {mean:.4f} ± {std:.4f} | {compared} |"
        )


def print_pairs(results: Mapping[str, Result]) -> None:
    print("| method | is above | is below |\n| --- | --- | --- |")
    for method, one in results.items():
        verdicts = {name: judge(difference(one, other))[2] for name, other in results.items() if name != method}
        above, below = (", ".join(n for n, found in verdicts.items() if found == v) for v in ("holds", "fails"))
        print(f"| {method} | {above} | {below} |")


def draw(results: Mapping[str, Result], title: str) -> Figure:
    """Mean accuracy and standard deviation over the seeds, against the bytes that a client sends in a round."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for number, (method, one) in enumerate(results.items()):
        style = {"color": f"C{number % 10}", "marker": "o" if number < 10 else "s"}
        axes.errorbar(one.kib, *one.told, capsize=3, linestyle="", label=method, **style)
    axes.set(
        xscale="log", xlabel="KiB that a client sends in a round", ylabel="accuracy of the global model", title=title
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/offline"))
