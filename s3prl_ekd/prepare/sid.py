"""``prepare sid`` and ``prepare voxceleb1``: VoxCeleb1's layout and split file for SID.

s3prl reads ``ROOT/*/wav/idNNNNN/VIDEO/UTTERANCE.wav`` and a split file with lines of
``DIGIT idNNNNN/VIDEO/UTTERANCE.wav``, where 1 is train, 2 is dev and 3 is test. This is the format
of the identification split that VoxCeleb's authors publish. An utterance's class is NNNNN - 10001;
the model has 1251 outputs for every corpus.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data.audio_files import SAMPLE_RATE, is_hidden_or_system
from ..data.manifest import MAX_LIST, SPLITS, ManifestEntry
from ..errors import DataError
from ..files.atomic import make_folder, write_text
from ..files.text import read_text
from .common import (
    PREPARED,
    PreparedAudio,
    PrepareTask,
    add_convert_option,
    audio_lengths,
    link_folder,
    manifest_of,
    new_folder,
    placing,
    print_splits,
    read_audio_parts,
    speaker_of,
    write_lines,
)

CLASSES = 1251  # outputs of s3prl's model: the speakers of VoxCeleb1
FIRST_ID = 10001
# Names in the output folder, for the YAML keys `file_path` and `meta_data`.
AUDIO = "audio"
SPLIT_FILE = "split.txt"
MIN_SAMPLES = 1600  # of an excerpt: 0.1 s, four frames
_LINE = re.compile(r"([123])\s+(id(\d{5})/[^/\s]+/[^/\s]+\.wav)")
_SPEAKER = re.compile(r"id\d{5}")

SID_DESCRIPTION = """\
Write a corpus in VoxCeleb1's layout for `run_downstream.py -d voxceleb1`: OUT/audio with symlinks
to the audio (segments of files are written), OUT/split.txt, OUT/speakers.tsv (the speaker of each
idNNNNN) and OUT/prepared.tsv.

Needs the columns path, speaker and split. The task is closed-set identification, so each speaker
must have utterances in train. If each speaker was recorded in one room with one microphone, nearly
any features identify them from a full utterance. --test-seconds 1 makes the task harder: it uses
the middle second of each dev and test utterance.
"""
VOXCELEB1_DESCRIPTION = """\
Check VoxCeleb1 for `run_downstream.py -d voxceleb1`: ROOT contains dev/wav and test/wav;
SPLIT_FILE is the identification split that VoxCeleb's authors publish (iden_split.txt). Writes
OUT/split.txt and OUT/audio, a symlink to ROOT. If files are missing, OUT-missing.txt lists them.
"""


def read_split_file(path: Path) -> list[ManifestEntry]:
    """Read an identification split; paths are ``idNNNNN/VIDEO/UTTERANCE.wav``."""
    entries: list[ManifestEntry] = []
    line_of_path: dict[str, int] = {}
    text = read_text(path, "split file", DataError, MAX_LIST, "utf-8-sig")
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line:
            continue
        location = f"{path}: line {number}"
        match = _LINE.fullmatch(line)
        if not match:
            raise DataError(
                f"{location}: expected '1 id10001/VIDEO/UTTERANCE.wav' with 1 (train), 2 (dev) or "
                f"3 (test), got {line[:60]!r}"
            )
        digit, name, speaker = match.groups()
        if not 0 <= int(speaker) - FIRST_ID < CLASSES:
            raise DataError(
                f"{location}: the speaker must be id{FIRST_ID} to id{FIRST_ID + CLASSES - 1}, "
                f"got id{speaker}"
            )
        first = line_of_path.setdefault(name, number)
        if first != number:
            raise DataError(f"{location} repeats {name} of line {first}")
        entries.append(ManifestEntry(location, name, SPLITS[int(digit) - 1], {}))
    check_speakers([(entry.path[:7], entry.split) for entry in entries], path)
    return entries


def check_speakers(utterances: Sequence[tuple[str, str]], source: str | Path) -> None:
    """Check that ``(speaker, split)`` pairs are a closed-set identification task."""
    for split in SPLITS:
        if not any(name == split for _, name in utterances):
            raise DataError(f"{source} has no {split} utterances; SID needs {', '.join(SPLITS)}")
    train_speakers = {speaker for speaker, split in utterances if split == "train"}
    for speaker, split in utterances:
        if speaker not in train_speakers:
            raise DataError(
                f"{source}: the speaker {speaker} is in {split} but not in train; SID needs every "
                "speaker in train"
            )
    if not 2 <= len(train_speakers) <= CLASSES:
        raise DataError(f"{source} has {len(train_speakers)} speaker(s); SID needs 2 to {CLASSES}")


def find_files(root: Path, lines: Sequence[ManifestEntry]) -> tuple[list[ManifestEntry], list[str]]:
    """Find the files of a split below ``root/*/wav``.

    Returns:
        Entries with paths relative to ``root`` (``dev/wav/id10001/…``), in the order of ``lines``;
        and the paths of the split file that are missing.
    """
    parts = check_voxceleb1(root)
    listed: dict[str, dict[str, str]] = {}
    entries, missing = [], []
    for line in lines:
        video, _, name = line.path.rpartition("/")
        if video not in listed:  # list each folder once
            listed[video] = {
                file: f"{part}/wav/{video}"
                for part in reversed(parts)  # if two parts have the file, use the first
                if (root / part / "wav" / video).is_dir()
                for file in os.listdir(root / part / "wav" / video)
            }
        folder = listed[video].get(name)
        if folder is None:
            missing.append(line.path)
        else:
            entries.append(replace(line, path=f"{folder}/{name}"))
    return entries, missing


def check_voxceleb1(root: Path) -> list[str]:
    """Return the folders in ``root`` that contain ``wav``: ``dev`` and ``test``."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; use the one that contains dev/wav and test/wav")
    folders = (path for path in root.iterdir() if not is_hidden_or_system(path.name))
    parts = sorted(path.name for path in folders if (path / "wav").is_dir())
    wavs = [root / part / "wav" for part in parts]
    if any(_SPEAKER.fullmatch(path.name) for wav in wavs for path in wav.iterdir()):
        return parts
    if parts:
        reason = f"{wavs[0]} has no speakers (id10001, …); unpack VoxCeleb1's archives there"
    elif (root / "wav").is_dir():
        reason = f"{root} contains wav directly; use its parent, {root.resolve().parent}"
    elif any(_SPEAKER.fullmatch(path.name) for path in root.iterdir()):
        reason = f"{root} contains the speakers directly; move them to {root / 'dev' / 'wav'}"
    else:
        reason = f"{root} has no dev/wav and no test/wav; unpack VoxCeleb1's archives there"
    raise DataError(reason)


def _middle(audio: PreparedAudio, samples: int) -> PreparedAudio:
    """The middle ``samples`` of an utterance, to be written."""
    excess = max(0, audio.samples - samples)
    length = audio.samples - excess
    part = audio.part._replace(offset=(audio.part.offset or 0) + excess // 2, length=length)
    return PreparedAudio(part, length, write=True)


def _split_line(split: str, path: str) -> str:
    return f"{SPLITS.index(split) + 1} {path}"


def _configure_sid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test-seconds",
        metavar="S",
        type=float,
        help="write only the middle S seconds of dev and test utterances, as WAV (default: all)",
    )
    parser.add_argument("--copy", action="store_true", help="write WAV files instead of symlinks")
    add_convert_option(parser)


def _prepare_sid(args: argparse.Namespace) -> None:
    """Write a manifest's utterances in VoxCeleb1's layout, with the split as VIDEO.

    ``OUT/audio/all/wav/id10001/train/00001.wav`` is a symlink to the audio, which may have any
    format: readers use its header and not the suffix. ``prepared.tsv`` has the paths and lengths.
    """
    seconds = args.test_seconds
    if seconds is not None and not MIN_SAMPLES <= seconds * SAMPLE_RATE < math.inf:
        raise DataError(
            f"--test-seconds must be finite and {MIN_SAMPLES / SAMPLE_RATE:g} or more, "
            f"got {seconds:g}"
        )
    manifest = manifest_of(args, ("path", "speaker", "split"))
    entries = manifest.entries
    speakers = [speaker_of(entry) for entry in entries]
    splits = [entry.split for entry in entries]
    check_speakers(list(zip(speakers, splits, strict=True)), manifest.source)
    parts = read_audio_parts(args, manifest, entries)
    if seconds is not None:
        limit = round(seconds * SAMPLE_RATE)
        parts = [
            audio if split == "train" else _middle(audio, limit)
            for split, audio in zip(splits, parts, strict=True)
        ]
    names = sorted(set(speakers))
    ids = {speaker: f"id{FIRST_ID + index}" for index, speaker in enumerate(names)}
    counts = {(speaker, split): 0 for speaker in names for split in SPLITS}
    lines, prepared, written = [], ["id\tpath\tspeaker\tsplit\tsamples"], 0
    with new_folder(args.out, replace=args.replace) as folder:
        for entry, speaker, audio in placing(list(zip(entries, speakers, parts, strict=True))):
            split = entry.split
            counts[speaker, split] += 1
            name = f"{ids[speaker]}/{split}/{counts[speaker, split]:05d}.wav"
            target = folder / AUDIO / "all" / "wav" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written += replace(audio, write=audio.write or args.copy).place(target)
            lines.append(_split_line(split, name))
            prepared.append(f"{name}\t{entry.name}\t{speaker}\t{split}\t{audio.samples}")
        write_lines(folder / SPLIT_FILE, lines)
        write_lines(folder / PREPARED, prepared)
        table = ["\t".join(["id", "class", "speaker", *SPLITS])]
        for index, name in enumerate(names):
            row = [ids[name], str(index), name, *(str(counts[name, split]) for split in SPLITS)]
            table.append("\t".join(row))
        write_lines(folder / "speakers.tsv", table)
    _print_summary(args.out, splits, [audio.samples for audio in parts], len(names))
    if written:
        print(f"{written} files written, not linked")


def _prepare_voxceleb1(args: argparse.Namespace) -> None:
    lines = read_split_file(args.split_file)
    entries, missing = find_files(args.root, lines)
    missing_list = args.out.with_name(f"{args.out.resolve().name}-missing.txt")
    missing_list.unlink(missing_ok=True)  # an earlier list would mislead
    if missing:
        make_folder(missing_list.parent)
        write_text(missing_list, "".join(f"{path}\n" for path in missing))
        raise DataError(
            f"{args.root} lacks {len(missing)} of the {len(lines)} files of {args.split_file}: "
            f"{', '.join(missing[:3])}{', …' * (len(missing) > 3)}; full list: {missing_list}"
        )
    paths, locations = [e.path for e in entries], [e.location for e in entries]
    samples = audio_lengths(args.root, paths, args.jobs, locations)
    with new_folder(args.out, replace=args.replace) as folder:
        link_folder(args.root, folder / AUDIO)
        write_lines(folder / SPLIT_FILE, [_split_line(line.split, line.path) for line in lines])
        rows = [f"{line.path}\t{entry.path}" for line, entry in zip(lines, entries, strict=True)]
        write_lines(folder / PREPARED, ["id\tpath", *rows])
    splits = [line.split for line in lines]
    _print_summary(args.out, splits, samples, len({line.path[:7] for line in lines}))


def _print_summary(out: Path, splits: Sequence[str], samples: Sequence[int], speakers: int) -> None:
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    for split, length in zip(splits, samples, strict=True):
        lengths[split].append(length)
    print_splits(lengths)
    print(f"{speakers} speakers: chance accuracy {100 / speakers:.1f} %")
    print(f"wrote {out}; in the YAML: file_path: {out / AUDIO}")
    print(f"               meta_data: {out / SPLIT_FILE}")


SID = PrepareTask(
    "VoxCeleb1's layout from a manifest, for -d voxceleb1",
    SID_DESCRIPTION,
    _prepare_sid,
    _configure_sid,
)
VOXCELEB1 = PrepareTask(
    "check VoxCeleb1 against its split file, for -d voxceleb1",
    VOXCELEB1_DESCRIPTION,
    _prepare_voxceleb1,
    inputs=(("root", "ROOT"), ("split_file", "SPLIT_FILE")),
)
