"""Federated parameter-efficient fine-tuning: many virtual clients side by side on one frozen backbone."""

__version__ = "0.1.0"


def train(config: str, *overrides: str) -> str:
    """Runs a config file, as `fedpeft train CONFIG KEY=VALUE ...` does.

    Returns:
        `complete`, or `interrupted` if a signal stopped the run.
    """
    from fedpeft_dist.config.load import load_run_config  # importing the package alone loads nothing heavy
    from fedpeft_dist.federation.run import run

    return run(load_run_config(config, overrides))
