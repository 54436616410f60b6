"""Compare tables, teachers and units of a checkpoint with those of its run now."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.shar.shards import is_shar, shar_digest
from ..distill.settings import DistillSettings
from ..errors import CheckpointError, DataError
from ..files.atomic import file_sha256
from ..files.config import override_option
from ..files.config_diff import describe_changes

DATA = "pretrain_expert.datarc"
SETS = f"{DATA}.sets"

# Keys that `-o` cannot change on resume: the saved optimizer state would not fit.
FIXED = ("optimizer.name", "optimizer.torch_optim_name")


def check_changes(changes: Mapping[str, tuple[Any, Any]], checkpoint: str) -> None:
    """Raise CheckpointError if ``-o`` changes the optimizer, which a resumed run does not allow."""
    fixed = {key: change for key, change in changes.items() if key in FIXED}
    if fixed:
        raise CheckpointError(
            f"cannot resume {checkpoint} with {describe_changes(fixed)}: its optimizer state does "
            "not fit another optimizer; start a new run under another name"
        )


def table_digests(folder: str | Path, sets: Sequence[str]) -> dict[str, str]:
    """Digest of each length table ``folder/SET.csv``, or Shar folder ``folder/SET``."""
    digests = {}
    for name in sets:
        if is_shar(Path(folder) / name):
            digests[name] = shar_digest(Path(folder) / name)
            continue
        path = Path(folder) / f"{name}.csv"
        try:
            digests[name] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read the length table {path}: {error.strerror}") from None
    return digests


def check_tables(
    saved: Mapping[str, str], current: Mapping[str, str], folder: str | Path, keys: Collection[str]
) -> None:
    """Raise DataError if tables or Shar folders have changed since the checkpoint was written.

    Args:
        saved: digests in the checkpoint; empty if s3prl's own Runner wrote it.
        current: digests of the tables now.
        folder: of the tables.
        keys: config keys that ``-o`` sets; if ``sets`` is one of them, no table is rejected.
    """
    changed = [name for name in current if name in saved and saved[name] != current[name]]
    if changed and SETS not in keys:
        paths = (Path(folder) / name for name in changed)
        tables = ", ".join(str(p) if is_shar(p) else f"{p}.csv" for p in paths)
        raise DataError(
            f"training data have changed since the checkpoint was written: {tables}; restore them, "
            f"or train on the new ones from a new epoch with {override_option(SETS, list(current))}"
        )


def source_digests(settings: DistillSettings) -> dict[str, str]:
    """SHA-256 of the teachers' checkpoints and unit files, by the keys that name them.

    Teachers that are no file are left out: a name of s3prl, a folder, or an id with its commit.
    """
    files = {f"teachers.{name}.model": t.model for name, t in settings.teachers.items()}
    files |= {f"unit_loss[{i}].file": unit.file for i, unit in enumerate(settings.unit_loss)}
    return {key: file_sha256(path) for key, path in files.items() if Path(path).is_file()}


def check_unchanged(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise DataError if teachers or units have changed since the checkpoint was written.

    Args:
        saved: digests in the checkpoint; empty if an earlier version wrote it.
        current: :func:`source_digests` now.
    """
    changed = [key for key in current if saved.get(key, current[key]) != current[key]]
    if changed:
        raise DataError(
            f"files have changed since the checkpoint was written: {', '.join(changed)}; restore "
            "them, or start a new run under another name"
        )
