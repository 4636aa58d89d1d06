"""The real command, with a fault in one round that the variable FAULT names as kind:round (counted from 0):rank.

`endless` gives every client a million local steps, on all ranks if the rank is left empty; `raise` raises an error;
`evaluation` evaluates for ever.
"""

from __future__ import annotations

import os
import runpy
import time
from dataclasses import replace

from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.training.trainer import Trainer


def main() -> None:
    kind, faulty_round, faulty_rank = os.environ["FAULT"].split(":")
    train, evaluate = Trainer.train, Setup.evaluate
    rounds = []

    def train_or_fail(self, tasks, start, is_dropped):
        rounds.append(start.number)
        if start.number == int(faulty_round) and faulty_rank in ("", str(self.runtime.rank)) and kind != "evaluation":
            if kind == "raise":
                raise RuntimeError("a fault that a test has planted")
            tasks = [replace(task, num_steps=10**6) for task in tasks]
        return train(self, tasks, start, is_dropped)

    def evaluate_for_ever(self, vector, is_dropped):
        if rounds[-1] == int(faulty_round) and faulty_rank in ("", str(self.runtime.rank)):
            while not is_dropped():
                time.sleep(0.1)
        return evaluate(self, vector, is_dropped)

    Trainer.train = train_or_fail
    if kind == "evaluation":
        Setup.evaluate = evaluate_for_ever
    runpy.run_module("fedpeft_dist", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
