"""``-o``: settings typed on the command line, put over those of a YAML file or a checkpoint."""

from __future__ import annotations

import copy
import re
from typing import Any

from .errors import ConfigError
from .no_eval import read_value

_CODE = re.compile(r"""[()\[\]{}'"`]""")


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
        if not equals or "=" in text:
            raise ConfigError(
                f"-o {option.strip()!r}: write config.KEY.KEY=VALUE, several joined by ,, "
                "(s3prl allows no other = sign)"
            )
        first, *path = key.strip().split(".")
        if first not in ("args", "config"):
            raise ConfigError(f"-o {key.strip()!r}: the key must start with config. or args.")
        value = text.strip()
        try:
            value = read_value(value)
        except ValueError:
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
