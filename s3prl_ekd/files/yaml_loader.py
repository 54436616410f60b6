"""YAML as plain data of bounded size, depth and numbers; what is in it is never run."""

from __future__ import annotations

from typing import Any, NoReturn

import yaml

from ..errors import ConfigError
from .text import CONTROL, MAX_DEPTH, MAX_NUMBER

MAX_YAML = 1 << 17  # bytes; PyYAML reads about as many in a second or two
MAX_NODES = 10_000  # scalars, lists and mappings, each alias counted as all that it stands for
MAX_SCALAR = 4096  # characters; a path has no more


class PlainLoader(yaml.SafeLoader):
    """``yaml.SafeLoader`` with bounds, that refuses a key written twice.

    The bounds are kept while the nodes are composed, so that a hostile file is left where it goes
    beyond them: aliases that double each other ten times stand for a thousand values.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._total = 0
        self._weights: dict[int, int] = {}  # id of a finished node -> nodes in it, itself included

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            weight = self._weights.get(id(node))
            if weight is None:
                _yaml_error("an alias stands for something that it is in itself", mark)
            self._count(weight, mark)
            return node
        before = self._total
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _yaml_error(f"it is nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._weights[id(node)] = self._total - before
        return node

    def compose_scalar_node(self, anchor):
        event = self.peek_event()
        if len(event.value) > MAX_SCALAR:
            _yaml_error(f"a text of more than {MAX_SCALAR} characters", event.start_mark)
        return super().compose_scalar_node(anchor)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool, type(None))):
                if key in seen:
                    _yaml_error(f"the key {key!r} is written twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        value = super().construct_object(node, deep)
        if isinstance(value, str) and CONTROL.search(value.removesuffix("\n")):
            _yaml_error("a text with a line break or a control character in it", node.start_mark)
        if type(value) is int and not -MAX_NUMBER <= value < MAX_NUMBER:
            _yaml_error("a number of more than 64 bits", node.start_mark)
        return value

    def _count(self, weight: int, mark) -> None:
        self._total += weight
        if self._total > MAX_NODES:
            _yaml_error(f"it has more than {MAX_NODES:,} values", mark)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data out of YAML text.

    Raises:
        ConfigError: it is not YAML, or goes beyond a bound; ``where`` and the line are named.
    """
    try:
        return yaml.load(text, Loader=PlainLoader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # PyYAML passes on what Python raises: an IndexError for `!!int ""`
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error) or type(error).__name__
        what = CONTROL.sub(" ", " ".join(str(what).split()))[:200]
        raise ConfigError(f"{where} is not valid YAML{line}: {what}") from None


def _yaml_error(problem: str, mark) -> NoReturn:
    raise ConfigError(f"{problem} (line {mark.line + 1})")
