"""``prepare sid`` and ``prepare voxceleb1``: what `run_downstream.py -d voxceleb1` reads."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..data.audio_files import SAMPLE_RATE
from ..data.manifest import SPLITS, read_manifest
from ..errors import DataError
from ..files.atomic import make_folder, write_text
from .common import Task, audio_root, measure_all, print_splits
from .new_folder import check_free
from .sid import (
    AUDIO,
    SHORTEST,
    SPLIT_FILE,
    check_speakers,
    cut,
    locate,
    read_split_file,
    write_corpus,
    write_manifest,
)

ABOUT_SID = """\
A corpus of VoxCeleb1's shape for `run_downstream.py -d voxceleb1`: OUT/audio with links to the
audio, OUT/split.txt, OUT/speakers.tsv (which speaker each idNNNNN is) and OUT/prepared.tsv.

Needs the columns path, speaker and split. The task is to tell known speakers apart, so each of them
has utterances in train; the splits are those of the utterances. Where each speaker has one room and
one microphone, whole utterances are told apart by nearly any features; --test-seconds 1 leaves the
middle second of dev and test, which is harder.
"""

ABOUT_VOXCELEB1 = """\
Check the real VoxCeleb1 for `run_downstream.py -d voxceleb1`: ROOT has dev/wav and test/wav in it,
SPLIT_FILE is the identification split that VoxCeleb's authors publish (iden_split.txt). Writes
OUT/split.txt and OUT/audio, a link to ROOT. What is missing is named, all of it in OUT-missing.txt.
"""


def _configure_sid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test-seconds",
        metavar="S",
        type=float,
        help="of each dev and test utterance only its middle, as WAV (default: all of it)",
    )
    parser.add_argument("--copy", action="store_true", help="write WAV files instead of links")
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _configure_voxceleb1(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", type=Path)
    parser.add_argument("split_file", metavar="SPLIT_FILE", type=Path)
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _prepare_sid(args: argparse.Namespace) -> int:
    _check_test_seconds(args.test_seconds)
    check_free(args.out, replace=args.replace)  # before minutes of reading
    entries = read_manifest(args.manifest, columns=("path", "speaker", "split"))
    for entry in entries:
        if not entry.cells["speaker"]:
            raise DataError(f"{args.manifest}: line {entry.line} has no speaker")
    check_speakers([(entry.cells["speaker"], entry.split) for entry in entries], args.manifest)
    root = audio_root(args)
    samples = measure_all(args.manifest, root, entries, args.jobs)
    samples = cut(entries, samples, args.test_seconds)
    copied = write_manifest(
        args.out, root, entries, samples,
        copy=args.copy, replace=args.replace, test_seconds=args.test_seconds,
    )  # fmt: skip
    _report(args.out, entries, samples, len({entry.cells["speaker"] for entry in entries}))
    if copied:
        print(f"{copied} files written as WAV, not linked")
    return 0


def _check_test_seconds(seconds: float | None) -> None:
    if seconds is not None and not SHORTEST <= seconds * SAMPLE_RATE < math.inf:
        raise DataError(
            f"--test-seconds {seconds:g}: a finite length of {SHORTEST / SAMPLE_RATE:g} s or more "
            "is needed, for a few frames of features"
        )


def _prepare_voxceleb1(args: argparse.Namespace) -> int:
    check_free(args.out, replace=args.replace)
    lines = read_split_file(args.split_file)
    entries, missing = locate(args.root, lines)
    list_of_missing = args.out.with_name(f"{args.out.resolve().name}-missing.txt")
    list_of_missing.unlink(missing_ok=True)  # one of an earlier try would mislead
    if missing:
        make_folder(list_of_missing.parent)
        write_text(list_of_missing, "".join(f"{path}\n" for path in missing))
        raise DataError(
            f"{args.root} lacks {len(missing)} of the {len(lines)} files of {args.split_file}: "
            f"{', '.join(missing[:3])}{', …' * (len(missing) > 3)}; all of them: {list_of_missing}"
        )
    samples = measure_all(args.split_file, args.root, entries, args.jobs)
    write_corpus(args.out, args.root, lines, entries, replace=args.replace)
    _report(args.out, entries, samples, len({line.path[:7] for line in lines}))
    return 0


def _report(out: Path, entries, samples, speakers: int) -> None:
    lengths = {
        split: [n for entry, n in zip(entries, samples, strict=True) if entry.split == split]
        for split in SPLITS
    }
    print_splits(lengths)
    print(f"{speakers} speakers: chance is {100 / speakers:.1f} %")
    print(f"wrote {out}; in the YAML: file_path: {out / AUDIO}")
    print(f"               meta_data: {out / SPLIT_FILE}")


SID = Task(
    "VoxCeleb1's layout and split file, for -d voxceleb1", ABOUT_SID, _configure_sid, _prepare_sid
)
VOXCELEB1 = Task(
    "check the real VoxCeleb1 against its split, for -d voxceleb1",
    ABOUT_VOXCELEB1,
    _configure_voxceleb1,
    _prepare_voxceleb1,
    manifest=False,
)
