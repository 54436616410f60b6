"""Compare two configs, such as that of a checkpoint and that of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

MISSING = "(not set)"


def config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Compare two configs: dotted key -> (old value, new value).

    A list counts as one value, but a list of sections by section: ``unit_loss[0].weight``.
    """
    old_values, new_values = _flat(old), _flat(new)
    keys = [*old_values, *(key for key in new_values if key not in old_values)]
    pairs = {key: (old_values.get(key, MISSING), new_values.get(key, MISSING)) for key in keys}
    return {key: (a, b) for key, (a, b) in pairs.items() if not _same(a, b)}


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """The changes as text: ``key OLD -> NEW, key OLD -> NEW``."""
    return ", ".join(f"{key} {_show(old)} -> {_show(new)}" for key, (old, new) in changes.items())


def check_config_file(
    path: str, changes: Mapping[str, tuple[Any, Any]], checkpoint: str, option: str
) -> None:
    """Raise CheckpointError if a config file differs from the config of the resumed run."""
    if changes:
        change = ', or change the run with -o "config.KEY=VALUE"' if option == "-c" else ""
        raise CheckpointError(
            f"{option} {path} differs from the config in {checkpoint}, which a resumed run keeps: "
            f"{describe_changes(changes)}; leave out {option}{change}, or start a new run under "
            "another name"
        )


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, dotted))
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for i, item in enumerate(value):
                flat.update(_flat(item, f"{dotted}[{i}]"))
        else:
            flat[dotted] = value
    return flat


def _same(a: Any, b: Any) -> bool:
    if MISSING in (a, b):  # a list of sections has no key of its own, unless it is empty
        return [] in (a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _show(value: Any) -> str:
    text = repr(value) if value is not MISSING else MISSING
    return text if len(text) <= 60 else text[:57] + "..."
