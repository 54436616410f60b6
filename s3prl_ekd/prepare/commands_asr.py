"""``s3prl-ekd prepare asr``, and what it shares with ``pr``: texts into a LibriSpeech layout."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..data.manifest import read_manifest
from ..errors import DataError
from .asr import TABLES, Utterance, write_librispeech
from .char_dict import foreign_characters, normalise
from .common import audio_root, measure_all, print_splits
from .new_folder import check_free

DESCRIPTION = """\
A LibriSpeech layout for `run_downstream.py -d asr`: OUT/{train,dev,test}-clean/SPK/CHAP/ with
audio (links) and transcripts, length tables in OUT/len_for_bucket, and OUT/prepared.tsv, which
maps the new names to the old paths.

Needs the columns path, speaker, text, split. Texts are written in upper case and may hold A to Z,
the apostrophe and spaces. Lines without a text are left out and counted.
"""
FAULTY = "lines with other characters"


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
