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
# Old key -> old value -> new value.
VALUES: Mapping[str, Mapping[str, str]] = {
    "teacher_path": {"plain": "s3prl"},
    "targets.standardise": {"running": "mean_std"},
}
HALF = {"fp16": "float16", "bf16": "bfloat16"}  # old key of `runner` -> its precision
OLD_SECTION = "essence"  # of the model config; it has old keys only
UNITS = "unit_loss"  # of the model config; a list, in version 0.1 one entry or none


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
    if table is RUNNER and isinstance(data.get("runner"), dict):
        _rename_half(data["runner"], "runner.", path)
    for old, new in table.items():
        if not _has(data, old):
            continue
        section = new.rpartition(".")[0]
        listed = section == UNITS and isinstance(data.get(UNITS), list)
        if not listed and not isinstance(data.get(section, {}), dict):
            raise ConfigError(f"{path or 'the config'}.{section}: expected a mapping")
        if listed or (path and _has(data, new)):
            raise ConfigError(
                f"{path or 'the config'}: `{old}` is the old name of `{new}`; remove `{old}`"
            )
        value = _pop(data, old)
        new_value = value
        if isinstance(value, str) and value in VALUES.get(old, {}):
            new_value = VALUES[old][value]
        if path and new_value is not value:
            warn_renamed(path, f"{old}: {value}", f"{new}: {new_value}")
        elif path:
            warn_renamed(path, old, new)
        _set(data, new, new_value)
    if table is MODEL and OLD_SECTION in data:
        rest = data.pop(OLD_SECTION)
        if rest != {}:
            key = next(iter(rest), None) if isinstance(rest, dict) else rest
            names = ", ".join(
                f"{o} is now {n}" for o, n in MODEL.items() if o.startswith("essence")
            )
            raise ConfigError(
                f"{path or 'the config'}.{OLD_SECTION}: unknown key {key!r:.60}; {names}"
            )
    return data


def list_units(data: Any) -> Any:
    """Replace a single entry of ``unit_loss``, the form that keys of version 0.1 give, by a list.

    Called after a config has been merged with the one it extends: the file and the weight may be in
    different files. As in version 0.1, a weight without a file has no effect.
    """
    if not isinstance(data, dict) or not isinstance(data.get(UNITS), dict):
        return data
    entry = data[UNITS]
    is_off = entry.get("file") is None and entry.keys() <= {"file", "weight"}
    return {**data, UNITS: [] if is_off else [entry]}


def rename_overrides(overrides: str) -> str:
    """Replace old keys in the value of ``-o`` by the new ones.

    Raises:
        ConfigError: both the old and the new name of a key are given.
    """
    options = _override_half(overrides.split(",,"))
    keys = [option.partition("=")[0].strip() for option in options]
    for i, (key, option) in enumerate(zip(keys, options, strict=True)):
        section, _, old = key.partition(".")
        new = f"config.{RUNNER.get(old)}"
        if section != "config" or old not in RUNNER or "=" not in option:
            continue
        if new in keys:
            raise ConfigError(f"-o: `{key}` is the old name of `{new}`; remove `{key}`")
        options[i] = f"{new}={option.partition('=')[2]}"
        warn_renamed("-o", key, new)
    return ",,".join(options)


def _rename_half(runner: dict[str, Any], section: str, path: str | None) -> None:
    """Replace ``fp16`` and ``bf16`` by ``precision``: float32 if both are false or missing."""
    old = {key: runner.pop(key) for key in HALF if key in runner}
    if not old:
        return
    where = path or "the config"
    for key, value in old.items():
        if type(value) is not bool:
            raise ConfigError(f"{where}.{section}{key}: expected true or false, got {value!r:.60}")
        if path and "precision" in runner:
            raise ConfigError(
                f"{where}: `{section}{key}` is the old name of `{section}precision`; remove "
                f"`{section}{key}`"
            )
    precisions = [HALF[key] for key, value in old.items() if value]
    if len(precisions) > 1:
        raise ConfigError(
            f"{where}: {section}fp16 and {section}bf16 exclude each other; use {section}precision"
        )
    runner.setdefault("precision", precisions[0] if precisions else "float32")
    if path:
        text = ", ".join(f"{section}{key}: {str(value).lower()}" for key, value in old.items())
        warn_renamed(path, text, f"{section}precision: {runner['precision']}")


def _override_half(options: list[str]) -> list[str]:
    """:func:`_rename_half` for the options of ``-o``."""
    runner: dict[str, Any] = {}
    rest = []
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        name = key.removeprefix("config.runner.")
        if name in HALF and key != name:
            runner[name] = {"True": True, "False": False}.get(value, value)
        else:
            rest.append(option)
            if name == "precision" and key != name:
                runner[name] = value
    if runner.keys() & HALF.keys():
        _rename_half(runner, "config.runner.", "-o")
        rest.append(f"config.runner.precision={runner['precision']!r}")
    return rest


def restore_keys(data: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The inverse of :func:`rename_keys`, to compare a config with a record of version 0.1."""
    restored = _copy(data)
    units = restored.get(UNITS)
    if table is MODEL and isinstance(units, list) and len(units) < 2:
        entry = units[0] if units else {"file": None, "weight": 1.0}
        if not entry.get("unmasked_weight"):  # which version 0.1 lacks
            restored[UNITS] = {key: entry[key] for key in ("file", "weight")}
    if table is RUNNER and restored["runner"].get("precision") in ("float32", *HALF.values()):
        precision = restored["runner"].pop("precision")
        restored["runner"].update({key: precision == name for key, name in HALF.items()})
    for old, new in table.items():
        if _has(restored, new):
            value = _pop(restored, new)
            for previous, current in VALUES.get(old, {}).items():
                value = previous if value == current else value
            _set(restored, old, value)
    return restored


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the config and its sections, which share their values with the original."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}


def _has(data: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    parent = data.get(section) if section else data
    return isinstance(parent, dict) and name in parent


def _pop(data: dict[str, Any], key: str) -> Any:
    """Remove a key and, if it is empty then, its section; return the value."""
    section, _, name = key.rpartition(".")
    value = (data[section] if section else data).pop(name)
    if section and not data[section]:
        del data[section]
    return value


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a key that has no value."""
    section, _, name = key.rpartition(".")
    (data.setdefault(section, {}) if section else data).setdefault(name, value)


@functools.cache  # once per process and key, even if a file is read again
def warn_renamed(path: str, old: str, new: str) -> None:
    """Log that a setting in ``path`` has a new name."""
    if torchrun.rank() == 0:
        logger.warning("%s: %s", path, renamed_text(old, new))


def renamed_text(old: str, new: str) -> str:
    """The warning about an old name of a key, command or experiment."""
    return f"`{old}` is now `{new}`; the old name works until 0.3"
