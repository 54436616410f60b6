"""Manifests of a corpus: a table, a Kaldi folder, Common Voice's table or lhotse's cuts.

:func:`read_manifest` reads all of them to the same entries.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...errors import DataError
from . import cuts, kaldi, table
from .entries import SPLITS, Manifest, ManifestEntry, check_unique, unknown_split

__all__ = ["MAX_LIST", "SPLITS", "Manifest", "ManifestEntry", "is_manifest", "read_manifest"]

MAX_LIST = 256 << 20  # bytes of a list of files; VoxCeleb1's has 5 MB
_PREFIX = re.compile(rf"({'|'.join(SPLITS)})=(.+)")
# A split in the name of a file or folder: train_960, dev-other, cuts_valid.
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|dev|valid|validation|test)(?![a-z])")


def is_manifest(path: str | Path) -> bool:
    """Whether :func:`read_manifest` reads a path, and not a scan for audio: a file or Kaldi folder.

    The path may have a split before it, as in ``train=PATH``.
    """
    match = _PREFIX.fullmatch(str(path))
    path = Path(match[2] if match else path)
    return kaldi.is_kaldi(path) or (path.is_file() and path.suffix in (".tsv", ".jsonl", ".gz"))


def read_manifest(
    sources: str | Path | Sequence[str | Path],
    *,
    columns: Sequence[str] = ("path", "split"),
    audio_root: Path | None = None,
) -> Manifest:
    """Read and check one or more manifests.

    A source is a tab-separated table (:mod:`.table`), a folder of Kaldi (:mod:`.kaldi`) or a file
    of lhotse's cuts (:mod:`.cuts`). A source without a column ``split`` is one split as a whole,
    that in its name (``dev-clean``, ``cuts_train.jsonl.gz``), or the one given as ``test=PATH``.

    Args:
        columns: required columns; with ``split``, each entry must have one.
        audio_root: the folder that paths are relative to; see the readers for the default.

    Raises:
        DataError: a source cannot be read, a line is invalid or repeated (the message has its
            number), or, with ``split`` in ``columns``, the split of a source is not known or an
            utterance is in two sources.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    parts, tables = [], []
    for source in sources:
        root, entries = _read(str(source), columns, audio_root)
        parts.append((root, entries))
        tables += [_table_name(str(source), entry) for entry in entries]
    text = ", ".join(map(str, sources))
    if len(parts) == 1:
        root, entries = parts[0]
    else:
        roots = [os.path.abspath(root) for root, _ in parts]
        common = os.path.commonpath(roots)
        root, entries = Path(common), []
        for folder, (_, own) in zip(roots, parts, strict=True):
            prefix = PurePosixPath(os.path.relpath(folder, common))
            entries += [replace(entry, path=str(prefix / entry.path)) for entry in own]
    check_unique(entries)  # no utterance may be in two splits or tables
    return Manifest(text, root, entries, tables)


def _read(
    source: str, columns: Sequence[str], audio_root: Path | None
) -> tuple[Path, list[ManifestEntry]]:
    match = _PREFIX.fullmatch(source)
    path = Path(match[2] if match else source)
    split = match[1] if match else _split_in(path)
    if path.is_dir():
        if not kaldi.is_kaldi(path):
            raise DataError(
                f"{path} is not a manifest: it is a folder without {kaldi.SCP}; give a "
                "tab-separated table, a Kaldi folder or a file of cuts (.jsonl.gz)"
            )
        root, entries = kaldi.read_kaldi(path, columns, audio_root, split)
    elif path.name.endswith(cuts.SUFFIXES):
        root, entries = cuts.read_cuts(path, columns, audio_root, split)
    else:
        root, entries = table.read_table(path, columns, audio_root, split)
        if match and entries and "split" in entries[0].cells:
            raise DataError(
                f"{source}: the table has a column split; leave out {match[1]}=, or remove it"
            )
        return root, entries
    if "split" in columns and not split:
        raise unknown_split(path)
    return root, entries


def _split_in(path: Path) -> str:
    """The split in the name of a source; empty if there is none, or more than one."""
    names = _SPLIT_NAME.findall(path.resolve().name)
    found = {"dev" if name.startswith("valid") else name for name in names}
    return found.pop() if len(found) == 1 else ""


def _table_name(source: str, entry: ManifestEntry) -> str:
    """The length table of an entry: its split, or the name of a source that is one split."""
    if "split" in entry.cells:
        return entry.split
    match = _PREFIX.fullmatch(source)
    path = Path(source).resolve()
    return match[1] if match else path.name if path.is_dir() else path.name.partition(".")[0]
