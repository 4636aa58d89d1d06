"""Sweeps: one file that describes many runs, and workers that divide them up.

A sweep file names a base config and what varies:

    base: ../paper/cifar100/base.yaml        # a run's config, relative to this file
    output: runs/sweeps/example              # where the cells' directories go; null: below the base's output.root
    set: {federation.rounds: 20}             # keys that all cells share, over the base
    axes:                                    # every combination is a cell
      method:                                # choices by name: keys to set, which may extend a config file, ...
        bias: {extends: ../paper/cifar100/bias.yaml}
        head: {method: {name: head}, client.optimizer.lr: 0.005}
      federation.cohort: [8, 64]             # ... or a key and its values
    cells:                                   # further cells, by name
      full-m1: {extends: ../paper/cifar100/full.yaml, federation.cohort: 1}
    seeds: [1, 42, 3407]                     # every cell is run with each seed; null: the base's seed

A config file that a choice extends counts only where it differs from the base. These differences are laid over the base
first, then `set`, then the choices' own keys; a later axis wins over an earlier one.

Cells are numbered in this order: the last axis changes faster than the first, and the seed fastest. A cell is named by
its choices and its seed, and its run lies in the directory of that name. So any number of workers can go through the
same list: a run's lock shows that it is in work, its state that it is complete.
"""

from fedpeft_dist.sweeps.expansion import Cell, load_cells, load_sweep, pick_cell
from fedpeft_dist.sweeps.workers import Outcome, cell_rows, cell_state, count_states, record_failure, work_through

__all__ = [
    "Cell",
    "Outcome",
    "cell_rows",
    "cell_state",
    "count_states",
    "load_cells",
    "load_sweep",
    "pick_cell",
    "record_failure",
    "work_through",
]
