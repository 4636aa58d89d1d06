"""Sweeps: one file that describes many runs, and workers that share them out.

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
    seeds: [1, 42, 3407]                     # each of these is run with each seed; null: with the base's

Of a config file that a choice extends, what counts is where it differs from the base. That is laid over the base first,
then `set`, then the choices' own keys; a later axis wins over an earlier one.

Cells are numbered in this order, the last axis faster than the first and the seed fastest. A cell is called by its
choices and its seed, and its run lies in the directory of that name: so any number of workers can go through the same
list, a run's lock tells what is being worked at, its state what is complete.
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
