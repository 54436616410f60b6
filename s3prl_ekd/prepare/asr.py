"""``prepare asr``: convert a manifest to the folder layout of LibriSpeech.

s3prl's ASR and PR recipes read this layout only: the transcript of
``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac`` is a line of ``SPK-CHAP.trans.txt`` in the same folder, and an
utterance's name ends at the first dot. Audio files are symlinks, so the layout takes no space.

The recipe's character dictionary ``char.dict`` has fairseq's format, one ``SYMBOL COUNT`` a line.
s3prl adds four symbols (``<s> <pad> </s> <unk>``), which makes 32 classes. s3prl's PyPI package
lacks the file, so ours is made from the alphabet. All counts are 1; nothing reads them. The order
is ours (the word boundary, A to Z, the apostrophe), so the output layer of a model trained with
another dictionary does not fit, even if the symbols are the same.
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
from .common import audio_root, print_splits, read_lengths
from .new_folder import PREPARED, check_replaceable

LETTERS = string.ascii_uppercase + "'"  # the characters of a transcript, except the space

_FOREIGN = re.compile(f"[^{LETTERS} ]")

TABLES = "len_for_bucket"
DESCRIPTION = """\
Write a LibriSpeech layout for `run_downstream.py -d asr`: OUT/{train,dev,test}-clean/SPK/CHAP/
with audio (symlinks) and transcripts, length tables in OUT/len_for_bucket, and OUT/prepared.tsv,
which maps the new names to the manifest's paths.

Needs the columns path, speaker, text, split. Texts are converted to upper case; allowed are A to Z,
the apostrophe and spaces. Lines without a text are skipped and counted.
"""
INVALID_LINES = "lines with other characters"


def normalise(text: str) -> str:
    """Convert to upper case with one space between words. No character is dropped."""
    return " ".join(text.upper().split())


def foreign_characters(text: str) -> str:
    """Return the characters of a normalised text that the dictionary lacks: sorted, unique."""
    return "".join(sorted(set(_FOREIGN.findall(text))))


@dataclass(frozen=True)
class TranscribedUtterance:
    """One line of a manifest, checked, with its length."""

    source: Path  # the audio file
    original: str  # the path in the manifest
    speaker: str
    text: str  # normalised, see :func:`normalise`
    split: str  # one of SPLITS
    samples: int  # at 16 kHz


@dataclass
class WrittenLayout:
    """Counts of what :func:`write_librispeech` wrote."""

    samples: dict[str, list[int]] = field(default_factory=dict)  # split folder -> lengths
    copied: int = 0  # files copied, not linked


def speaker_names(speakers: Iterable[str]) -> dict[str, str]:
    """Map each speaker to a unique name of letters and digits.

    s3prl splits utterance names at dashes and dots, so a speaker's name must have neither.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for speaker in sorted(set(speakers)):
        base = re.sub(r"[^A-Za-z0-9]", "", speaker) or "speaker"
        name, number = base, 1
        while name.lower() in used:  # some file systems ignore case
            number += 1
            name = f"{base}x{number}"
        used.add(name.lower())
        names[speaker] = name
    return names


def write_librispeech(
    out: Path,
    utterances: Sequence[TranscribedUtterance],
    *,
    copy: bool = False,
    replace: bool = False,
) -> WrittenLayout:
    """Write ``utterances`` as a LibriSpeech layout with length tables and ``prepared.tsv``.

    The folders are ``train-clean``, ``dev-clean`` and ``test-clean``. The chapter is the split's
    number, 1 to 3, so names are unique for a speaker of several splits. ``out`` is written under a
    temporary name and renamed when complete.

    Args:
        out: the folder to write.
        copy: copy the audio; by default it is linked, and copied only where linking fails.
        replace: replace an earlier layout at ``out``.

    Raises:
        DataError: ``out`` exists, and is not a layout or ``replace`` is not set.
    """
    check_replaceable(out, replace=replace)
    with atomic_folder(out, DataError) as folder:
        return _write_files(folder, utterances, copy)


def _write_files(
    root: Path, utterances: Sequence[TranscribedUtterance], copy: bool
) -> WrittenLayout:
    names = speaker_names(utterance.speaker for utterance in utterances)
    layout = WrittenLayout()
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
        layout.copied += _link_or_copy(utterance.source, root / file, copy=copy)
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


def _link_or_copy(source: Path, target: Path, *, copy: bool) -> int:
    """Link ``target`` to ``source``, or copy it; return the number of files copied, 0 or 1."""
    source = source.resolve()
    if not copy:
        try:
            link = os.path.relpath(source, target.parent.resolve())
        except ValueError:  # another drive
            link = str(source)
        try:
            os.symlink(link, target)
            return 0
        except OSError:  # a file system without symlinks
            pass
    shutil.copyfile(source, target)
    return 1


def write_split_tables(
    folder: Path, entries: Sequence[ManifestEntry], samples: Sequence[int]
) -> dict[str, list[int]]:
    """Write ``folder/{train,dev,test}.csv``; return the lengths of each split that has entries."""
    make_folder(folder)
    lengths = {}
    for split in SPLITS:
        rows = [
            (entry.path, length)
            for entry, length in zip(entries, samples, strict=True)
            if entry.split == split
        ]
        if rows:
            write_table(folder / f"{split}.csv", rows)
            lengths[split] = [length for _, length in rows]
    return lengths


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prepare asr``."""
    add_layout_options(parser, INVALID_LINES)


def prepare_asr(args: argparse.Namespace) -> int:
    """Run ``prepare asr``; return exit code 0."""
    write_layout(args, _check_characters, INVALID_LINES)
    print(f"wrote {args.out}; in the YAML: libri_root: {args.out}")
    print(f"               bucket_file: {args.out / TABLES}")
    return 0


def _check_characters(text: str) -> str:
    characters = foreign_characters(text)
    if not characters:
        return ""
    return f"the text has {characters!r}; allowed are A to Z, the apostrophe and spaces"


def add_layout_options(parser: argparse.ArgumentParser, invalid_lines: str) -> None:
    """Add the options that :func:`write_layout` reads; ``invalid_lines`` is the same as there."""
    parser.add_argument("--copy", action="store_true", help="copy the audio instead of linking it")
    parser.add_argument(
        "--drop-bad",
        action="store_true",
        help=f"skip {invalid_lines} (default: stop with an error)",
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def write_layout(
    args: argparse.Namespace, check_text: Callable[[str], str], invalid_lines: str
) -> list[TranscribedUtterance]:
    """Write the manifest's utterances as a LibriSpeech layout at ``args.out``; print a summary.

    Args:
        args: arguments of a subcommand with the common options and :func:`add_layout_options`.
        check_text: returns the error of a normalised text, or "" if the text is valid.
        invalid_lines: noun phrase for lines with an invalid text, for messages.

    Returns:
        The utterances written.

    Raises:
        DataError: ``args.out`` must not be replaced, the manifest or an audio file is invalid, or a
            text is invalid and ``args.drop_bad`` is not set.
    """
    check_replaceable(args.out, replace=args.replace)  # before minutes of reading
    entries = read_manifest(args.manifest, columns=("path", "speaker", "text", "split"))
    valid, texts, n_empty, n_invalid = [], [], 0, 0
    for entry in entries:
        text = normalise(entry.cells["text"])
        problem = check_text(text)
        if not text:
            n_empty += 1
        elif problem and args.drop_bad:
            n_invalid += 1
        elif problem:
            raise DataError(
                f"{args.manifest}: line {entry.line}: {problem}; to skip such lines, add --drop-bad"
            )
        elif not entry.cells["speaker"]:
            raise DataError(f"{args.manifest}: line {entry.line} has no speaker")
        else:
            valid.append(entry)
            texts.append(text)
    if not valid:
        raise DataError(f"{args.manifest}: no line has a valid text")
    samples = read_lengths(args.manifest, audio_root(args), valid, args.jobs)
    utterances = [
        TranscribedUtterance(
            source=audio_root(args) / entry.path,
            original=entry.path,
            speaker=entry.cells["speaker"],
            text=text,
            split=entry.split,
            samples=length,
        )
        for entry, text, length in zip(valid, texts, samples, strict=True)
    ]
    layout = write_librispeech(args.out, utterances, copy=args.copy, replace=args.replace)
    print_splits(layout.samples)
    for count, text in (
        (n_empty, "lines without a text skipped"),
        (n_invalid, f"{invalid_lines} skipped"),
        (layout.copied, "files copied, not linked"),
    ):
        if count:
            print(f"{count} {text}")
    return utterances
