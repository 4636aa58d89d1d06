"""The factor on the client's learning rate, by round."""

import math

from fedpeft_dist.config import schema


def rate_factor(config: schema.ScheduleConfig, round_number: int, num_rounds: int) -> float:
    """The factor for a round, counted from 0, of a run of num_rounds."""
    match config:
        case schema.CosineSchedule(final=final, warmup=warmup):
            if round_number < warmup:
                return (round_number + 1) / (warmup + 1)
            progress = (round_number - warmup) / (num_rounds - warmup)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case schema.ExponentialSchedule(gamma=gamma):
            return gamma**round_number
    return 1.0
