"""Federated parameter-efficient fine-tuning: many virtual clients side by side on one frozen backbone."""

__version__ = "0.1.0"
