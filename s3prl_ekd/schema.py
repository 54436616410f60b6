"""Plain data (from YAML) -> frozen dataclasses, with one sentence for whatever does not fit.

The types understood are those the configuration needs: ``bool int float str``, ``Literal``,
``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and dataclasses of these. A dataclass may check
itself in ``__post_init__`` by raising ``ValueError("what is wrong")``; the YAML path is put before.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from .errors import ConfigError

T = TypeVar("T")


class UniqueKeyLoader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that refuses a key written twice instead of keeping the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"the key {key!r} is written twice (line {line})")
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict:
    """Read a YAML file that holds a mapping. Raises ConfigError naming the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    try:
        # A subclass of SafeLoader: it builds plain data only.
        data = yaml.load(text, Loader=UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        what = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise ConfigError(f"{path} is not valid YAML{line}: {what}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings: a mapping of keys to values is expected")
    return data


def build(kind: type[T], data: Any, where: str) -> T:
    """Build ``kind`` from plain ``data``; ``where`` is the YAML path used in messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type or a value that is not allowed.
    """
    return _convert(kind, data, where)


def plain(value: Any) -> Any:
    """The inverse of :func:`build`: dataclasses and tuples become dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _convert(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    if origin is Literal:
        allowed = typing.get_args(kind)
        # `True == 1` in Python: compare types too, so that `layers: true` is not layer 1.
        if not any(type(data) is type(item) and data == item for item in allowed):
            names = ", ".join(map(str, allowed))
            raise ConfigError(f"{where}: {_show(data)} is not known; use one of: {names}")
        return data
    if origin in (Union, types.UnionType):
        return _optional(kind, data, where)
    if origin is tuple:
        (item, _) = typing.get_args(kind)
        if not isinstance(data, (list, tuple)):
            raise ConfigError(f"{where}: a list is expected, not {_show(data)}")
        return tuple(_convert(item, value, f"{where}[{i}]") for i, value in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: a mapping is expected, not {_show(data)}")
        item = typing.get_args(kind)[1]
        for key in data:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the name {_show(key)} must be text; put it in quotes")
        return {key: _convert(item, value, f"{where}.{key}") for key, value in data.items()}
    return _scalar(kind, data, where)


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a mapping of settings is expected, not {_show(data)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"{where}: unknown key {_show(key)}{guess}; known keys: {', '.join(fields)}"
            )
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"{where}: the key {name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _optional(kind: Any, data: Any, where: str) -> Any:
    inner = [item for item in typing.get_args(kind) if item is not type(None)]
    if data is None and len(inner) < len(typing.get_args(kind)):
        return None
    (only,) = inner  # the configuration uses no other unions
    return _convert(only, data, where)


def _scalar(kind: type, data: Any, where: str) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind is float and isinstance(data, str):
        # YAML 1.1 reads `1e-6` as text: what is meant is plain.
        try:
            data = float(data)
        except ValueError:
            pass
    if kind is float and type(data) is int:
        data = float(data)
    if type(data) is not kind:
        raise ConfigError(f"{where}: {names[kind]} is expected, not {_show(data)}")
    if kind is float and not math.isfinite(data):
        raise ConfigError(f"{where}: a finite number is expected, not {_show(data)}")
    return data


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
