"""The pictures of who holds which classes, for the page."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from fedpeft_dist.reports.axes import show
from fedpeft_dist.reports.runs import Run

MAX_PICTURES, MAX_CELLS = 48, 500_000
"""Limits of a page: the partitions, and the numbers in all partitions together (about a megabyte)."""


def partition_pictures(runs: Iterable[Run]) -> tuple[list[dict[str, Any]], int]:
    """Each distinct partition once, and how many more there are. Further seeds of a setting come last."""
    holders: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.partition is not None:
            holders[_setting(run), json.dumps(run.partition["counts"])].append(run)
    most: Counter[tuple[Any, int]] = Counter()
    for found in holders.values():
        most[_scale(found[0])] = max(most[_scale(found[0])], *map(max, found[0].partition["counts"]))
    pictures, later = [], []
    seen = set()
    for (setting, _), found in holders.items():
        (later if setting in seen else pictures).append(_picture(setting, found, most[_scale(found[0])]))
        seen.add(setting)
    shown, cells = [], 0
    for picture in [*pictures, *later]:
        cells += len(picture["counts"]) * len(picture["counts"][0])
        if len(shown) == MAX_PICTURES or (cells > MAX_CELLS and shown):
            break
        shown.append(picture)
    return shown, len(holders) - len(shown)


def _picture(setting: str, runs: list[Run], most: int) -> dict[str, Any]:
    partition = runs[0].partition
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    names = partition["class_names"]
    return {
        "title": f"{setting}, seed {', '.join(map(str, seeds))}" if seeds else setting,
        "runs": len(runs),
        "clients": partition["num_clients"],
        "most": most,
        "names": names and [str(name) for name in names],
        "counts": partition["counts"],
    }


def _scale(run: Run) -> tuple[Any, int]:
    """Partitions of a data set over as many clients share a scale; an even one looks pale beside an uneven one."""
    return run.keys.get("data.name", run.name), run.partition["num_clients"]


def _setting(run: Run) -> str:
    """`digits, 500 samples, dirichlet 0.1, N=64`."""
    keys = run.keys
    samples = keys.get("data.max_train")
    partition = (keys.get(f"data.partition.{key}") for key in ("name", "alpha"))
    parts = [
        show(keys.get("data.name", run.name)),
        f"{samples:,} samples" if samples is not None else "",
        " ".join(show(value) for value in partition if value is not None),
        f"N={run.partition['num_clients']:,}",
    ]
    return ", ".join(filter(None, parts))
