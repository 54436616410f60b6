"""Rename the keys of version 0.1 in configs and ``-o``, with one warning each.

Both names work in this release. Checkpoints of version 0.1 have the old keys and are read without a
warning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..system import torchrun

logger = logging.getLogger(__name__)

Table = Mapping[str, str]  # old dotted key -> new dotted key
MODEL: Table = {
    "teacher_path": "teacher_backend",
    "targets.standardise": "target_norm",
    "targets.standardise_steps": "target_norm_steps",
    "targets.separate_heads": "heads.per_teacher",
    "targets.residual_heads": "heads.residual",
    "targets.residual_weight": "heads.residual_weight",
    "essence.keep": "loss.agreement",
    "essence.units": "unit_loss.file",
    "essence.unit_weight": "unit_loss.weight",
}
RUNNER: Table = {
    "runner.recompute": "runner.activation_checkpointing",
    "runner.last_minutes": "runner.autosave_minutes",
}
# New key -> old value -> new value; all in the model config.
VALUES: Mapping[str, Mapping[str, str]] = {
    "aggregation": {"groups": "separate"},
    "teacher_backend": {"plain": "s3prl"},
    "target_norm": {"running": "mean_std"},
}


def rename_keys(data: Any, table: Table, path: str | None = None) -> Any:
    """Replace old keys and values of a config by the new ones, in a copy.

    Args:
        data: the config; anything but a mapping is returned unchanged.
        table: :data:`MODEL` or :data:`RUNNER`.
        path: the YAML file, for the warnings. None: no warnings, and the new key takes precedence
            if both are given, as by ``-o`` on the config of an old checkpoint.

    Raises:
        ConfigError: the file has both the old and the new key, or no mapping where one is needed.
    """
    if not isinstance(data, dict):
        return data
    data = _copy(data)
    for old, new in table.items():
        if not _has(data, old):
            continue
        if path:
            if _has(data, new):
                raise ConfigError(f"{path}: `{old}` is the old name of `{new}`; remove `{old}`")
            _warn(path, old, new)
        section = new.rpartition(".")[0]
        if not isinstance(data.get(section, {}), dict):
            raise ConfigError(f"{path or 'the config'}.{section}: expected a mapping")
        _move(data, old, new)
    for key, values in VALUES.items() if table is MODEL else ():
        value = data.get(key)
        if isinstance(value, str) and value in values:
            data[key] = values[value]
            if path:
                _warn(path, f"{key}: {value}", f"{key}: {values[value]}")
    return data


def rename_overrides(overrides: str) -> str:
    """Replace old keys in the value of ``-o`` by the new ones."""
    options = overrides.split(",,")
    for i, option in enumerate(options):
        key, equals, value = option.strip().partition("=")
        section, _, old = key.strip().partition(".")
        new = RUNNER.get(old) if section == "config" else None
        if new:
            options[i] = f"config.{new}{equals}{value}"
            _warn("-o", key.strip(), f"config.{new}")
    return ",,".join(options)


def restore_keys(data: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The inverse of :func:`rename_keys`, to compare a config with a record of version 0.1.

    ``aggregation: separate`` stays: it was a value of version 0.1, too.
    """
    restored = _copy(data)
    for key, values in VALUES.items() if table is MODEL else ():
        old_values = {new: old for old, new in values.items() if key != "aggregation"}
        restored[key] = old_values.get(restored[key], restored[key])
    for old, new in table.items():
        if _has(restored, new):
            _move(restored, new, old)
    return restored


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the config and its sections, which share their values with the original."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}


def _has(data: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    parent = data.get(section) if section else data
    return isinstance(parent, dict) and name in parent


def _move(data: dict[str, Any], old: str, new: str) -> None:
    """Move the value of key ``old`` to ``new``, unless ``new`` has one; drop empty sections."""
    section, _, name = old.rpartition(".")
    value = (data[section] if section else data).pop(name)
    if section and not data[section]:
        del data[section]
    section, _, name = new.rpartition(".")
    target = data.setdefault(section, {}) if section else data
    target.setdefault(name, value)


@functools.cache  # once per process and key, even if a file is read again
def _warn(path: str, old: str, new: str) -> None:
    if torchrun.rank() == 0:
        logger.warning("%s: `%s` is now `%s`; the old name works until 0.3", path, old, new)
