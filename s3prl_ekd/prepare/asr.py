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
import re
import shutil
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..data.lengths import write_table
from ..data.manifest import SPLITS, read_manifest
from ..errors import DataError
from .common import (
    PREPARED,
    PrepareTask,
    audio_root,
    link,
    new_folder,
    print_splits,
    read_lengths,
    speaker_of,
    write_lines,
)

LETTERS = string.ascii_uppercase + "'"  # the characters of a transcript, except the space
COLUMNS = ("path", "speaker", "text", "split")
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
    return "".join(sorted(set(text) - set(LETTERS) - {" "}))


@dataclass(frozen=True)
class TranscribedUtterance:
    """One line of a manifest, checked, with its length."""

    source: Path  # the audio file
    original: str  # the path in the manifest
    speaker: str
    text: str  # normalised, see :func:`normalise`
    split: str  # one of SPLITS
    samples: int  # at 16 kHz


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
) -> int:
    """Write ``utterances`` as a LibriSpeech layout with length tables and ``prepared.tsv``.

    The folders are ``train-clean``, ``dev-clean`` and ``test-clean``. The chapter is the split's
    number, 1 to 3, so names are unique for a speaker of several splits.

    Args:
        copy: copy the audio; by default it is linked, and copied only where linking fails.
        replace: replace an earlier layout at ``out``.

    Returns:
        The number of files copied.
    """
    names = speaker_names(utterance.speaker for utterance in utterances)
    tables: dict[str, list[tuple[str, int]]] = {}
    transcripts: dict[PurePosixPath, list[str]] = {}
    prepared = ["id\tpath\tspeaker\tsplit\tsamples"]
    copied = 0
    with new_folder(out, replace=replace) as root:
        for utterance in utterances:
            split = f"{utterance.split}-clean"
            speaker = names[utterance.speaker]
            chapter = SPLITS.index(utterance.split) + 1
            folder = PurePosixPath(split, speaker, str(chapter))
            lines = transcripts.setdefault(folder / f"{speaker}-{chapter}.trans.txt", [])
            name = f"{speaker}-{chapter}-{len(lines):04d}"
            lines.append(f"{name} {utterance.text}")
            file = folder / (name + utterance.source.suffix.lower())
            (root / folder).mkdir(parents=True, exist_ok=True)
            if copy or not link(utterance.source, root / file):
                shutil.copyfile(utterance.source, root / file)
                copied += 1
            tables.setdefault(split, []).append((str(file), utterance.samples))
            cells = (name, utterance.original, utterance.speaker, utterance.split)
            prepared.append("\t".join((*cells, str(utterance.samples))))
        for path, lines in transcripts.items():
            write_lines(root / path, lines)
        (root / TABLES).mkdir()
        for split, rows in tables.items():
            write_table(root / TABLES / f"{split}.csv", rows)
        write_lines(root / PREPARED, prepared)
    return copied


def add_layout_options(parser: argparse.ArgumentParser, invalid_lines: str) -> None:
    """Add the options that :func:`write_layout` reads; ``invalid_lines`` is the same as there."""
    parser.add_argument("--copy", action="store_true", help="copy the audio instead of linking it")
    parser.add_argument(
        "--drop-bad",
        action="store_true",
        help=f"skip {invalid_lines} (default: stop with an error)",
    )


def write_layout(
    args: argparse.Namespace, check_text: Callable[[str], str], invalid_lines: str
) -> list[TranscribedUtterance]:
    """Write the manifest's utterances as a LibriSpeech layout at ``args.out``; print a summary.

    Args:
        args: arguments of a subcommand with :func:`add_layout_options`.
        check_text: returns the error of a normalised text, or "" if the text is valid.
        invalid_lines: noun phrase for lines with an invalid text, for messages.

    Returns:
        The utterances written.
    """
    valid, texts, n_empty, n_invalid = [], [], 0, 0
    for entry in read_manifest(args.manifest, columns=COLUMNS):
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
        else:
            valid.append(entry)
            texts.append((speaker_of(args.manifest, entry), text))
    if not valid:
        raise DataError(f"{args.manifest}: no line has a valid text")
    root = audio_root(args)
    samples = read_lengths(args.manifest, root, valid, args.jobs)
    utterances = []
    lengths: dict[str, list[int]] = {}
    for entry, (speaker, text), length in zip(valid, texts, samples, strict=True):
        utterances.append(
            TranscribedUtterance(root / entry.path, entry.path, speaker, text, entry.split, length)
        )
        lengths.setdefault(f"{entry.split}-clean", []).append(length)
    copied = write_librispeech(args.out, utterances, copy=args.copy, replace=args.replace)
    print_splits(lengths)
    for count, text in (
        (n_empty, "lines without a text skipped"),
        (n_invalid, f"{invalid_lines} skipped"),
        (copied, "files copied, not linked"),
    ):
        if count:
            print(f"{count} {text}")
    return utterances


def _prepare_asr(args: argparse.Namespace) -> None:
    write_layout(args, _check_characters, INVALID_LINES)
    print(f"wrote {args.out}; in the YAML: libri_root: {args.out}")
    print(f"               bucket_file: {args.out / TABLES}")


def _check_characters(text: str) -> str:
    characters = foreign_characters(text)
    if not characters:
        return ""
    return f"the text has {characters!r}; allowed are A to Z, the apostrophe and spaces"


ASR = PrepareTask(
    "LibriSpeech layout with transcripts, for -d asr",
    DESCRIPTION,
    _prepare_asr,
    lambda parser: add_layout_options(parser, INVALID_LINES),
)
