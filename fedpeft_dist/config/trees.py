"""Trees of config keys: how files and overrides are laid over each other.

Merging is by key, child over parent. A section that names another choice than its parent's (`method: {name: lora}` over
a prompt method) replaces the parent's section whole: the old choice's fields mean nothing to the new one. So does an
empty section: `backbone: {model_args: {}}` takes none of the parent's arguments.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.config.yaml_text import parse_yaml


def merge_trees(parent: Mapping[str, Any], child: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Two trees of keys, the child's values over the parent's; `prefix` is the dotted key that they stand below."""
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value:
            default = _default_choice(prefix + key)
            old_name = old.get("name", default)
            if default is None or value.get("name", old_name) == old_name:
                value = merge_trees(old, value, f"{prefix}{key}.")
        merged[key] = value
    return merged


def name_choices(tree: Mapping[str, Any], key: str = "", parent: Any = None) -> dict[str, Any]:
    """The tree with a name in every choice: the default, if none is given.

    `key` is the dotted key of a tree that is a section of a larger one, and `parent` the name of the choice around it.
    """
    if default := _default_choice(key, parent):
        tree = {"name": default, **tree}
    prefix = f"{key}." if key else ""
    return {
        name: name_choices(value, prefix + name, tree.get("name")) if isinstance(value, dict) else value
        for name, value in tree.items()
    }


def _default_choice(key: str, parent: Any = None) -> str | None:
    """The name that a section has by default; None for a section that is no choice."""
    defaults = _choices().get(key, {})
    return defaults.get(parent, next(iter(defaults.values()), None))


@cache
def _choices() -> dict[str, dict[Any, str]]:
    """The dotted keys of sections whose `name` chooses their fields, with the name that each has by default.

    The default may depend on the choice that the section is in: it is found under that choice's name, else under None.
    """
    found: dict[str, dict[Any, str]] = {}

    def walk(model: type[BaseModel], prefix: str) -> None:
        parent = next(iter(names_of(model)), None)
        for name, field in model.model_fields.items():
            for section in section_types(field):
                if len(names_of(section)) == 1:
                    found.setdefault(prefix + name, {})[parent] = field.default.name
                walk(section, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def names_of(section: type[BaseModel]) -> tuple[str, ...]:
    """The names that choose a section; empty for one that is no choice."""
    tag = section.model_fields.get("name")
    return get_args(tag.annotation) if tag is not None and get_origin(tag.annotation) is Literal else ()


def section_types(field: FieldInfo) -> list[type[BaseModel]]:
    """The classes of sections that a field can hold."""
    types = (field.annotation, *get_args(field.annotation))
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as a tree; values are YAML. Raises ConfigError for another form, or for a contradiction."""
    pairs = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is not an override; give key=value, such as client.optimizer.lr=0.1")
        if not text.strip():
            raise ConfigError(f"{key}: no value stands after =; give one, or null for none")
        try:
            pairs[key] = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{key}: {text!r} is not a YAML value ({error})") from None
    return nest_keys(pairs)


def nest_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from keys that may be dotted, such as `client.optimizer.lr`; later ones win.

    Raises ConfigError for a key that is given a value and is also a section.
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} is already given a value of its own")
        both_sections = isinstance(node.get(leaf), dict) and isinstance(value, dict)
        # Copied, because a later dotted key may go into it.
        node[leaf] = merge_trees(node[leaf], value, f"{key}.") if both_sections else copy.deepcopy(value)
    return tree


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to the values of the tree's leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= inner or {f"{prefix}{key}": value}
    return flat
