"""Prints the table of docs/backbones.md: which methods fit which timm families.

python -m tests.numerics.family_table
"""

from __future__ import annotations

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.federation.ahead import compute_cost

from .cases import METHODS
from .families import FAMILIES
from .test_every_family import make_config

COLUMNS = list(METHODS)[: list(METHODS).index("partial") + 1]
"""The methods that the table shows. Smaller tables of families in other tests tell what fits the later ones."""


def print_table() -> None:
    print("| family | model | " + " | ".join(f"`{method}`" for method in COLUMNS) + " |")
    print("| --- | --- |" + " :-: |" * len(COLUMNS))
    reasons = {}
    for family, (name, _, _) in sorted(FAMILIES.items()):
        cells = []
        for method in COLUMNS:
            try:
                compute_cost(make_config(family, method))
                cells.append("=")
            except ConfigError as error:
                cells.append("-")
                reasons[f"{family}, `{method}`"] = error
        print(f"| {family} | `{name}` | " + " | ".join(cells) + " |", flush=True)
    print()
    for cell, reason in reasons.items():
        print(f"- {cell}: {reason}")


if __name__ == "__main__":
    print_table()
