"""``-o``: settings typed on the command line, put over those of a YAML file or a checkpoint."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

from ..compat.no_eval import read_value
from ..errors import ConfigError

_CODE = re.compile(r"""[()\[\]{}'"`]""")
_SHELL = re.compile(r"""["$`\\!]""")  # what a shell changes between double quotes


def apply_overrides(data: dict, overrides: str) -> dict:
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
