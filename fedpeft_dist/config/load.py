"""YAML files to a validated RunConfig: `extends`, dotted overrides, and errors that help.

Merging is by key, child over parent. A section that names another choice than its parent's (`method: {name: lora}` over
a prompt method) replaces the parent's section whole: the old choice's fields mean nothing to the new one. So does an
empty section: `backbone: {model_args: {}}` takes none of the parent's arguments.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.paths import SURROGATE, derived_name, expand_path
from fedpeft_dist.config.schema import RunConfig

# These change how a run is carried out or watched, never what it computes.
RESULT_NEUTRAL = (
    "output",
    "data.root",
    "data.store",
    "runtime.compile",
    "federation.evaluate_every",
    "federation.evaluate_clients",
)


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and a date as text, as no key takes a date.

    It refuses a key given twice, a section that contains itself, and text that no file could hold.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and node.end_mark is None:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside of what it names", node.start_mark)
        return node

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if SURROGATE.search(node.value):
            raise yaml.composer.ComposerError(None, None, f"{node.value!r} holds half a character", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Here, where a merge (<<) has not yet laid other keys beside the mapping's own.
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for tag, key in keys:
            if keys.count((tag, key)) > 1:
                raise yaml.composer.ComposerError(None, None, f"key {key!r} is given twice", node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolves merges as YAML says: a mapping's own keys come first, then those of what it merges, in order.

        In some of PyYAML's versions a mapping that is merged loses its own keys to those it has merged itself.
        """
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        for _, value in (pair for pair in node.value if pair[0].tag == _MERGE):
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(None, None, "<< takes mappings", source.start_mark)
                self.flatten_mapping(source)
                own += source.value
        first: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in own:
            first.setdefault((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key), (key, value))
        node.value = list(first.values())


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file, applies its parents and then `key=value` overrides, and validates the whole.

    Raises:
        ConfigError: a missing or unreadable file, an unknown key, a wrong value; the message is one line.
    """
    tree = read_tree(Path(path))
    if is_sweep(tree):
        raise ConfigError(f"{path}: this is a sweep, of many configs; use `fedpeft sweep list` and `fedpeft sweep run`")
    return parse_config(merge_trees(tree, parse_overrides(overrides)), str(path))


def is_sweep(tree: Mapping[str, Any]) -> bool:
    """Whether a YAML file's keys are those of a sweep."""
    return "base" in tree and ("axes" in tree or "cells" in tree)


def read_tree(path: Path) -> dict[str, Any]:
    """The keys of a config file and of its parents, merged; not yet validated.

    Raises:
        ConfigError: a missing or unreadable file, here or among the parents.
    """
    return _read_chain(path, ())


def parse_config(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Validates a tree of keys over the defaults; `source` names it in errors."""
    tree = _name_choices(merge_trees(json.loads(RunConfig().model_dump_json()), tree))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(_explain(tree, item) for item in error.errors())}") from None


def dump_config(config: RunConfig) -> str:
    """The config as YAML with every default filled in; loading it gives the same config."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False)


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
    flat = dict(_flatten(json.loads(config.model_dump_json())))
    kept = {"data.root"} if config.data.root_is_identity else set()
    return {
        key: value
        for key, value in flat.items()
        if key in kept or not any(key == neutral or key.startswith(neutral + ".") for neutral in RESULT_NEUTRAL)
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path) -> dict[str, Any]:
    """One file's own keys.

    Raises:
        ConfigError: it is missing, cannot be read, or holds no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such config file{_did_you_mean(near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(tree).__name__}")
    return tree


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: extends itself, through {' -> '.join(str(p) for p in seen)}")
    tree = read_yaml(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: {parent!r} is not a path relative to this file")
    return merge_trees(_read_chain(named_beside(path, "extends", parent), (*seen, resolved)), tree)


def named_beside(path: Path, key: str, name: str) -> Path:
    """The file that a key of the file `path` names, relative to that file.

    Raises:
        ConfigError: what no path can be.
    """
    try:
        return path.parent / expand_path(name)
    except ValueError as error:
        raise ConfigError(f"{path}: {key}: {error}") from None


def merge_trees(parent: Mapping[str, Any], child: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Two trees of keys, the child's values over the parent's; a section that chooses another name replaces its own."""
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        both_sections = isinstance(old, dict) and isinstance(value, dict) and value
        if both_sections and not _names_another(prefix + key, old, value):
            merged[key] = merge_trees(old, value, f"{prefix}{key}.")
        else:
            merged[key] = value
    return merged


def _names_another(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a section is a choice (of a method, a data set, ...) and its new value chooses something else."""
    if key not in _choices():
        return False
    old_name = old.get("name", _default_choice(key))
    return new.get("name", old_name) != old_name


def _name_choices(tree: Mapping[str, Any], key: str = "", parent: Any = None) -> dict[str, Any]:
    """The tree with the default name in every choice that is given without one; `parent` is its parent's name."""
    if key in _choices():
        tree = {"name": _default_choice(key, parent), **tree}
    prefix = f"{key}." if key else ""
    return {
        name: _name_choices(value, prefix + name, tree.get("name")) if isinstance(value, dict) else value
        for name, value in tree.items()
    }


def _default_choice(key: str, parent: Any = None) -> str:
    defaults = _choices()[key]
    return dict(defaults).get(parent, defaults[0][1])


@cache
def _choices() -> dict[str, list[tuple[Any, str]]]:
    """Dotted keys of the sections whose `name` chooses their fields.

    With each come the names that it has by default: where the parent is a choice, too, one for each of its names.
    """
    found: dict[str, list[tuple[Any, str]]] = {}

    def walk(model: type[BaseModel], prefix: str) -> None:
        parent = model.model_fields.get("name")
        for name, field in model.model_fields.items():
            for section in _sections(field):
                tag = section.model_fields.get("name")
                if tag is not None and get_origin(tag.annotation) is Literal and len(get_args(tag.annotation)) == 1:
                    own = get_args(parent.annotation)[0] if parent is not None and get_args(parent.annotation) else None
                    found.setdefault(prefix + name, []).append((own, field.default.name))
                walk(section, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as a tree; values are YAML.

    Raises:
        ConfigError: no such text, or two that contradict each other.
    """
    pairs = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is not an override; give key=value, such as client.optimizer.lr=0.1")
        if not text.strip():
            raise ConfigError(f"{key}: no value stands after =; give one, or null for none")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {text!r} is not a YAML value ({_one_line(error)})") from None
        pairs[key] = value
    return nest_keys(pairs)


def nest_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from keys that may be dotted, such as `client.optimizer.lr`; later ones win.

    Raises:
        ConfigError: a key is given a value and is a section, too.
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
        # Copied, since a later dotted key may go into it.
        node[leaf] = merge_trees(node[leaf], value, f"{key}.") if both_sections else copy.deepcopy(value)
    return tree


def _explain(tree: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """One pydantic error as `key: value, what is wrong and what would be valid`."""
    path = _key_path(tree, item["loc"])
    key, value = ".".join(path), item["input"]
    match item["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest_key(path, tree)}"
        case "union_tag_invalid":
            choices = [choice.strip().strip("'") for choice in item["ctx"]["expected_tags"].split(",")]
            given = str(item["ctx"]["tag"])
            near = difflib.get_close_matches(given, choices, n=1)
            return f"{key}.name: {given!r} is none of {', '.join(choices)}{_did_you_mean(near)}"
        case "union_tag_not_found":
            return f"{key}.name: missing; give the name of a {key}"
        case "value_error":
            message = str(item["ctx"]["error"])
            return f"{key}: {message}" if path else message
        case "missing":
            return f"{key}: missing"
    return f"{key}: {value!r}: {explain_message(item)}"


def explain_message(item: Mapping[str, Any]) -> str:
    """pydantic's own words, but for those that mean nothing to a writer of YAML."""
    if item["type"] == "string_type" and item["input"] is None:
        return "should be text; ~ alone means null in YAML, so give ~/ for the home folder"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        kind = "boolean" if isinstance(item["input"], bool) else "number"
        return f"""YAML reads this as a {kind}, not as text; put it in quotes ("..." in a file, '"..."' in a shell)"""
    if item["type"] in _YAML_WORDS:
        return _YAML_WORDS[item["type"]]
    return f"{item['msg'][0].lower()}{item['msg'][1:]}"


_YAML_WORDS = {
    "string_type": "should be text",
    "dict_type": "should be a mapping of keys to values",
    "model_type": "should be a mapping of keys to values",
    "model_attributes_type": "should be a mapping of keys to values, such as {name: ...}",
    "list_type": "should be a list, such as [1, 2]",
    "tuple_type": "should be a list, such as [1, 2]",
}


def _key_path(tree: Any, location: Sequence[Any]) -> list[str]:
    """pydantic's location without the union tags that it interleaves with the keys."""
    path, node = [], tree
    for i, part in enumerate(location):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
            path.append(str(part))
        elif isinstance(part, int) and isinstance(node, Sequence):
            path.append(str(part))
        elif isinstance(node, Mapping) and node.get("name") == part:
            continue
        elif i == len(location) - 1 and isinstance(node, Mapping):
            path.append(str(part))
    return path


def _nearest_key(path: Sequence[str], tree: Mapping[str, Any]) -> str:
    """Suggests a sibling that is spelt alike, or else the place where the same leaf does exist."""
    known = list(_known_keys(RunConfig, tree, ""))
    prefix = ".".join(path[:-1])
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == prefix}
    near = difflib.get_close_matches(path[-1], list(siblings), n=1)
    if near:
        return _did_you_mean([siblings[near[0]]])
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
    return _did_you_mean(elsewhere[:1]) or f"; known here: {', '.join(siblings)}"


def _known_keys(model: type[BaseModel], tree: Any, prefix: str) -> Iterator[str]:
    tree = tree if isinstance(tree, Mapping) else {}
    for name, field in model.model_fields.items():
        yield prefix + name
        given = tree.get(name)
        chosen = given.get("name") if isinstance(given, Mapping) else None
        sections = _sections(field)
        default = type(field.default)
        for section in sections:
            tag = section.model_fields.get("name")
            matches = chosen in get_args(tag.annotation) if tag and chosen else section is default
            if len(sections) == 1 or matches:
                yield from _known_keys(section, given, f"{prefix}{name}.")


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The section classes that a field can hold."""
    types = (field.annotation, *get_args(field.annotation))
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
