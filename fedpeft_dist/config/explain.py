"""pydantic's errors in the words of a config: the key, the value, and what would be valid."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.config.trees import names_of, section_types
from fedpeft_dist.config.yaml_text import did_you_mean

_MAPPING, _LIST = "should be a mapping of keys to values", "should be a list, such as [1, 2]"
_YAML_WORDS = {
    "string_type": "should be text",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": f"{_MAPPING}, such as {{name: ...}}",
    "list_type": _LIST,
    "tuple_type": _LIST,
}


def explain_errors(tree: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> str:
    """pydantic's errors in one line. What each choice of a union says about one value is told once, with `or`."""
    told: dict[str, str] = {}
    for item in items:
        clause = explain_error(tree, item)
        value = f"{'.'.join(_key_path(tree, item['loc']))}: {item['input']!r}: "
        if value in told and clause.startswith(value):
            told[value] += f", or {clause.removeprefix(value)}"
        else:
            told[value if clause.startswith(value) else clause] = clause
    return "; ".join(told.values())


def explain_error(tree: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """One pydantic error as `key: value: what is wrong and what would be valid`."""
    path = _key_path(tree, item["loc"])
    key = ".".join(path)
    match item["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest_key(path, tree)}"
        case "union_tag_invalid":
            choices = item["ctx"]["expected_tags"].replace("'", "").split(", ")
            given = str(item["ctx"]["tag"])
            return f"{key}.name: {given!r} is none of {', '.join(choices)}{did_you_mean(given, choices)}"
        case "union_tag_not_found":
            return f"{key}.name: missing; give the name of a {key}"
        case "value_error":
            message = str(item["ctx"]["error"])
            return f"{key}: {message}" if path else message
        case "missing":
            return f"{key}: missing"
    return f"{key}: {item['input']!r}: {explain_message(item)}"


def explain_message(item: Mapping[str, Any]) -> str:
    """pydantic's own words, or clearer ones for errors that are particular to YAML."""
    if item["type"] == "string_type" and item["input"] is None:
        return "should be text; ~ alone means null in YAML, so give ~/ for the home folder"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        kind = "boolean" if isinstance(item["input"], bool) else "number"
        return f"""YAML reads this as a {kind}, not as text; put it in quotes ("..." in a file, '"..."' in a shell)"""
    return _YAML_WORDS.get(item["type"], f"{item['msg'][0].lower()}{item['msg'][1:]}")


def _key_path(tree: Any, location: Sequence[Any]) -> list[str]:
    """pydantic's location without the names of choices that it puts between the keys."""
    path, node = [], tree
    for i, part in enumerate(location):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(part, int) and isinstance(node, Sequence):
            pass
        elif not isinstance(node, Mapping) or node.get("name") == part or i < len(location) - 1:
            continue
        path.append(str(part))
    return path


def _nearest_key(path: Sequence[str], tree: Mapping[str, Any]) -> str:
    """Suggests a key of the same section that is spelt alike, or a place where a key of this name does exist."""
    known = list(_known_keys(RunConfig, tree, ""))
    section, _, leaf = ".".join(path).rpartition(".")
    siblings = [name for prefix, _, name in (key.rpartition(".") for key in known) if prefix == section]
    if near := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {'.'.join([*path[:-1], near[0]])}?"
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(siblings)}"


def _known_keys(model: type[BaseModel], tree: Any, prefix: str) -> Iterator[str]:
    """The dotted keys of a section and of the sections in it, as the tree has chosen them."""
    for name, field in model.model_fields.items():
        yield prefix + name
        given = tree.get(name) if isinstance(tree, Mapping) else None
        chosen = given.get("name") if isinstance(given, Mapping) else None
        sections = section_types(field)
        for section in sections:
            if len(sections) == 1 or (chosen in names_of(section) if chosen else section is type(field.default)):
                yield from _known_keys(section, given, f"{prefix}{name}.")
