"""Configuration: YAML -> frozen dataclasses; each error names the YAML path.

Supported types: ``bool int float str``, ``Literal``, ``X | None``, ``tuple[X, ...]``,
``dict[str, X]``, dataclasses of these, and ``A | B`` of dataclasses. Of the latter the key ``kind``
chooses one: the first by its ``KIND``, which is the default, the others by the ``Literal`` of their
field ``kind``. A dataclass may validate itself in ``__post_init__`` by raising ``ValueError("what
is wrong")``; the YAML path is prepended to the message.

A model config may extend another one::

    extends: ../config_model.yaml      # relative to this file; one level only
    teachers: [hubert, wavlm]          # a list selects these teachers of the base config;
                                       # [hubert, wavlm: {layers: [6]}] also changes one of them
    aggregation: average               # other keys replace, mappings are merged
    student: {kind: copy, of: hubert}  # another kind of student replaces the base's, with its
                                       # init and pruning

``-o`` on the command line overrides keys of a YAML file or a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ..compat.no_eval import read_value
from ..distill.student_settings import StudentSettings
from ..errors import ConfigError
from .text import CONTROL, MAX_DEPTH, MAX_NUMBER, MAX_YAML, parse_yaml, read_text

T = TypeVar("T")
_MAX_LIST, _MAX_KEYS = 10_000, 1000

_CODE = re.compile(r"""[()\[\]{}'"`]""")
_SHELL = re.compile(r"""["$`\\!]""")  # special in a shell within double quotes


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises ConfigError."""
    text = read_text(path, "configuration", ConfigError, MAX_YAML)
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return data


def to_plain_data(value: Any) -> Any:
    """Convert dataclasses and tuples to dicts and lists; the inverse of :func:`from_plain_data`."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain_data(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain_data(item) for key, item in value.items()}
    return value


# Not pydantic: over these dataclasses it took 80 lines of code in place of 82 (strict scalars,
# limits, "1e-6", known keys and messages remain ours) and 85 ms, not 2 ms, for the first call.
def value_at(data: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings; None if there is none."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def from_plain_data(kind: type[T], data: Any, location: str) -> T:
    """Convert dicts, lists and scalars to the type ``kind``, usually a dataclass.

    Args:
        kind: the type to return.
        data: dicts, lists and scalars, as read from YAML or JSON.
        location: YAML path for error messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type or a value that is not allowed.
    """
    result: T = _convert(kind, data, location)
    return result


def _convert(kind: Any, data: Any, location: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{location}: nested more than {MAX_DEPTH} levels deep")
    if kind is Any and data is None:
        return None
    if kind is Any and isinstance(data, dict):
        kind = dict[str, Any]
    elif kind is Any:  # lists stay lists, and scalars what they are
        kind = list[Any] if isinstance(data, (list, tuple)) else type(data)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, location)
    if origin is Literal:
        # True == 1 in Python: compare types too, so that `layers: true` is not layer 1.
        if not any(type(data) is type(item) and data == item for item in parts):
            names = ", ".join(map(str, parts))
            raise ConfigError(f"{location} must be one of {names}, got {_show(data)}")
        return data
    if origin in (Union, types.UnionType):  # X | None, or dataclasses that `kind` distinguishes
        if data is None and types.NoneType in parts:
            return None
        classes = [part for part in parts if part is not types.NoneType]
        if len(classes) > 1:
            return _by_kind(classes, data, location)
        return _convert(classes[0], data, location)
    if origin in (tuple, list):
        _check_container(data, (list, tuple), "a list", _MAX_LIST, location)
        items = enumerate(data)
        return origin(
            _convert(parts[0], value, f"{location}[{i}]", depth + 1) for i, value in items
        )
    if origin is dict:
        _check_container(data, dict, "a mapping", _MAX_KEYS, location)
        for key in data:
            if not isinstance(key, str) or CONTROL.search(key):
                raise ConfigError(
                    f"{location}: the key {_show(key)} must be text without control characters"
                )
        return {
            key: _convert(parts[1], value, f"{location}.{key}", depth + 1)
            for key, value in data.items()
        }
    return _scalar(kind, data, location)


def _by_kind(classes: list[Any], data: Any, location: str) -> Any:
    """Convert to the dataclass that the key ``kind`` names; the first if there is no such key."""
    first, *others = classes
    named = {typing.get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in others}
    if not isinstance(data, dict) or "kind" not in data or data["kind"] == first.KIND:
        plain = data
        if isinstance(data, dict):
            plain = {key: value for key, value in data.items() if key != "kind"}
        return _dataclass(first, plain, location)
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in named:
        allowed = ", ".join([first.KIND, *named])
        raise ConfigError(f"{location}.kind must be one of {allowed}, got {_show(kind)}")
    return _dataclass(named[kind], data, location)


def _check_container(data: Any, kind: Any, noun: str, limit: int, location: str) -> None:
    if not isinstance(data, kind):
        raise ConfigError(f"{location}: expected {noun}, got {_show(data)}")
    if len(data) > limit:
        raise ConfigError(f"{location}: expected at most {limit} values, got {len(data)}")


def _dataclass(kind: Any, data: Any, location: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{location}: expected a mapping of settings, got {_show(data)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"{location}: unknown key {_show(key)}{guess}; allowed keys: {', '.join(fields)}"
            )
    values = {key: _convert(hints[key], value, f"{location}.{key}") for key, value in data.items()}
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{location}: the key {name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{location}: {error}") from None


_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _scalar(kind: type, data: Any, location: str) -> Any:
    if kind is float and isinstance(data, str):
        # YAML 1.1 reads `1e-6` as text.
        with contextlib.suppress(ValueError):
            data = float(data)
    if type(data) is int and not -MAX_NUMBER <= data < MAX_NUMBER:
        raise ConfigError(f"{location}: expected a number of at most 64 bits, got {_show(data)}")
    if kind is float and type(data) is int:
        data = float(data)
    if type(data) is not kind or kind not in _SCALARS:
        expected = _SCALARS.get(kind, "a number, text or list")
        raise ConfigError(f"{location}: expected {expected}, got {_show(data)}")
    if isinstance(data, float) and not math.isfinite(data):
        raise ConfigError(f"{location}: expected a finite number, got {_show(data)}")
    if isinstance(data, str) and CONTROL.search(data):
        raise ConfigError(f"{location}: {_show(data)} contains a line break or a control character")
    return data


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number far too large"
    text = " ".join(text.split())  # the repr of a tensor has several lines
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
        ConfigError: a file cannot be read, the base config extends another one, or it lacks a
            teacher that ``teachers`` selects.
    """
    path = Path(path)
    data = convert(read_yaml(path), str(path))
    if "extends" not in data:
        return data
    name = data.pop("extends")
    if not isinstance(name, str):
        raise ConfigError(f"{path}.extends: expected the path of a YAML file, got {name!r}")
    base_path = path.parent / name
    base = convert(read_yaml(base_path), str(base_path))
    if "extends" in base:
        raise ConfigError(
            f"{path}.extends: {base_path} extends another file; only one level is allowed"
        )
    names = data.get("teachers")
    if isinstance(names, list):
        data["teachers"] = _select_teachers(base.get("teachers"), names, path)
        base.pop("teachers", None)
    units = data.get("unit_loss")
    if isinstance(base.get("unit_loss"), list) and isinstance(units, dict) and "file" not in units:
        raise ConfigError(
            f"{path}.unit_loss: expected a list, which replaces that of {base_path}; write its "
            "entries with their files: [{file: units.safetensors, weight: 1.0}]"
        )
    student, base_student = data.get("student"), base.get("student") or {}
    if isinstance(student, dict) and isinstance(base_student, dict):
        kind = base_student.get("kind", StudentSettings.KIND)
        if student.get("kind", kind) != kind:
            base = {k: base[k] for k in base if k not in ("student", "init", "pruning")}
    return merge(base, data)


def _select_teachers(teachers: Any, names: list[Any], path: Path) -> dict[str, Any]:
    base_teachers = teachers if isinstance(teachers, dict) else {}
    selected = {}
    for item in names:
        # `hubert: {layers: [6]}` in a list is a mapping with one key
        name, changes = next(iter(item.items())) if _has_one_key(item) else (item, {})
        if not isinstance(name, str) or name not in base_teachers:
            raise ConfigError(
                f"{path}.teachers: no teacher {_show(name)} in the file that it extends; "
                f"it has: {', '.join(map(str, base_teachers)) or 'none'}"
            )
        selected[name] = merge({name: base_teachers[name]}, {name: changes})[name]
    return selected


def _has_one_key(item: Any) -> bool:
    return isinstance(item, dict) and len(item) == 1


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge ``changes`` into a copy of ``base``: mappings key by key, other values replaced."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_overrides(data: dict[str, Any], overrides: str | None) -> dict[str, Any]:
    """Apply s3prl's ``-o "config.a.b=1,,config.c='x'"``, if any, to a copy of ``data``.

    Values are numbers, quoted strings and lists of them. Any other value is taken as a string, as
    in s3prl, unless it contains brackets or quotes: it may then be code and is rejected.
    ``args.*`` overrides are checked and otherwise ignored.

    Raises:
        ConfigError: a key or a value is not of this form.
    """
    data = copy.deepcopy(data)
    for key, equals, text in split_overrides(overrides) if overrides else ():
        form = "write config.KEY.KEY=VALUE, several joined by ,,"
        if not equals:
            raise ConfigError(f"-o {key!r}: {form}")
        root, *path = key.split(".")
        if root not in ("args", "config"):
            raise ConfigError(f"-o {key!r}: the key must start with config. or args.")
        value = _value(text)
        if value == text and "=" in text:  # usually a single comma between two settings
            raise ConfigError(f"-o {key}={text!r}: {form}; a value with an = sign needs quotes")
        if value == text and _CODE.search(text):
            raise ConfigError(
                f"-o {key!r}: expected a number, a list or a quoted string, got {text[:60]!r}"
            )
        if root == "args" or not path:
            continue
        target = data
        for name in path[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"-o {key!r}: {name} is not a mapping")
        target[path[-1]] = value
    return data


def split_overrides(overrides: str | None) -> Iterator[tuple[str, str, str]]:
    """The key, the sign = and the text of the value of each override."""
    for option in (overrides or "").split(",,"):
        key, equals, text = option.partition("=")
        yield key.strip(), equals, text.strip()


def _value(text: str) -> Any:
    """The value of an override; text without quotes stays text."""
    try:
        return read_value(text)
    except ValueError:
        return text


def argument_overrides(overrides: str | None) -> dict[str, Any]:
    """The ``args.NAME=VALUE`` overrides of ``-o``, as a dict without ``args.``."""
    options = (
        (key, text) for key, _, text in split_overrides(overrides) if key.startswith("args.")
    )
    return {key.removeprefix("args."): _value(text) for key, text in options}


def overridden(overrides: str | None) -> frozenset[str]:
    """The config keys that ``-o`` sets, without ``config.``; see :func:`apply_overrides`."""
    keys = (key for key, _, _ in split_overrides(overrides))
    return frozenset(key.removeprefix("config.") for key in keys if key.startswith("config."))


def override_value(value: Any) -> str:
    """Format a value for s3prl's ``-o``, with ``=`` signs and commas in strings escaped."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(override_value, value))}]"
    return repr(value).replace("=", r"\x3d").replace(",", r"\x2c")


def escape_equals(overrides: str) -> str:
    """Escape ``=`` signs in the values of ``-o``: s3prl's script allows one in each option.

    Raises:
        ConfigError: see :func:`apply_overrides`.
    """
    apply_overrides({}, overrides)
    options = []
    for key, _, text in split_overrides(overrides):
        if "=" in text:
            text = repr(read_value(text)).replace("=", r"\x3d")
        options.append(f"{key}={text}")
    return ",,".join(options)


def override_option(key: str, value: Any) -> str:
    """Format ``-o "config.KEY=VALUE"`` for a shell."""
    text = f"config.{key}={override_value(value)}"
    return f"-o {shlex.quote(text)}" if _SHELL.search(text) else f'-o "{text}"'
