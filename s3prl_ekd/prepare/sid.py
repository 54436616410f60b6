"""``prepare sid`` and ``prepare voxceleb1``: what ``run_downstream.py -d voxceleb1`` reads.

s3prl looks for ``ROOT/*/wav/idNNNNN/VIDEO/UTTERANCE.wav`` and reads from a list which of them are
train (1), dev (2) and test (3): one ``DIGIT idNNNNN/VIDEO/UTTERANCE.wav`` a line, the format of
the identification split that VoxCeleb's authors publish. An utterance's class is NNNNN - 10001, and
there are 1251 outputs, whatever the corpus.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from ..data.audio_files import SAMPLE_RATE, is_hidden_or_system
from ..data.manifest import SPLITS, ManifestEntry, read_manifest
from ..errors import DataError
from ..files.atomic import make_folder, write_text
from .common import Task, audio_root, measure_all, print_splits
from .new_folder import PREPARED, check_free, link, link_folder, new_folder

CLASSES = 1251  # s3prl's outputs: the speakers of VoxCeleb1
FIRST_ID = 10001
AUDIO = "audio"  # in the folder written: what file_path in the YAML points to
SPLIT_FILE = "split.txt"  # and meta_data
SHORTEST = 1600  # samples of an excerpt: 0.1 s, four frames
_LINE = re.compile(r"(\S+)\s+(id(\d{5})/[^/\s]+/[^/\s]+\.wav)")
_SPEAKER = re.compile(r"id\d{5}")

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


@dataclass(frozen=True)
class SplitLine:
    """One line of a split file."""

    line: int  # counted from 1
    split: str  # one of SPLITS
    path: str  # idNNNNN/VIDEO/UTTERANCE.wav


def read_split_file(path: Path) -> list[SplitLine]:
    """The lines of an identification split.

    Raises:
        DataError: no such file, a line of another form, an unknown digit, a speaker that has no
            output, a file named twice, or a split without lines.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    found: list[SplitLine] = []
    line_of_path: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        match = _LINE.fullmatch(line.strip())
        if not match:
            raise DataError(
                f"{where} is not of the form '1 id10001/VIDEO/UTTERANCE.wav': {line.strip()[:60]!r}"
            )
        digit, name, speaker = match.groups()
        if digit not in ("1", "2", "3"):
            raise DataError(f"{where} has the split {digit!r}; known: 1 (train), 2 (dev), 3 (test)")
        if not 0 <= int(speaker) - FIRST_ID < CLASSES:
            raise DataError(
                f"{where} has the speaker id{speaker}; s3prl's classes are id{FIRST_ID} to "
                f"id{FIRST_ID + CLASSES - 1}"
            )
        first = line_of_path.setdefault(name, number)
        if first != number:
            raise DataError(f"{where} repeats {name} of line {first}")
        found.append(SplitLine(number, SPLITS[int(digit) - 1], name))
    check_speakers([(line.path[:7], line.split) for line in found], path)
    return found


def check_speakers(labelled: Sequence[tuple[str, str]], where: Path) -> None:
    """Raise :class:`DataError` unless ``(speaker, split)`` pairs are a closed set to be told apart.

    Every split has lines, there are 2 to 1251 speakers, and each of dev and test is in train.
    """
    for split in SPLITS:
        if not any(name == split for _, name in labelled):
            raise DataError(f"{where} has no {split} utterances; SID needs {', '.join(SPLITS)}")
    trained = {speaker for speaker, split in labelled if split == "train"}
    for speaker, split in labelled:
        if speaker not in trained:
            raise DataError(
                f"{where} has the speaker {speaker} in {split} and not in train, so there is "
                "nothing to identify it by"
            )
    if not 2 <= len(trained) <= CLASSES:
        raise DataError(f"{where} has {len(trained)} speaker(s); s3prl's SID takes 2 to {CLASSES}")


def locate(root: Path, lines: Sequence[SplitLine]) -> tuple[list[ManifestEntry], list[str]]:
    """Where each file of a split lies below ``ROOT/*/wav``, and those that lie nowhere.

    Returns:
        Entries with paths relative to ``root`` (``dev/wav/id10001/…``), in the order of ``lines``,
        and the paths of the split file that are missing.

    Raises:
        DataError: ``root`` has not the shape of VoxCeleb1.
    """
    parts = check_shape(root)
    listed: dict[str, dict[str, str]] = {}
    entries, missing = [], []
    for line in lines:
        video, _, name = line.path.rpartition("/")
        if video not in listed:  # a folder is listed once, for all of its utterances
            listed[video] = {
                file: f"{part}/wav/{video}"
                for part in reversed(parts)  # the first part wins, as a name is in one of them
                for file in _names(root / part / "wav" / video)
            }
        folder = listed[video].get(name)
        if folder is None:
            missing.append(line.path)
        else:
            entries.append(ManifestEntry(line.line, f"{folder}/{name}", line.split, {}))
    return entries, missing


def check_shape(root: Path) -> list[str]:
    """The folders of ``root`` that have a ``wav`` in them: ``dev`` and ``test``.

    Raises:
        DataError: there are none, or no speakers (``idNNNNN``) in them.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one with dev/wav and test/wav in it")
    folders = (path for path in root.iterdir() if not is_hidden_or_system(path.name))
    parts = sorted(path.name for path in folders if (path / "wav").is_dir())
    wavs = [root / part / "wav" for part in parts]
    if any(_SPEAKER.fullmatch(path.name) for wav in wavs for path in wav.iterdir()):
        return parts
    if parts:
        why = f"{wavs[0]} has no speakers (id10001, …) in it; unpack VoxCeleb1's archives there"
    elif (root / "wav").is_dir():
        why = f"{root} has wav directly in it; give the folder above, {root.resolve().parent}"
    elif any(_SPEAKER.fullmatch(path.name) for path in root.iterdir()):
        why = f"{root} has the speakers directly in it; they belong into {root / 'dev' / 'wav'}"
    else:
        why = f"{root} has no dev/wav and no test/wav; unpack VoxCeleb1's archives there"
    raise DataError(why)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_corpus(
    out: Path,
    root: Path,
    lines: Sequence[SplitLine],
    entries: Sequence[ManifestEntry],
    *,
    replace: bool,
) -> None:
    """``out/split.txt`` and ``out/audio``, a link to the real corpus."""
    with new_folder(out, replace=replace) as folder:
        link_folder(root, folder / AUDIO)
        _write(folder / SPLIT_FILE, [_split_line(line.split, line.path) for line in lines])
        rows = [f"{line.path}\t{entry.path}" for line, entry in zip(lines, entries, strict=True)]
        _write(folder / PREPARED, ["id\tpath", *rows])


def write_manifest(
    out: Path,
    root: Path,
    entries: Sequence[ManifestEntry],
    samples: Sequence[int],
    *,
    copy: bool = False,
    replace: bool = False,
    test_seconds: float | None = None,
) -> int:
    """A corpus of VoxCeleb1's shape from a manifest's ``entries``; the split stands for the video.

    ``out/audio/all/wav/id10001/train/00001.wav`` is a link to the audio, of whatever format: who
    reads it looks at the header and not at the name. ``speakers.tsv`` says which speaker each id
    is, ``prepared.tsv`` which file each utterance.

    Args:
        root: folder that the paths of ``entries`` are relative to.
        samples: their lengths at 16 kHz, for ``prepared.tsv``; those of :func:`cut` where
            ``test_seconds`` is given.
        copy: write 16-bit WAV files instead of links.
        test_seconds: of dev and test only so much, from the middle, as WAV.

    Returns:
        The number of files written instead of linked.
    """
    speakers = sorted({entry.cells["speaker"] for entry in entries})
    ids = {speaker: f"id{FIRST_ID + index}" for index, speaker in enumerate(speakers)}
    counts = {(speaker, split): 0 for speaker in speakers for split in SPLITS}
    splits, prepared, copied = [], ["id\tpath\tspeaker\tsplit\tsamples"], 0
    with new_folder(out, replace=replace) as folder:
        for entry, length in zip(entries, samples, strict=True):
            speaker = entry.cells["speaker"]
            counts[speaker, entry.split] += 1
            name = f"{ids[speaker]}/{entry.split}/{counts[speaker, entry.split]:05d}.wav"
            target = folder / AUDIO / "all" / "wav" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            seconds = None if entry.split == "train" else test_seconds
            copied += _place(root / entry.path, target, copy=copy, seconds=seconds)
            splits.append(_split_line(entry.split, name))
            prepared.append(f"{name}\t{entry.path}\t{speaker}\t{entry.split}\t{length}")
        _write(folder / SPLIT_FILE, splits)
        _write(folder / PREPARED, prepared)
        table = [
            "\t".join([ids[name], str(index), name, *(str(counts[name, s]) for s in SPLITS)])
            for index, name in enumerate(speakers)
        ]
        _write(folder / "speakers.tsv", ["\t".join(["id", "class", "speaker", *SPLITS]), *table])
    return copied


def cut(
    entries: Sequence[ManifestEntry], samples: Sequence[int], test_seconds: float | None
) -> list[int]:
    """Lengths in samples at 16 kHz once dev and test are cut to ``test_seconds``."""
    if test_seconds is None:
        return list(samples)
    most = round(test_seconds * SAMPLE_RATE)
    return [
        length if entry.split == "train" else min(length, most)
        for entry, length in zip(entries, samples, strict=True)
    ]


def _place(source: Path, target: Path, *, copy: bool, seconds: float | None) -> int:
    """Link, or write a 16-bit WAV where that is asked for, links cannot be made, or only the
    middle ``seconds`` are wanted."""
    if not copy and seconds is None and link(source, target):
        return 0
    sound, rate = soundfile.read(source, dtype="int16")
    if seconds is not None:
        spare = max(0, len(sound) - round(seconds * rate))
        sound = sound[spare // 2 : len(sound) - (spare - spare // 2)]
    soundfile.write(target, sound, rate, subtype="PCM_16", format="WAV")
    return 1


def _split_line(split: str, path: str) -> str:
    return f"{SPLITS.index(split) + 1} {path}"


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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


def _report(
    out: Path, entries: Sequence[ManifestEntry], samples: Sequence[int], speakers: int
) -> None:
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
