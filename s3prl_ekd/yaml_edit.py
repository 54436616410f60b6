"""Values put into a YAML text where they stand: comments, order and layout stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from .errors import ConfigError
from .files.yaml_loader import PlainLoader, parse_yaml

Value = str | Sequence[str]


def put(text: str, values: Mapping[str, Value]) -> str:
    """``text`` with other values under dotted keys.

    Args:
        text: YAML, a mapping.
        values: key -> a text, or a list of texts for a key that has a list.

    Raises:
        ConfigError: it is not YAML, a key is not there, or it has a value of another kind.
    """
    for key, value in values.items():
        start, end, new = _replacement(text, key, value)
        text = text[:start] + new + text[end:]
    return text


def _replacement(text: str, key: str, value: Value) -> tuple[int, int, str]:
    """From where to where, and by what."""
    parse_yaml(text, "the file")  # or nothing is put into it
    node = yaml.compose(text, Loader=PlainLoader)
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((below for name, below in pairs if name.value == part), None)
    start, end = (node.start_mark.index, node.end_mark.index) if node else (0, 0)
    if isinstance(node, yaml.ScalarNode) and isinstance(value, str):
        return start, end, quoted(value)
    if isinstance(node, yaml.SequenceNode) and not isinstance(value, str):
        if node.flow_style:
            return start, end, f"[{', '.join(map(quoted, value))}]"
        # A block's own end lies behind the comments that follow it.
        dash = "\n" + " " * node.start_mark.column + "- "
        end = node.value[-1].end_mark.index
        return node.value[0].start_mark.index, end, dash.join(map(quoted, value))
    raise ConfigError(f"the key {key} is not there, or holds something else than a path")


def get(text: str, key: str) -> Value | None:
    """What a YAML text has under a dotted key; None where there is no such key.

    Raises:
        ConfigError: it is not YAML.
    """
    value = parse_yaml(text, "the file")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def quoted(text: str) -> str:
    """In single quotes, in which YAML takes every character as it is."""
    return "'" + text.replace("'", "''") + "'"
