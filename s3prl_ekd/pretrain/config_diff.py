"""Differences between a checkpoint and the run that resumes it: found, described, refused."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from ..files.config import typed as override

DATA = "pretrain_expert.datarc"
SETS = f"{DATA}.sets"

# `-o` may change anything of the run but these: the optimizer's state is of the one that made it.
FIXED = ("optimizer.name", "optimizer.torch_optim_name")
MISSING = "(not set)"


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), for each value that differs; lists are one value."""
    before, after = _flat(old), _flat(new)
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: (before.get(key, MISSING), after.get(key, MISSING)) for key in keys}
    return {key: (a, b) for key, (a, b) in pairs.items() if not _same(a, b)}


def described(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """``key OLD -> NEW`` for each, joined."""
    return ", ".join(f"{key} {_show(old)} -> {_show(new)}" for key, (old, new) in changes.items())


def check_changes(changes: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Refuse what cannot be changed on resume.

    Raises:
        CheckpointError: naming the keys.
    """
    fixed = {key: change for key, change in changes.items() if key in FIXED}
    if fixed:
        raise CheckpointError(
            f"the run in {where} cannot go on with {described(fixed)}: its optimizer's state does "
            "not fit another optimizer; start a new run under another name"
        )


def check_same(given: str, changes: Mapping[str, tuple[Any, Any]], where: str, letter: str) -> None:
    """Refuse a config file named beside ``-a`` or ``-e`` that is not the run's own.

    Raises:
        CheckpointError: naming the keys, and how to change them where that is possible.
    """
    if not changes:
        return
    hint = f"leave {letter} out"
    if letter == "-c":
        hint += ', or change the run with -o "config.KEY=VALUE"'
    raise CheckpointError(
        f"{letter} {given} differs from the config in {where}, which a resumed run keeps: "
        f"{described(changes)}; {hint}, or start a new run under another name"
    )


def table_digests(folder: str | Path, sets: Sequence[str]) -> dict[str, str]:
    """A digest of the contents of each corpus table ``folder/SET.csv``; its date does not matter.

    Raises:
        DataError: a table cannot be read.
    """
    digests = {}
    for name in sets:
        path = Path(folder) / f"{name}.csv"
        try:
            digests[name] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read the corpus table {path}: {error.strerror}") from None
    return digests


def check_tables(
    saved: Mapping[str, str], now: Mapping[str, str], folder: str | Path, typed: Collection[str]
) -> None:
    """Refuse corpus tables that have changed since the checkpoint was written.

    Args:
        saved: digests in the checkpoint; empty if s3prl's own Runner wrote it.
        now: digests of the present tables.
        folder: of the tables.
        typed: the config's keys that ``-o`` sets; with ``sets`` among them any tables are accepted.

    Raises:
        DataError: naming the tables.
    """
    changed = [name for name in now if name in saved and saved[name] != now[name]]
    if changed and SETS not in typed:
        tables = ", ".join(str(Path(folder) / f"{name}.csv") for name in changed)
        raise DataError(
            f"the contents of the corpus tables have changed since the checkpoint was written: "
            f"{tables}; put the old ones back, or go on with the new ones, in a new pass over the "
            f"data, by naming them: {override(SETS, list(now))}"
        )


def _flat(data: Mapping, path: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, here))
        else:
            flat[here] = value
    return flat


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _show(value: Any) -> str:
    text = repr(value) if value is not MISSING else MISSING
    return text if len(text) <= 60 else text[:57] + "..."
