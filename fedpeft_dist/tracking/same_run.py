"""Whether a config may go on with what stands in a run's directory.

A run goes on under the same config, backbone, data and traces, or not at all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import result_keys, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.tracking.run_directory import COMPLETE


def check_same(expected: str, actual: str, path: Path, what: str) -> None:
    """Refuses to go on with another backbone, other data, traces or first parameters than a run began with.

    Args:
        expected: the digest that the run has stored.
        actual: the digest here.
        path: the run's directory, or the file that stores the digest.
        what: a key of `_THINGS`.

    Raises:
        ConfigError: the digests differ.
    """
    if expected != actual:
        complaint, things = _THINGS[what]
        raise ConfigError(
            f"{path} {complaint} (sha256 {expected[:12]} there, {actual[:12]} here); give back the {things} that it "
            "had, or train again under another output.name"
        )


_THINGS = {
    "backbone": ("was trained on a backbone of other weights", "weights"),
    "data": ("was begun on other data", "files below data.root"),
    "traces": ("was begun with other traces", "files of federation.participation"),
    "start": ("was begun from other parameters", "files of method.init"),
}


def is_complete(state: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether nothing is left to do for a config in a directory with that state."""
    if state["state"] != COMPLETE:
        return False
    budget = state.get("stopped_at_epsilon")
    is_spent = budget is not None and budget == getattr(config.privacy, "stop_at_epsilon", None)
    return is_spent or state.get("next_round", 0) >= config.federation.rounds


def with_choices_of(stored: RunConfig, config: RunConfig) -> RunConfig:
    """The config with the values that `auto` stood for when the stored config's run began."""
    for section, keys in (("runtime", ("device", "precision", "lanes", "products")), ("privacy", ("slots",))):
        theirs, ours = getattr(stored, section), getattr(config, section)
        taken = {key: getattr(theirs, key, "auto") for key in keys if getattr(ours, key, None) == "auto"}
        config = with_values(config, section, **taken)
    return config


def check_same_run(stored: RunConfig, config: RunConfig, path: Path) -> None:
    """Refuses to go on with a run under a config that would give another result.

    `federation.rounds` may grow, unless the rounds already run have followed a schedule that depends on it, and with it
    the privacy budget; `privacy.stop_at_epsilon` may change.

    Raises:
        ConfigError: with the keys that differ.
    """
    differing = differing_keys(stored, config)
    if differing:
        old, new = _compared(stored), _compared(config)
        changes = ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in differing)
        raise ConfigError(f"{path} holds a run of another config: {changes}; give another output.name, or remove it")


def differing_keys(stored: RunConfig, config: RunConfig) -> list[str]:
    """The keys in which a config asks for another result than a run's own, as `check_same_run` counts them."""
    old, new = _compared(stored), _compared(config)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if "auto" in (stored.runtime.products, config.runtime.products):
        differing = [key for key in differing if key != "runtime.products"]
    longer = config.federation.rounds > stored.federation.rounds
    if "federation.rounds" in differing and longer and config.client.schedule.name != "cosine":
        differing.remove("federation.rounds")
        target = "privacy.epsilon"
        if target in differing and None not in (old.get(target), new.get(target)) and new[target] > old[target]:
            differing.remove(target)
    return [key for key in differing if key != "privacy.stop_at_epsilon"]


def _compared(config: RunConfig) -> dict[str, Any]:
    """The keys that must stay. The library of products is no part of a run's name, but changes its rounding."""
    return result_keys(config) | {"runtime.products": config.runtime.products}
