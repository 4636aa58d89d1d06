"""From a YAML file to a validated RunConfig and its name: `extends`, `key=value` overrides, the digest of its keys."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.explain import explain_errors
from fedpeft_dist.config.paths import derived_name, expand_path
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.config.trees import flatten_keys, merge_trees, name_choices, parse_overrides
from fedpeft_dist.config.yaml_text import dump_yaml, read_yaml

RESULT_NEUTRAL = (
    "output",
    "data.root",
    "data.store",
    "runtime.compile",
    "runtime.products",
    "runtime.verify",
    "runtime.cache",
    "runtime.sharding.size",
    "runtime.sharding.lanes",
    "runtime.sharding.offload",
    "runtime.sharding.nvme_path",
    "federation.evaluate_every",
    "federation.evaluate_clients",
)
"""Keys that change how a run is carried out or watched, never what it computes."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file, applies its parents and then `key=value` overrides, and validates the whole.

    Raises ConfigError, whose message is one line, for a missing or unreadable file, an unknown key or a wrong value.
    """
    tree = read_tree(Path(path))
    if is_sweep(tree):
        raise ConfigError(f"{path}: this is a sweep, of many configs; use `fedpeft sweep list` and `fedpeft sweep run`")
    return parse_config(merge_trees(tree, parse_overrides(overrides)), str(path))


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config`, with the run's default name if the config gives none."""
    config = load_config(path, overrides)
    return with_values(config, "output", name=config.output.name or default_run_name(path, config))


def is_sweep(tree: Mapping[str, Any]) -> bool:
    """Whether a YAML file's keys are those of a sweep."""
    return "base" in tree and ("axes" in tree or "cells" in tree)


def read_tree(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a config file and of its parents, merged; not yet validated.

    `children` are the files that led here by `extends`. Raises ConfigError for a missing or unreadable file.
    """
    resolved = path.resolve()
    if resolved in children:
        raise ConfigError(f"{path}: extends itself, through {' -> '.join(map(str, children))}")
    tree = read_yaml(path)
    if (parent := tree.pop("extends", None)) is None:
        return tree
    return merge_trees(read_tree(extended_file(path, parent), (*children, resolved)), tree)


def extended_file(path: Path, extends: Any) -> Path:
    """The file that `extends` names, relative to the file `path`; raises ConfigError if the value cannot be a path."""
    if not isinstance(extends, str):
        raise ConfigError(f"{path}: extends: {extends!r} is not a path relative to this file")
    try:
        return path.parent / expand_path(extends)
    except ValueError as error:
        raise ConfigError(f"{path}: extends: {error}") from None


def parse_config(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Validates a tree of keys over the defaults; `source` names it in errors."""
    tree = name_choices(merge_trees(_as_tree(RunConfig()), tree))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain_errors(tree, error.errors())}") from None


def dump_config(config: RunConfig) -> str:
    """The config as YAML with every default filled in; loading it gives the same config."""
    return dump_yaml(_as_tree(config))


def with_values(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The config with other values in one section; they are not validated again."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def default_run_name(path: str | Path, config: RunConfig) -> str:
    """`<folder>-<file>-<hash>`, from the config's path and its result-affecting keys."""
    path = Path(path).resolve()
    return derived_name(f"{path.parent.name}-{path.stem}", f"-{config_digest(config)[:8]}")


def config_digest(config: RunConfig) -> str:
    """SHA-256 of the keys that can change a run's result, and their values."""
    return hashlib.sha256(json.dumps(result_keys(config), sort_keys=True).encode()).hexdigest()


def result_keys(config: RunConfig) -> dict[str, Any]:
    """Dotted key to value for every leaf that can change a run's result."""
    neutral = set(RESULT_NEUTRAL)
    if config.data.root_is_identity:  # the root of other data sets says only where their files lie
        neutral.remove("data.root")
    if config.algorithm.name == "fedavg":  # it was once the only algorithm, and the digests of those runs stay valid
        neutral.add("algorithm.name")
    lately = ("blocks", "init", "rslora", "ranks")  # keys that methods once lacked, likewise
    neutral.update(f"method.{key}" for key in lately if not getattr(config.method, key, None))
    if config.runtime.sharding.quantize == "none":  # likewise
        neutral.add("runtime.sharding.quantize")
    leaves = flatten_keys(_as_tree(config)).items()
    return {key: value for key, value in leaves if not f"{key}.".startswith(tuple(f"{part}." for part in neutral))}


def _as_tree(config: RunConfig) -> dict[str, Any]:
    return json.loads(config.model_dump_json())
