"""One experiment as its difference to another: the key ``extends`` of a model config.

extends: ../config_model.yaml      # relative to this file; one level
teachers: [hubert, wavlm]          # a list of names takes these of the base's teachers
aggregation: average               # other keys replace, mappings are merged
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import read_yaml


def read_extended(path: str | Path) -> dict[str, Any]:
    """Read a model config and put it over the one it extends, if any.

    Raises:
        ConfigError: a file cannot be read, the base extends another one, or a teacher taken from
            the base is not there.
    """
    path = Path(path)
    data = read_yaml(path)
    if "extends" not in data:
        return data
    name = data.pop("extends")
    if not isinstance(name, str):
        raise ConfigError(f"{path}.extends: the path of a YAML file is expected, not {name!r}")
    base_path = path.parent / name
    base = read_yaml(base_path)
    if "extends" in base:
        raise ConfigError(
            f"{path}.extends: {base_path} extends another file itself; one level is allowed"
        )
    chosen = data.get("teachers")
    if isinstance(chosen, list):
        data["teachers"] = _choose(base.get("teachers"), chosen, path)
        base.pop("teachers", None)
    return merge(base, data)


def _choose(teachers: Any, names: list, path: Path) -> dict:
    known = teachers if isinstance(teachers, dict) else {}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(
                f"{path}.teachers: the file it extends has no teacher {name!r}; "
                f"it has: {', '.join(map(str, known)) or 'none'}"
            )
    return {name: known[name] for name in names}


def merge(base: dict, over: dict) -> dict:
    """``over`` on top of ``base``: mappings are merged key by key, all else is replaced."""
    merged = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
