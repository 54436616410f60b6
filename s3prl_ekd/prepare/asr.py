"""``prepare asr``: a manifest's audio and texts in the layout of LibriSpeech.

s3prl's ASR and PR recipes know corpora in the shape of LibriSpeech only: the transcript of
``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac`` is a line in ``SPK-CHAP.trans.txt`` beside it, and the name
of an utterance ends at the first dot. The layout is made of links, so it costs no space.

The recipe's character dictionary has fairseq's format, one ``SYMBOL COUNT`` a line; s3prl adds four
symbols of its own (``<s> <pad> </s> <unk>``), which makes 32 classes. s3prl's PyPI package does not
carry the file, so it is made here from the alphabet. The counts are 1: nothing reads them. The
order is ours (the boundary, A to Z, the apostrophe), so the output layer of a model trained with
another dictionary does not fit this one, although both have the same symbols.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..data.lengths import write_table
from ..data.manifest import SPLITS, ManifestEntry, read_manifest
from ..errors import DataError
from ..files.atomic import atomic_folder, make_folder
from .common import audio_root, measure_all, print_splits
from .new_folder import PREPARED, check_free

LETTERS = string.ascii_uppercase + "'"  # all that a transcript may have, besides the space

_FOREIGN = re.compile(f"[^{LETTERS} ]")

TABLES = "len_for_bucket"
DESCRIPTION = """\
A LibriSpeech layout for `run_downstream.py -d asr`: OUT/{train,dev,test}-clean/SPK/CHAP/ with
audio (links) and transcripts, length tables in OUT/len_for_bucket, and OUT/prepared.tsv, which
maps the new names to the old paths.

Needs the columns path, speaker, text, split. Texts are written in upper case and may hold A to Z,
the apostrophe and spaces. Lines without a text are left out and counted.
"""
FAULTY = "lines with other characters"


def normalise(text: str) -> str:
    """Upper case, and one space between words. Nothing is dropped."""
    return " ".join(text.upper().split())


def foreign_characters(text: str) -> str:
    """The characters of a normalised text that the dictionary lacks, each once, sorted."""
    return "".join(sorted(set(_FOREIGN.findall(text))))


@dataclass(frozen=True)
class Utterance:
    """One utterance on its way into a layout."""

    source: Path  # the audio file
    original: str  # its path in the manifest
    speaker: str
    text: str  # normalised; see prepare/asr.py
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
    with atomic_folder(out, DataError) as folder:
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
    folder: Path, entries: Sequence[ManifestEntry], samples: Sequence[int]
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


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prepare asr``."""
    layout_options(parser, FAULTY)


def run(args: argparse.Namespace) -> int:
    """Write the layout; the exit code is 0."""
    write_layout(args, _fault, FAULTY)
    print(f"wrote {args.out}; in the YAML: libri_root: {args.out}")
    print(f"               bucket_file: {args.out / TABLES}")
    return 0


def _fault(text: str) -> str:
    foreign = foreign_characters(text)
    if not foreign:
        return ""
    return f"has a text with {foreign!r}; only A to Z, the apostrophe and spaces are allowed"


def layout_options(parser: argparse.ArgumentParser, faulty: str) -> None:
    """The options that :func:`write_layout` reads; ``faulty`` as there."""
    parser.add_argument("--copy", action="store_true", help="copy the audio instead of linking it")
    parser.add_argument(
        "--drop-bad",
        action="store_true",
        help=f"leave out {faulty}, instead of stopping",
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def write_layout(
    args: argparse.Namespace, fault: Callable[[str], str], faulty: str
) -> list[Utterance]:
    """Write the manifest's utterances as a LibriSpeech layout at ``args.out``, and say what came.

    Args:
        args: of a subcommand with the common options and :func:`layout_options`.
        fault: what is wrong with a normalised text, in words; empty where nothing is.
        faulty: what to call lines with a fault.

    Returns:
        The utterances written.

    Raises:
        DataError: ``args.out`` may not be written, the manifest or the audio is not as it has to
            be, or a line has a fault and ``args.drop_bad`` is not set.
    """
    check_free(args.out, replace=args.replace)  # before minutes of reading
    entries = read_manifest(args.manifest, columns=("path", "speaker", "text", "split"))
    kept, texts, silent, bad = [], [], 0, 0
    for entry in entries:
        text = normalise(entry.cells["text"])
        wrong = fault(text)
        if not text:
            silent += 1
        elif wrong and args.drop_bad:
            bad += 1
        elif wrong:
            raise DataError(
                f"{args.manifest}: line {entry.line} {wrong} (--drop-bad leaves such lines out)"
            )
        elif not entry.cells["speaker"]:
            raise DataError(f"{args.manifest}: line {entry.line} has no speaker")
        else:
            kept.append(entry)
            texts.append(text)
    if not kept:
        raise DataError(f"{args.manifest} has no line with a text that can be used")
    samples = measure_all(args.manifest, audio_root(args), kept, args.jobs)
    utterances = [
        Utterance(
            source=audio_root(args) / entry.path,
            original=entry.path,
            speaker=entry.cells["speaker"],
            text=text,
            split=entry.split,
            samples=length,
        )
        for entry, text, length in zip(kept, texts, samples, strict=True)
    ]
    layout = write_librispeech(args.out, utterances, copy=args.copy, replace=args.replace)
    print_splits(layout.samples)
    for count, what in (
        (silent, "lines without a text left out"),
        (bad, f"{faulty} left out"),
        (layout.copied, "files copied, not linked"),
    ):
        if count:
            print(f"{count} {what}")
    return utterances
