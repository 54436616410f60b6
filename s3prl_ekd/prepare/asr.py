"""Layouts: a manifest's audio under the names that s3prl's recipes expect, and its tables.

s3prl's ASR and PR recipes know corpora in the shape of LibriSpeech only: the transcript of
``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac`` is a line in ``SPK-CHAP.trans.txt`` beside it, and the name
of an utterance ends at the first dot. A layout is made of links, so it costs no space.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..data.lengths import write_table
from ..data.manifest import SPLITS, Entry
from ..errors import DataError
from ..files.atomic import make_folder, whole_folder
from .new_folder import PREPARED, check_free

TABLES = "len_for_bucket"


@dataclass(frozen=True)
class Utterance:
    """One utterance on its way into a layout."""

    source: Path  # the audio file
    original: str  # its path in the manifest
    speaker: str
    text: str  # normalised; see prepare/char_dict.py
    split: str  # one of SPLITS
    samples: int  # at 16 kHz


@dataclass
class Layout:
    """What :func:`write_librispeech` wrote."""

    samples: dict[str, list[int]] = field(default_factory=dict)  # split folder -> lengths
    copied: int = 0  # files that could not be linked, or were asked to be copied


def speaker_names(speakers: Iterable[str]) -> dict[str, str]:
    """For each speaker a name of letters and digits only, no two alike.

    A dash or a dot inside would break the utterance's name where s3prl takes it apart.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for speaker in sorted(set(speakers)):
        plain = re.sub(r"[^A-Za-z0-9]", "", speaker) or "speaker"
        name, number = plain, 1
        while name.lower() in taken:  # lower: some file systems do not tell A from a
            number += 1
            name = f"{plain}x{number}"
        taken.add(name.lower())
        names[speaker] = name
    return names


def write_librispeech(
    out: Path, utterances: Sequence[Utterance], *, copy: bool = False, replace: bool = False
) -> Layout:
    """Write ``utterances`` as a LibriSpeech layout with length tables and ``prepared.tsv``.

    Folders are ``train-clean``, ``dev-clean`` and ``test-clean``; the chapter is 1, 2 or 3, so a
    speaker of two splits has no name twice. The folder appears under its name when all is there.

    Args:
        out: the layout's folder.
        copy: copy the audio; else link it, and copy only where linking fails.
        replace: replace an earlier layout at ``out``.

    Raises:
        DataError: ``out`` exists and is not an earlier layout that may be replaced.
    """
    check_free(out, replace=replace)
    with whole_folder(out, DataError) as folder:
        return _write(folder, utterances, copy)


def _write(root: Path, utterances: Sequence[Utterance], copy: bool) -> Layout:
    names = speaker_names(utterance.speaker for utterance in utterances)
    layout = Layout()
    tables: dict[str, list[tuple[str, int]]] = {}
    transcripts: dict[PurePosixPath, list[str]] = {}
    prepared = ["id\tpath\tspeaker\tsplit\tsamples\n"]
    for utterance in utterances:
        split = f"{utterance.split}-clean"
        speaker = names[utterance.speaker]
        chapter = SPLITS.index(utterance.split) + 1
        folder = PurePosixPath(split, speaker, str(chapter))
        lines = transcripts.setdefault(folder / f"{speaker}-{chapter}.trans.txt", [])
        name = f"{speaker}-{chapter}-{len(lines):04d}"
        lines.append(f"{name} {utterance.text}\n")
        file = folder / (name + utterance.source.suffix.lower())
        (root / folder).mkdir(parents=True, exist_ok=True)
        layout.copied += _place(utterance.source, root / file, copy=copy)
        tables.setdefault(split, []).append((str(file), utterance.samples))
        cells = (name, utterance.original, utterance.speaker, utterance.split, utterance.samples)
        prepared.append("\t".join(map(str, cells)) + "\n")
    for path, lines in transcripts.items():
        (root / path).write_text("".join(lines), encoding="utf-8")
    (root / TABLES).mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        write_table(root / TABLES / f"{split}.csv", rows)
        layout.samples[split] = [length for _, length in rows]
    (root / PREPARED).write_text("".join(prepared), encoding="utf-8")
    return layout


def _place(source: Path, target: Path, *, copy: bool) -> int:
    """Link ``target`` to ``source``, or copy it; returns the number of files copied."""
    source = source.resolve()
    if not copy:
        try:
            link = os.path.relpath(source, target.parent.resolve())
        except ValueError:  # another drive
            link = str(source)
        try:
            os.symlink(link, target)
            return 0
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)
    return 1


def write_split_tables(
    folder: Path, entries: Sequence[Entry], samples: Sequence[int]
) -> dict[str, list[int]]:
    """One length table a split (``train.csv`` …) in ``folder``; returns the lengths of each."""
    make_folder(folder)
    written = {}
    for split in SPLITS:
        rows = [
            (entry.path, length)
            for entry, length in zip(entries, samples, strict=True)
            if entry.split == split
        ]
        if rows:
            write_table(folder / f"{split}.csv", rows)
            written[split] = [length for _, length in rows]
    return written
