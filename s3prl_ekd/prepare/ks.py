"""``prepare ks`` and ``prepare speech_commands``: Speech Commands' folders, for KS.

s3prl reads ``TRAIN/CLASS/SPEAKER_nohash_N.wav`` and ``TEST/CLASS/*.wav``. Ten words are classes of
their own, other folders are the class ``_unknown_``, and the recordings in ``_background_noise_``,
cut to a random second, are ``_silence_``. A file of TRAIN is for dev if a hash of its name up to
``_nohash_`` is in the first of ten parts, left out in the second, and for training otherwise, as
its authors have it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from ..data.audio_files import SAMPLE_RATE, AudioPart, find_audio
from ..data.lengths import measure_audio
from ..data.manifest import SPLITS
from ..errors import DataError
from .common import (
    PREPARED,
    PreparedAudio,
    PrepareTask,
    add_convert_option,
    link_folder,
    manifest_of,
    new_folder,
    placing,
    print_splits,
    read_audio_parts,
    write_lines,
)

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE, NOISE = "_unknown_", "_silence_", "_background_noise_"
TRAIN, TEST = "train", "test"  # in the output folder, for the recipe's two keys
_MOST = 2**27 - 1  # of the hash

KS_DESCRIPTION = """\
Write a corpus in Speech Commands' layout for `run_downstream.py -d speech_commands`: OUT/train,
OUT/test with symlinks to the audio, and OUT/prepared.tsv.

Needs the columns path, split and word. The words yes no up down left right on off stop go are
classes, all others are _unknown_. --noise is a folder of recordings of a second or more: a random
second of one is the class _silence_.
"""
SPEECH_COMMANDS_DESCRIPTION = """\
Check Speech Commands v0.01 for `run_downstream.py -d speech_commands`: TRAIN is the unpacked
speech_commands_v0.01, TEST the unpacked speech_commands_test_set_v0.01. Writes OUT/train and
OUT/test, symlinks to them.
"""


def split_of(name: str) -> str:
    """The split of a file of TRAIN by its name: ``train``, ``dev`` or, left out, ``test``."""
    digest = hashlib.sha1(name.partition("_nohash_")[0].encode("utf-8")).hexdigest()
    share = int(digest, 16) % (_MOST + 1) * (100.0 / _MOST)
    return "dev" if share < 10 else "test" if share < 20 else "train"


def count_recordings(train: Path, test: Path) -> dict[str, int]:
    """Count the recordings that s3prl reads: of train, dev and test, and of noise for training.

    Raises:
        DataError: s3prl cannot use the folders.
    """
    counts = {"train": 0, "dev": 0, "test": 0, NOISE: 0}
    noises = []
    for path in _wavs(train):
        if path.parent.name == NOISE:
            noises.append(AudioPart(path))
        elif (split := split_of(path.name)) != "test":
            counts[split] += 1
    for split in ("train", "dev"):
        if not counts[split]:
            raise DataError(f"{train} has no CLASS/*.wav for {split}; use the unpacked corpus")
    allowed = {*WORDS, UNKNOWN, SILENCE}
    for path in _wavs(test):
        if path.parent.name not in allowed:
            raise DataError(
                f"{test} has a class {path.parent.name}; allowed: {', '.join(sorted(allowed))}"
            )
        counts["test"] += 1
    if not counts["test"]:
        raise DataError(f"{test} has no CLASS/*.wav; use the unpacked test set")
    for part, audio in zip(noises, measure_audio(".", noises), strict=True):
        if isinstance(audio, DataError):
            raise audio
        if audio.samples < SAMPLE_RATE:
            raise DataError(
                f"{part} has {audio.samples} samples; a noise needs a second ({SAMPLE_RATE})"
            )
    counts[NOISE] = len(noises)
    return counts


def _wavs(root: Path) -> Iterator[Path]:
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        yield from folder.glob("*.wav")


def _name_in_split(stem: str, split: str) -> str:
    """A file name that s3prl assigns to ``split``."""
    for number in itertools.count():
        name = f"{stem}-{number}_nohash_0.wav"
        if split_of(name) == split:
            return name
    raise AssertionError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--noise",
        metavar="DIR",
        type=Path,
        required=True,
        help="recordings of the class _silence_, a second or more each",
    )
    add_convert_option(parser)


def _prepare_ks(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "split", "word"))
    parts = read_audio_parts(args, manifest, manifest.entries)
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    prepared = ["id\tpath\tword\tsplit\tsamples"]
    with new_folder(args.out, replace=args.replace) as folder:
        for entry, audio in placing(list(zip(manifest.entries, parts, strict=True))):
            word = entry.cells["word"]
            if not word or word in (".", "..") or "/" in word or "\0" in word or len(word) > 80:
                raise DataError(f"{entry.location}: word must be a word, got {word!r:.40}")
            label = word if word in WORDS else UNKNOWN
            number = f"{len(prepared):06d}"
            if entry.split == "test":
                name = f"{TEST}/{label}/{number}.wav"
            else:  # any folder that is not one of the words is _unknown_
                name = f"{TRAIN}/{label}/{_name_in_split(number, entry.split)}"
            audio.place(folder / name)
            lengths[entry.split].append(audio.samples)
            prepared.append(f"{name}\t{entry.name}\t{word}\t{entry.split}\t{audio.samples}")
        _link_noise(args.noise, folder / TRAIN / NOISE)
        try:
            count_recordings(folder / TRAIN, folder / TEST)
        except DataError as error:  # which names the temporary folder
            problem = str(error).replace(str(folder), str(args.out))
            raise DataError(f"{manifest.source}: {problem}") from None
        write_lines(folder / PREPARED, prepared)
    print_splits(lengths)
    _print_keys(args.out)


def _link_noise(source: Path, target: Path) -> None:
    names = find_audio(source)
    if not names:
        raise DataError(f"--noise {source} has no audio")
    for number, name in enumerate(names):
        PreparedAudio(AudioPart(source / name), 0).place(target / f"{number:04d}.wav")


def _prepare_speech_commands(args: argparse.Namespace) -> None:
    for path in (args.train, args.test):
        if not path.is_dir():
            raise DataError(f"{path} is not a folder; unpack the archive of Speech Commands there")
    if not (args.train / NOISE).is_dir():
        raise DataError(f"{args.train} has no {NOISE}; use the unpacked corpus")
    counts = count_recordings(args.train, args.test)
    del counts[NOISE]
    with new_folder(args.out, replace=args.replace) as folder:
        link_folder(args.train, folder / TRAIN)
        link_folder(args.test, folder / TEST)
        write_lines(folder / PREPARED, ["split\tfiles", *(f"{k}\t{n}" for k, n in counts.items())])
    print(", ".join(f"{name}: {count} files" for name, count in counts.items()))
    _print_keys(args.out)


def _print_keys(out: Path) -> None:
    print(f"wrote {out}; in the YAML: speech_commands_root: {out / TRAIN}")
    print(f"               speech_commands_test_root: {out / TEST}")


KS = PrepareTask(
    "Speech Commands' layout from a manifest, for -d speech_commands",
    KS_DESCRIPTION,
    _prepare_ks,
    _configure,
)
SPEECH_COMMANDS = PrepareTask(
    "check Speech Commands v0.01, for -d speech_commands",
    SPEECH_COMMANDS_DESCRIPTION,
    _prepare_speech_commands,
    inputs=(("train", "TRAIN"), ("test", "TEST")),
)
