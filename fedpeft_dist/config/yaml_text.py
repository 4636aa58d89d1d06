"""YAML as configs use it: read strictly, and written so that it is read back as it was."""

import difflib
import re
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.paths import SURROGATE

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and a date as text, because no key takes a date.

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
            _refuse("an alias stands inside of what it names", node)
        if isinstance(node, yaml.ScalarNode) and SURROGATE.search(node.value):
            _refuse(f"{node.value!r} holds half a character", node)
        if isinstance(node, yaml.MappingNode):  # checked before merges (<<) add other mappings' keys
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                _refuse(f"key {twice[0][1]!r} is given twice", node)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolves merges as YAML says: a mapping's own keys come first, then those of what it merges, in order.

        In some versions of PyYAML a merged mapping loses its own keys to those that it has merged itself.
        """
        merges = [value for key, value in node.value if key.tag == _MERGE]
        pairs = [pair for pair in node.value if pair[0].tag != _MERGE]
        for value in merges:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    _refuse("<< takes mappings", source)
                self.flatten_mapping(source)
                pairs += source.value
        first: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for pair in pairs:
            first.setdefault((pair[0].tag, pair[0].value) if isinstance(pair[0], yaml.ScalarNode) else id(pair), pair)
        node.value = list(first.values())


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _refuse(problem: str, node: yaml.Node) -> NoReturn:
    raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def parse_yaml(text: str) -> Any:
    """The value of a text; raises ValueError, which says why on one line, if the text is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None


def dump_yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of one file; raises ConfigError if it is missing, cannot be read, or holds no mapping."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = did_you_mean(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(tree).__name__}")
    return tree or {}


def did_you_mean(given: str, known: list[str]) -> str:
    """The end of a message, which suggests the known name that is spelt most like the given one, if one is near."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
