"""Find and identify the shards of Shar folders. Imports neither torch nor lhotse.

A shard is a pair ``cuts.NNNNNN.jsonl.gz`` and ``recording.NNNNNN.tar``; further fields, such as
features, are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError


@dataclass(frozen=True)
class Shard:
    """The files of a shard, by absolute paths."""

    cuts: Path
    recording: Path


def is_shar(folder: str | Path) -> bool:
    """Whether a folder has shards of cuts."""
    return any(Path(folder).glob("cuts.*.jsonl*"))


def find_shards(folder: str | Path) -> list[Shard]:
    """List the shards of a folder by their names.

    Raises:
        DataError: a shard of cuts has no audio.
    """
    shards = []
    for cuts in sorted(Path(folder).absolute().glob("cuts.*.jsonl*")):
        number = cuts.name.split(".")[1]
        recording = cuts.with_name(f"recording.{number}.tar")
        if not recording.is_file():
            raise DataError(
                f"{cuts} has no {recording.name} next to it; write the audio too, with lhotse's "
                'cuts.to_shar(FOLDER, fields={"recording": "flac"})'
            )
        shards.append(Shard(cuts, recording))
    return shards


def shar_shards(folder: str | Path, sets: Sequence[str]) -> list[Shard]:
    """The shards of the Shar folders ``folder/SET``; an empty list if ``sets`` are length tables.

    Raises:
        DataError: some are Shar folders and others are not.
    """
    folders = [Path(folder) / name for name in sets]
    found = [is_shar(path) for path in folders]
    if not any(found):
        return []
    if not all(found):
        other = sets[found.index(False)]
        raise DataError(
            f"pretrain_expert.datarc.sets: {sets[found.index(True)]} is a Shar folder and {other} "
            f"is not; use only Shar folders, or only length tables, in {folder}"
        )
    return [shard for path in folders for shard in find_shards(path)]


def shar_digest(folder: str | Path) -> str:
    """Digest of the names and sizes of a folder's shards."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in find_shards(folder):
        for path in (shard.cuts, shard.recording):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
