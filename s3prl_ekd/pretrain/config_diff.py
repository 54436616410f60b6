"""Compare tables, teachers and units of a checkpoint with those of its run now."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..data.shar.shards import is_shar, shar_digest
from ..distill.settings import DistillSettings
from ..errors import DataError
from ..files.atomic import file_sha256
from ..files.config import override_option
from ..teachers.names import STORED

DATA = "pretrain_expert.datarc"
SETS = f"{DATA}.sets"

_STORED = "stored states "  # begins the digest of a folder of them

logger = logging.getLogger(__name__)


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
    """Digests of the teachers' checkpoints and folders and of unit files, by the keys that name
    them.

    Teachers that are neither are left out: a name of s3prl, or an id with its commit.
    """
    sources = {f"teachers.{name}.model": t.model for name, t in settings.teachers.items()}
    sources |= {f"unit_loss[{i}].file": unit.file for i, unit in enumerate(settings.unit_loss)}
    return {key: _digest(Path(path)) for key, path in sources.items() if Path(path).exists()}


def _digest(path: Path) -> str:
    """Digest of a file, of a Hugging Face folder's settings and weights, or of stored states."""
    if path.is_file():
        return file_sha256(path)
    if (path / STORED).is_file():
        from ..teachers.stored import StoredStates

        return _STORED + StoredStates(path).digest.numpy().tobytes().hex()
    from ..teachers.student_source import contents_sha256

    return contents_sha256(path)


def check_unchanged(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise DataError if teachers or units have changed since the checkpoint was written.

    Args:
        saved: digests in the checkpoint; empty if an earlier version wrote it.
        current: :func:`source_digests` now.
    """
    if changed := changed_sources(saved, current):
        raise DataError(
            "teachers or units have changed since the checkpoint was written: "
            f"{', '.join(changed)}; restore them, or start a new run under another name"
        )


def changed_sources(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """The keys whose digests are known and differ. Stored states, to which files may have been
    added, only give a warning."""
    changed = [key for key in current if saved.get(key, current[key]) != current[key]]
    for key in changed:
        if current[key].startswith(_STORED):
            logger.warning("%s: the stored states are not those of the start of this run", key)
    return [key for key in changed if not current[key].startswith(_STORED)]
