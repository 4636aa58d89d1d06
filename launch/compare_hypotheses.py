"""Tests the paper's hypotheses on the runs of the offline reproduction: differences of accuracy, paired by seed.

    python launch/compare_hypotheses.py [runs/offline]

Every hypothesis is a list of differences that it claims are not negative. A difference is taken seed by seed (the same
seed has the same clients and cohorts), in points of final accuracy. Its mean over the seeds and the half-width of its
95 % t-interval are printed. `holds` means that the interval lies above zero, `fails` below zero, `open` around zero.
With three seeds the intervals are wide: 4.3 standard errors to each side.

A hypothesis is shown if all its differences hold, refuted if one fails, and undecided otherwise.
"""

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from scipy.stats import t as student

SEEDS = (1, 42, 3407)
PEFT = ("bias", "adapter", "prompt")
PARTICIPATION = ("n64-m8", "n64-m64", "n16-m16", "n16-m2")
SIZES = {"digits": (130, 260, 650), "glyphs100": (276, 552, 1380)}
EPSILONS = {"digits": (2, 5, 20), "glyphs100": (5, 20)}

Accuracy = Callable[[str, str], list[float]]
"""(experiment, cell) to the final accuracies of its seeds, in points."""
Difference = tuple[str, list[float]]
"""The comparison's name, and by how many points the first side is above the second, seed by seed."""


def main(root: Path) -> None:
    for data in SIZES:

        def accuracy(experiment: str, cell: str, data: str = data) -> list[float]:
            folder = root / data / experiment
            summaries = [folder / f"{cell}-seed{seed}" / "summary.json" for seed in SEEDS]
            return [100 * json.loads(path.read_text(encoding="utf-8"))["final_accuracy"] for path in summaries]

        print(f"\n# {data}")
        for title, differences in hypotheses(accuracy, SIZES[data], EPSILONS[data]):
            rows = [(name, *judge(values)) for name, values in differences]
            counts = Counter(verdict for *_, verdict in rows)
            whole = "refuted" if counts["fails"] else "undecided" if counts["open"] else "shown"
            told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("holds", "fails", "open"))
            print(f"\n## {title}: {whole} ({told})\n")
            print("| difference | points | |\n| --- | ---: | --- |")
            for name, mean, half, verdict in rows:
                print(f"| {name} | {mean:+.1f} ± {half:.1f} | {verdict} |")


def judge(values: list[float]) -> tuple[float, float, str]:
    """The mean, the half-width of the 95 % interval, and the verdict."""
    mean = statistics.fmean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, half, "holds" if mean > half else "fails" if mean < -half else "open"


def hypotheses(
    accuracy: Accuracy, sizes: tuple[int, ...], epsilons: tuple[int, ...]
) -> Iterator[tuple[str, list[Difference]]]:
    """Title and differences of each hypothesis."""

    def minus(first: list[float], second: list[float]) -> list[float]:
        return [a - b for a, b in zip(first, second)]

    def cell(name: str) -> list[float]:
        return accuracy("communication", name)

    yield (
        "1. At a comparable budget PEFT beats the head with more clients and full fine-tuning with fewer",
        [
            (f"{method}, M = 8, over {other}", minus(cell(method), cell(key)))
            for key, other in (("head-m64", "head, M = 64"), ("full-m1", "full, M = 1"))
            for method in PEFT
        ],
    )
    scratch = accuracy("pretraining", "full-none")
    yield (
        "2. Unrestricted (M = 8 for all), full is at least as good as PEFT, PEFT better than head, head than scratch",
        [
            *((f"full over {method}", minus(cell("full"), cell(method))) for method in PEFT),
            *((f"{method} over head", minus(cell(method), cell("head"))) for method in PEFT),
            ("head over scratch", minus(cell("head"), scratch)),
        ],
    )

    def loss_by_skew(method: str, place: str) -> list[float]:
        even, uneven = (accuracy("stability", f"{method}-{kind}-{place}") for kind in ("iid", "dirichlet"))
        return minus(even, uneven)

    def loss_by_cohort(method: str, many: str, few: str) -> list[float]:
        most, least = (accuracy("stability", f"{method}-dirichlet-{place}") for place in (many, few))
        return minus(most, least)

    yield (
        "3a. Uneven data costs head and full at least as much as PEFT",
        [
            (f"{other}'s loss over {method}'s, {place}", minus(loss_by_skew(other, place), loss_by_skew(method, place)))
            for other in ("head", "full")
            for method in PEFT
            for place in PARTICIPATION
        ],
    )
    yield (
        "3b. A smaller cohort costs head and full at least as much as PEFT (uneven data)",
        [
            (
                f"{other}'s loss over {method}'s, {many} to {few}",
                minus(loss_by_cohort(other, many, few), loss_by_cohort(method, many, few)),
            )
            for other in ("head", "full")
            for method in PEFT
            for many, few in (("n64-m64", "n64-m8"), ("n16-m16", "n16-m2"))
        ],
    )

    def loss_by_fate(method: str, fate: str) -> list[float]:
        return minus(accuracy("dropout", f"{method}-none"), accuracy("dropout", f"{method}-{fate}"))

    yield (
        "3c. Lost and slow clients cost head and full at least as much as PEFT",
        [
            (f"{other}'s loss over {method}'s, {fate}", minus(loss_by_fate(other, fate), loss_by_fate(method, fate)))
            for other in ("head", "full")
            for method in ("bias", "prompt")
            for fate in ("dropout", "deadline-drop", "deadline-partial")
        ],
    )

    def loss_by_noise(method: str, cell: str) -> list[float]:
        return minus(accuracy("privacy", f"{method}-public"), accuracy("privacy", cell.format(method)))

    mechanisms = {f"epsilon {epsilon}": f"sample-{epsilon}-{{}}" for epsilon in epsilons}
    for title, cells in (
        ("4. Under privacy noise full fine-tuning loses most", mechanisms),
        ("4, with the paper's noise, which guarantees nothing", {"paper_noise": "{}-paper-noise"}),
    ):
        yield (
            title,
            [
                (f"full's loss over {method}'s, {name}", minus(loss_by_noise("full", c), loss_by_noise(method, c)))
                for name, c in cells.items()
                for method in ("head", *PEFT)
            ],
        )
    yield (
        "5. With little data PEFT is at least as good as full",
        [
            (
                f"{method} over full, {size} samples",
                minus(accuracy("scale", f"{method}-max_train{size}"), accuracy("scale", f"full-max_train{size}")),
            )
            for size in sizes
            for method in PEFT
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/offline"))
