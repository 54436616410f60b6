"""Turn a manifest (TSV) into what s3prl reads: one subcommand for each task.

A manifest is a tab-separated UTF-8 table with a header line. It needs the columns path
(relative to the manifest's folder, or to --audio-root) and split (train, dev, test); a task may
need more. The audio must be 16 kHz, mono.

example:
  s3prl-ekd prepare asr my_corpus/asr.tsv -o data/corpus
  s3prl-ekd prepare unlabeled my_corpus/all.tsv -o data/unlabeled
  s3prl-ekd prepare asr --help
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.audio_files import total_hours
from ..data.char_dict import foreign_characters, normalise
from ..data.layout import TABLES, Utterance, check_free, write_librispeech, write_split_tables
from ..data.manifest import Entry, measure, read_manifest
from ..errors import DataError

ASR = """\
A LibriSpeech layout for `run_downstream.py -d asr`: OUT/{train,dev,test}-clean/SPK/CHAP/ with
audio (links) and transcripts, length tables in OUT/len_for_bucket, and OUT/prepared.tsv, which
maps the new names to the old paths.

Needs the columns path, speaker, text, split. Texts are written in upper case and may hold A to Z,
the apostrophe and spaces. Lines without a text are left out and counted.
"""

UNLABELED = """\
Length tables for distillation: OUT/len_for_bucket/{train,dev,test}.csv, with paths relative to
the manifest's folder (or --audio-root). Needs the columns path and split; nothing is copied.
"""


@dataclass(frozen=True)
class Task:
    """One subcommand of ``prepare``."""

    help: str
    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each of :data:`TASKS`."""
    subparsers = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        subparser = subparsers.add_parser(
            name,
            help=task.help,
            description=task.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.add_argument("manifest", metavar="MANIFEST.tsv", type=Path)
        subparser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True)
        subparser.add_argument(
            "--audio-root",
            metavar="ROOT",
            type=Path,
            help="folder that the paths are relative to (default: the manifest's folder)",
        )
        subparser.add_argument(
            "--jobs", metavar="N", type=int, default=8, help="threads (default: 8)"
        )
        task.configure(subparser)


def main(args: argparse.Namespace) -> int:
    """Run the subcommand that was chosen."""
    return TASKS[args.task].run(args)


def _configure_asr(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy", action="store_true", help="copy the audio instead of linking it")
    parser.add_argument(
        "--drop-bad",
        action="store_true",
        help="leave out lines whose text has other characters, instead of stopping at the first",
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _prepare_asr(args: argparse.Namespace) -> int:
    check_free(args.out, replace=args.replace)  # before minutes of reading
    entries = read_manifest(args.manifest, columns=("path", "speaker", "text", "split"))
    kept, texts, silent, bad = [], [], 0, 0
    for entry in entries:
        text = normalise(entry.cells["text"])
        foreign = foreign_characters(text)
        if not text:
            silent += 1
        elif foreign and args.drop_bad:
            bad += 1
        elif foreign:
            raise DataError(
                f"{args.manifest}: line {entry.line} has a text with {foreign!r}; only A to Z, "
                "the apostrophe and spaces are allowed (--drop-bad leaves such lines out)"
            )
        elif not entry.cells["speaker"]:
            raise DataError(f"{args.manifest}: line {entry.line} has no speaker")
        else:
            kept.append(entry)
            texts.append(text)
    if not kept:
        raise DataError(f"{args.manifest} has no line with a text that can be used")
    samples = _measure(args, kept)
    utterances = [
        Utterance(
            source=_root(args) / entry.path,
            original=entry.path,
            speaker=entry.cells["speaker"],
            text=text,
            split=entry.split,
            samples=length,
        )
        for entry, text, length in zip(kept, texts, samples, strict=True)
    ]
    layout = write_librispeech(args.out, utterances, copy=args.copy, replace=args.replace)
    _print_splits(layout.samples)
    for count, what in (
        (silent, "lines without a text left out"),
        (bad, "lines with other characters left out"),
        (layout.copied, "files copied, not linked"),
    ):
        if count:
            print(f"{count} {what}")
    print(f"wrote {args.out}; in the YAML: libri_root: {args.out}")
    print(f"               bucket_file: {args.out / TABLES}")
    return 0


def _prepare_unlabeled(args: argparse.Namespace) -> int:
    entries = read_manifest(args.manifest)
    samples = _measure(args, entries)
    folder = args.out / TABLES
    _print_splits(write_split_tables(folder, entries, samples))
    print(f"wrote {folder}; in the YAML: libri_root: {_root(args)}")
    print(f"               file_path: {folder}")
    return 0


def _root(args: argparse.Namespace) -> Path:
    return args.audio_root or args.manifest.parent


def _measure(args: argparse.Namespace, entries: list[Entry]) -> list[int]:
    with tqdm(
        total=len(entries), unit=" files", desc="headers", delay=0.3, dynamic_ncols=True
    ) as bar:
        return measure(args.manifest, _root(args), entries, jobs=args.jobs, advance=bar.update)


def _print_splits(splits: dict[str, list[int]]) -> None:
    for name, lengths in splits.items():
        print(f"{name}: {len(lengths)} utterances, {total_hours(lengths):.2f} h")


TASKS = {
    "asr": Task(
        "LibriSpeech layout with transcripts, for -d asr", ASR, _configure_asr, _prepare_asr
    ),
    "unlabeled": Task(
        "length tables alone, for distillation",
        UNLABELED,
        lambda parser: None,
        _prepare_unlabeled,
    ),
}
