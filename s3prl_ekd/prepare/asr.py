"""``prepare asr``: convert a manifest to the folder layout of LibriSpeech.

s3prl's ASR and PR recipes read this layout only: the transcript of
``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac`` is a line of ``SPK-CHAP.trans.txt`` in the same folder, and an
utterance's name ends at the first dot. Audio files are symlinks, so the layout takes no space;
segments of longer files are written.

The recipe's character dictionary ``char.dict`` has fairseq's format, one ``SYMBOL COUNT`` a line.
s3prl adds four symbols (``<s> <pad> </s> <unk>``), which makes 32 classes. s3prl's PyPI package
lacks the file, so ours is made from the alphabet. All counts are 1; nothing reads them. The order
is ours (the word boundary, A to Z, the apostrophe), so the output layer of a model trained with
another dictionary does not fit, even if the symbols are the same.
"""

from __future__ import annotations

import argparse
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..data.lengths import write_table
from ..data.manifest import SPLITS, Manifest
from ..data.tables import Utterance
from ..errors import DataError
from .common import (
    PREPARED,
    PreparedAudio,
    PrepareTask,
    add_convert_option,
    manifest_of,
    new_folder,
    placing,
    print_splits,
    read_audio_parts,
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
the apostrophe and spaces; --strip-punctuation removes punctuation. Lines without a text are skipped
and counted. Segments of longer files are written as FLAC.
"""
INVALID_LINES = "lines with other characters"


def normalise(text: str, strip_punctuation: bool = False) -> str:
    """Convert to upper case with one space between words.

    Args:
        strip_punctuation: replace punctuation, except apostrophes in words, by a space; by default
            no character is dropped.
    """
    if strip_punctuation:
        text = text.replace("\u2019", "'")
        kept = (" " if is_punctuation(c) and c != "'" else c for c in text)
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", "".join(kept))
    return " ".join(text.upper().split())


def is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P"


def foreign_characters(text: str) -> str:
    """Return the characters of a normalised text that the dictionary lacks: sorted, unique."""
    return "".join(sorted(set(text) - set(LETTERS) - {" "}))


@dataclass(frozen=True)
class TranscribedUtterance:
    """One line of a manifest, checked, with its length."""

    audio: PreparedAudio
    original: str  # the name in the manifest
    speaker: str
    text: str  # normalised, see :func:`normalise`
    split: str  # one of SPLITS


WriteMore = Callable[[Path, Sequence[TranscribedUtterance]], None]


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
    write_more: WriteMore | None = None,
    *,
    copy: bool = False,
    replace: bool = False,
) -> int:
    """Write ``utterances`` as a LibriSpeech layout with length tables and ``prepared.tsv``.

    The folders are ``train-clean``, ``dev-clean`` and ``test-clean``. The chapter is the split's
    number, 1 to 3, so names are unique for a speaker of several splits.

    Args:
        write_more: see :func:`write_layout`.
        copy: copy the audio; by default it is linked, and copied only where linking fails.
        replace: replace an earlier layout at ``out``.

    Returns:
        The number of files copied or written.
    """
    names = speaker_names(utterance.speaker for utterance in utterances)
    tables: dict[str, list[Utterance]] = {}
    transcripts: dict[PurePosixPath, list[str]] = {}
    prepared = ["id\tpath\tspeaker\tsplit\tsamples"]
    copied = 0
    with new_folder(out, replace=replace) as root:
        for utterance in placing(utterances):
            split = f"{utterance.split}-clean"
            speaker = names[utterance.speaker]
            chapter = SPLITS.index(utterance.split) + 1
            folder = PurePosixPath(split, speaker, str(chapter))
            lines = transcripts.setdefault(folder / f"{speaker}-{chapter}.trans.txt", [])
            name = f"{speaker}-{chapter}-{len(lines):04d}"
            lines.append(f"{name} {utterance.text}")
            file = folder / (name + utterance.audio.suffix)
            (root / folder).mkdir(parents=True, exist_ok=True)
            copied += utterance.audio.place(root / file, copy=copy)
            tables.setdefault(split, []).append(Utterance(str(file), utterance.audio.samples))
            cells = (name, utterance.original, utterance.speaker, utterance.split)
            prepared.append("\t".join((*cells, str(utterance.audio.samples))))
        for path, lines in transcripts.items():
            write_lines(root / path, lines)
        (root / TABLES).mkdir()
        for split, rows in tables.items():
            write_table(root / TABLES / f"{split}.csv", rows)
        write_lines(root / PREPARED, prepared)
        if write_more is not None:
            write_more(root, utterances)
    return copied


def add_layout_options(parser: argparse.ArgumentParser, invalid_lines: str) -> None:
    """Add the options that :func:`write_layout` reads; ``invalid_lines`` is the same as there."""
    parser.add_argument("--copy", action="store_true", help="copy the audio instead of linking it")
    add_convert_option(parser)
    parser.add_argument(
        "--strip-punctuation",
        action="store_true",
        help="remove punctuation from texts, as in Common Voice (default: an error)",
    )
    parser.add_argument(
        "--drop-bad",
        action="store_true",
        help=f"skip {invalid_lines} (default: stop with an error)",
    )


def write_layout(
    args: argparse.Namespace,
    manifest: Manifest,
    check_text: Callable[[str], str],
    invalid_lines: str,
    write_more: WriteMore | None = None,
) -> list[TranscribedUtterance]:
    """Write the manifest's utterances as a LibriSpeech layout at ``args.out``; print a summary.

    Args:
        args: arguments of a subcommand with :func:`add_layout_options`.
        manifest: with the columns :data:`COLUMNS`.
        check_text: returns the error of a normalised text, or "" if the text is valid.
        invalid_lines: noun phrase for lines with an invalid text, for messages.
        write_more: writes other files into the new folder, before it gets its name.

    Returns:
        The utterances written.
    """
    valid, texts, n_empty, n_invalid = [], [], 0, 0
    for entry in manifest.entries:
        text = normalise(entry.cells["text"], args.strip_punctuation)
        problem = check_text(text)
        if not text:
            n_empty += 1
        elif problem and args.drop_bad:
            n_invalid += 1
        elif problem:
            raise DataError(f"{entry.location}: {problem}; to skip such lines, add --drop-bad")
        else:
            valid.append(entry)
            texts.append((speaker_of(entry), text))
    if not valid:
        raise DataError(f"{manifest.source}: no line has a valid text")
    parts = read_audio_parts(args, manifest, valid)
    utterances = []
    lengths: dict[str, list[int]] = {}
    for entry, (speaker, text), audio in zip(valid, texts, parts, strict=True):
        utterances.append(TranscribedUtterance(audio, entry.name, speaker, text, entry.split))
        lengths.setdefault(f"{entry.split}-clean", []).append(audio.samples)
    copied = write_librispeech(
        args.out, utterances, write_more, copy=args.copy, replace=args.replace
    )
    print_splits(lengths)
    for split in SPLITS:
        if f"{split}-clean" not in lengths:
            print(f"no utterances of the split {split}, which the recipe needs")
    for count, text in (
        (n_empty, "lines without a text skipped"),
        (n_invalid, f"{invalid_lines} skipped"),
        (copied, "files copied or written, not linked"),
    ):
        if count:
            print(f"{count} {text}")
    return utterances


def _prepare_asr(args: argparse.Namespace) -> None:
    write_layout(args, manifest_of(args, COLUMNS), _check_characters, INVALID_LINES)
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
