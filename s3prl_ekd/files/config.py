"""Configuration: YAML -> frozen dataclasses, with one sentence for each mistake.

The types understood are those the configuration needs: ``bool int float str``, ``Literal``,
``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and dataclasses of these. A dataclass may check
itself in ``__post_init__`` by raising ``ValueError("what is wrong")``; the YAML path is put before.

A model config may be the difference to another, by the key ``extends``::

    extends: ../config_model.yaml      # relative to this file; one level
    teachers: [hubert, wavlm]          # a list of names takes these of the base's teachers
    aggregation: average               # other keys replace, mappings are merged

``-o`` on the command line overrides keys of a YAML file or a checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import shlex
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ..compat.no_eval import read_value
from ..errors import ConfigError
from .text import CONTROL, MAX_DEPTH, MAX_NUMBER, MAX_YAML, parse_yaml, read_text

T = TypeVar("T")
MAX_LIST, MAX_NAMES = 10_000, 1000

_CODE = re.compile(r"""[()\[\]{}'"`]""")
_SHELL = re.compile(r"""["$`\\!]""")  # what a shell changes between double quotes


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises ConfigError naming the file."""
    text = read_text(path, "configuration", ConfigError, MAX_YAML)
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings: a mapping of keys to values is expected")
    return data


def build(kind: type[T], data: Any, where: str) -> T:
    """Build ``kind`` from plain ``data``; ``where`` is the YAML path used in messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type or a value that is not allowed.
    """
    result: T = _convert(kind, data, where)
    return result


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
        return _any(data, where)
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
        if len(data) > MAX_LIST:
            raise ConfigError(f"{where}: a list of {len(data)} values; {MAX_LIST} are allowed")
        return tuple(_convert(item, value, f"{where}[{i}]") for i, value in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: a mapping is expected, not {_show(data)}")
        item = typing.get_args(kind)[1]
        if len(data) > MAX_NAMES:
            raise ConfigError(f"{where}: a mapping of {len(data)} names; {MAX_NAMES} are allowed")
        _check_names(data, where)
        return {key: _convert(item, value, f"{where}.{key}") for key, value in data.items()}
    return _scalar(kind, data, where)


def _check_names(data: dict[Any, Any], where: str) -> None:
    for key in data:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the name {_show(key)} must be text; put it in quotes")
        if CONTROL.search(key):
            raise ConfigError(f"{where}: the name {_show(key)} has a control character in it")


def _any(data: Any, where: str, depth: int = 0) -> Any:
    """What a setting of any type may be: plain data, its numbers finite, its names text."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: it is nested more than {MAX_DEPTH} deep")
    if isinstance(data, dict):
        _check_names(data, where)
        return {key: _any(value, f"{where}.{key}", depth + 1) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_any(value, f"{where}[{i}]", depth + 1) for i, value in enumerate(data)]
    if data is None:
        return None
    if type(data) not in (bool, int, float, str):
        raise ConfigError(f"{where}: a number, text or list is expected, not {_show(data)}")
    return _scalar(type(data), data, where)


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
    if type(data) is int and not -MAX_NUMBER <= data < MAX_NUMBER:
        raise ConfigError(f"{where}: a number of at most 64 bits is expected, not {_show(data)}")
    if kind is float and type(data) is int:
        data = float(data)
    if type(data) is not kind:
        raise ConfigError(f"{where}: {names[kind]} is expected, not {_show(data)}")
    if isinstance(data, float) and not math.isfinite(data):
        raise ConfigError(f"{where}: a finite number is expected, not {_show(data)}")
    if isinstance(data, str) and CONTROL.search(data):
        raise ConfigError(f"{where}: {_show(data)} has a line break or a control character in it")
    return data


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number far too large"
    text = " ".join(text.split())  # a tensor takes several lines
    return text if len(text) <= 60 else text[:57] + "..."


def read_extended(
    path: str | Path,
    convert: Callable[[dict[str, Any], str], dict[str, Any]] = lambda data, _: data,
) -> dict[str, Any]:
    """Read a model config and merge it into the one it extends, if any.

    Args:
        path: of the config.
        convert: applied to the contents and path of each file before they are merged.

    Raises:
        ConfigError: a file cannot be read, the base extends another one, or a teacher taken from
            the base is not there.
    """
    path = Path(path)
    data = convert(read_yaml(path), str(path))
    if "extends" not in data:
        return data
    name = data.pop("extends")
    if not isinstance(name, str):
        raise ConfigError(f"{path}.extends: the path of a YAML file is expected, not {name!r}")
    base_path = path.parent / name
    base = convert(read_yaml(base_path), str(base_path))
    if "extends" in base:
        raise ConfigError(
            f"{path}.extends: {base_path} extends another file itself; one level is allowed"
        )
    chosen = data.get("teachers")
    if isinstance(chosen, list):
        data["teachers"] = _choose(base.get("teachers"), chosen, path)
        base.pop("teachers", None)
    return merge(base, data)


def _choose(teachers: Any, names: list[Any], path: Path) -> dict[str, Any]:
    known = teachers if isinstance(teachers, dict) else {}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(
                f"{path}.teachers: the file it extends has no teacher {name!r}; "
                f"it has: {', '.join(map(str, known)) or 'none'}"
            )
    return {name: known[name] for name in names}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``: mappings are merged key by key, all else is replaced."""
    merged = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_overrides(data: dict[str, Any], overrides: str) -> dict[str, Any]:
    """s3prl's ``-o "config.a.b=1,,config.c='x'"`` on a copy of ``data``, plain values only.

    Values are numbers, quoted texts and lists of them; anything else is taken as text, as s3prl
    takes what it cannot evaluate, unless it has brackets or quotes: it may be meant as code.
    ``args.*`` overrides are none of the config's business and only looked at.

    Raises:
        ConfigError: a key or a value is not of that form.
    """
    data = copy.deepcopy(data)
    for option in overrides.split(",,"):
        key, equals, text = option.strip().partition("=")
        if not equals:
            raise ConfigError(
                f"-o {option.strip()!r}: write config.KEY.KEY=VALUE, several joined by ,,"
            )
        first, *path = key.strip().split(".")
        if first not in ("args", "config"):
            raise ConfigError(f"-o {key.strip()!r}: the key must start with config. or args.")
        value = text.strip()
        try:
            value = read_value(value)
        except ValueError:
            if "=" in value:  # most often a single comma between two settings
                raise ConfigError(
                    f"-o {option.strip()!r}: write config.KEY.KEY=VALUE, several joined by ,,; a "
                    "value with an = sign needs quotes"
                ) from None
            if _CODE.search(value):
                raise ConfigError(
                    f"-o {key.strip()!r}: {value[:60]!r} is no plain value; write a number, a list "
                    "or a quoted text"
                ) from None
        if first == "args" or not path:
            continue
        target = data
        for name in path[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"-o {key.strip()!r}: {name} is not a mapping")
        target[path[-1]] = value
    return data


def argument_overrides(overrides: str | None) -> dict[str, Any]:
    """The arguments that ``-o`` sets, without ``args.``, and their values."""
    values: dict[str, Any] = {}
    for option in (overrides or "").split(",,"):
        key, _, text = option.strip().partition("=")
        if key.strip().startswith("args."):
            try:
                value = read_value(text.strip())
            except ValueError:
                value = text.strip()
            values[key.strip().removeprefix("args.")] = value
    return values


def overridden(overrides: str | None) -> frozenset[str]:
    """The keys of the config that ``-o`` sets, without ``config.``; see :func:`apply_overrides`."""
    options = (overrides or "").split(",,")
    keys = (option.partition("=")[0].strip() for option in options)
    return frozenset(key.removeprefix("config.") for key in keys if key.startswith("config."))


def literal(value: Any) -> str:
    """A plain value as s3prl's ``-o`` takes it: without a further ``=`` sign or comma in a text."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value).replace("=", r"\x3d").replace(",", r"\x2c")


def escape_equals(overrides: str) -> str:
    """``-o`` as s3prl's own script splits it, which allows one ``=`` sign in an option.

    Raises:
        ConfigError: as :func:`apply_overrides`.
    """
    apply_overrides({}, overrides)
    options = []
    for option in overrides.split(",,"):
        key, _, text = option.partition("=")
        if "=" in text:
            text = repr(read_value(text.strip())).replace("=", r"\x3d")
        options.append(f"{key}={text}")
    return ",,".join(options)


def typed(key: str, value: Any) -> str:
    """``-o "config.KEY=VALUE"``, to be typed in a shell."""
    text = f"config.{key}={literal(value)}"
    return f"-o {shlex.quote(text)}" if _SHELL.search(text) else f'-o "{text}"'
