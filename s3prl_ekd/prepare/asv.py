"""``prepare asv`` and ``prepare voxceleb1_asv``: VoxCeleb1's layout and trials for ASV.

s3prl trains on all recordings ``ROOT/dev/wav/SPEAKER/VIDEO/UTTERANCE.wav`` that are long enough
after silence is removed, and tests on a list of trials: lines of ``LABEL RECORDING RECORDING``,
with label 1 for one speaker and 0 for two, and recordings below ``ROOT/test/wav``. ``prepared.tsv``
has the lengths without silence, which s3prl would compute by decoding the corpus.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..data.audio_files import SAMPLE_RATE, is_audio, is_hidden_or_system, total_hours
from ..data.manifest import MAX_LIST
from ..errors import DataError, EkdError
from ..files.text import read_text
from ..system.seeds import seed_number
from .common import (
    PREPARED,
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
from .sid import FIRST_ID, check_voxceleb1

# In the folder of the YAML key `file_path`, and the file for `test_meta_data`.
TRAIN, TEST, TRIALS = "dev/wav", "test/wav", "trials.txt"
# What the recipe does with 16 kHz mono: s3prl/downstream/sv_voxceleb1/dataset.py
EFFECTS = (("gain", "-3.0"), ("silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"))
# Without silence. 16 frames of 20 ms: XVector uses 14 as context, and a standard deviation needs 2.
MIN_SAMPLES = 5200
MAX_PAIRS = 1000  # of recordings of one speaker
_COLUMNS = ("id", "path", "speaker", "split", "samples", "trimmed", "bytes")

ASV_DESCRIPTION = """\
Write a corpus in VoxCeleb1's layout for `run_downstream.py -d sv_voxceleb1`: OUT/dev/wav (training)
and OUT/test/wav with symlinks to the audio, OUT/trials.txt and OUT/prepared.tsv.

Needs the columns path, speaker and split. Speakers of test must not be in train; lines of the split
dev are not used. The trials are all pairs of recordings of a test speaker (1,000 at most), and for
each of these its first recording with one of another speaker. --trials names them instead: lines of
`1 PATH PATH` (one speaker) and `0 PATH PATH` (two), with paths as in the manifest.
"""
VOXCELEB1_DESCRIPTION = """\
Check VoxCeleb1 for `run_downstream.py -d sv_voxceleb1`: ROOT contains dev/wav and test/wav; TRIALS
is the list that VoxCeleb's authors publish (veri_test2.txt, in s3prl voxceleb1_test_v2.txt). Writes
OUT/dev and OUT/test, symlinks to the folders, OUT/trials.txt and OUT/prepared.tsv, for which all
audio is decoded once.
"""


class Trial(NamedTuple):
    """A pair of recordings, and whether the speaker is the same."""

    label: str  # 1 or 0
    first: str
    second: str


def read_trials(path: Path, error: type[EkdError], *, any_path: bool = False) -> list[Trial]:
    """Read a list of trials.

    Args:
        any_path: recordings need not be ``SPEAKER/VIDEO/UTTERANCE``. Tabs may separate the fields.

    Raises:
        EkdError: of class ``error``: a line is invalid, or a label is missing.
    """
    trials = []
    text = read_text(path, "list of trials", error, MAX_LIST, "utf-8-sig")
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t") if any_path and "\t" in line else line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise error(
                f"{path}: line {number}: expected '1 RECORDING RECORDING' (one speaker) or 0 "
                f"(two), got {line[:60]!r}"
            )
        for name in fields[1:]:
            if not any_path and not _is_recording(name):
                raise error(
                    f"{path}: line {number}: expected SPEAKER/VIDEO/UTTERANCE.wav, without - in "
                    f"SPEAKER, got {name[:60]!r}"
                )
        trials.append(Trial(*fields))
    for label in ("1", "0"):
        if not any(trial.label == label for trial in trials):
            raise error(f"{path} has no trial with label {label}; the error rate needs 1 and 0")
    return trials


def _is_recording(name: str) -> bool:
    """Whether s3prl's name of a recording, ``SPEAKER-VIDEO-UTTERANCE`` up to a dot, tells its
    speaker."""
    parts = name.split("/")
    if len(parts) != 3 or {"", ".", ".."} & {*parts}:
        return False
    speaker, video, _ = parts
    return "-" not in speaker and "." not in speaker + video


def find_recordings(root: Path) -> list[str]:
    """The audio files ``SPEAKER/VIDEO/UTTERANCE`` below a folder, sorted."""
    return sorted(
        f"{speaker}/{video}/{name}"
        for speaker in subfolders(root)
        for video in subfolders(root / speaker)
        for name in os.listdir(root / speaker / video)
        if is_audio(name) and not is_hidden_or_system(name)
    )


def subfolders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted: speakers, or the videos of one."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_hidden_or_system(e.name))


def trimmed_samples(path: Path) -> int:
    """The length of a recording at 16 kHz mono without silence, in samples."""
    from ..compat.sox import apply_effects_tensor
    from ..data.audio import read_audio  # torch; not for prepare --help

    wave, _ = apply_effects_tensor(read_audio(path)[None], SAMPLE_RATE, EFFECTS)
    return int(wave.shape[1])


def measure_trimmed(paths: Sequence[Path], jobs: int) -> list[int]:
    """The lengths of recordings without silence, with a progress bar."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        bar = tqdm(desc="silence", unit=" files", total=len(paths), delay=1.0, dynamic_ncols=True)
        with bar:
            lengths = []
            for length in pool.map(trimmed_samples, paths):
                lengths.append(length)
                bar.update()
    return lengths


def read_lengths(root: Path, error: type[EkdError]) -> dict[str, tuple[int, int]] | None:
    """Bytes and samples without silence of the recordings for training.

    Args:
        root: the folder of ``file_path``.

    Returns:
        ``{SPEAKER/VIDEO/UTTERANCE: (bytes, samples)}``; None if `prepare` did not write the folder.

    Raises:
        EkdError: of class ``error``: the table is damaged.
    """
    path = root / PREPARED
    if not path.is_file():
        return None
    lines = read_text(path, "table", error, MAX_LIST).split("\n")
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"id", "trimmed", "bytes"} <= {*(rows.fieldnames or ())}:
        return None
    lengths = {}
    try:
        for row in rows:
            if row["id"].startswith(f"{TRAIN}/"):
                name = row["id"].removeprefix(f"{TRAIN}/")
                lengths[name] = (int(row["bytes"]), int(row["trimmed"]))
    except (TypeError, ValueError, AttributeError):
        raise error(f"{path} is damaged at line {rows.line_num}; run `prepare` again") from None
    return lengths


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trials", metavar="FILE", type=Path, help="the trials (default: all pairs)"
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed of the pairs (default: 0)"
    )
    add_convert_option(parser)


def _prepare_asv(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "speaker", "split"))
    entries = [entry for entry in manifest.entries if entry.split != "dev"]
    check_speakers([(speaker_of(entry), entry.split) for entry in entries], manifest.source)
    tests = [entry for entry in entries if entry.split == "test"]
    if args.trials:
        trials = read_trials(args.trials, DataError, any_path=True)
        _check_named(args.trials, trials, [entry.name for entry in tests])
    else:
        trials = make_trials([(entry.name, speaker_of(entry)) for entry in tests], args.seed)
        if not trials:
            raise DataError(f"{manifest.source}: no test speaker has two recordings for a trial")
    parts = read_audio_parts(args, manifest, entries)
    speakers = sorted({speaker_of(entry) for entry in entries})
    ids = {speaker: f"id{FIRST_ID + index}" for index, speaker in enumerate(speakers)}
    names: dict[str, str] = {}
    with new_folder(args.out, replace=args.replace) as folder:
        counts = dict.fromkeys(speakers, 0)
        for entry, audio in placing(list(zip(entries, parts, strict=True))):
            speaker = speaker_of(entry)
            counts[speaker] += 1
            names[entry.name] = f"{ids[speaker]}/{entry.split}/{counts[speaker]:05d}.wav"
            audio.place(folder / _id(entry.split, names[entry.name]))
        rows = [(entry.split, names[entry.name]) for entry in entries]
        trimmed = measure_trimmed([folder / _id(*row) for row in rows], args.jobs)
        for entry, length in zip(entries, trimmed, strict=True):
            if entry.split == "test":
                check_trimmed(f"{entry.location}: {entry.name}", length)
        write_lines(
            folder / TRIALS, (f"{t.label} {names[t.first]} {names[t.second]}" for t in trials)
        )
        cells = [
            (_id(*row), entry.name, speaker_of(entry), entry.split, audio.samples, length)
            for row, entry, audio, length in zip(rows, entries, parts, trimmed, strict=True)
        ]
        _write_table(folder, cells)
    left_out = len(manifest.entries) - len(entries)
    if left_out:
        print(f"dev: {left_out} utterances left out; ASV has no dev set")
    _print_summary(args.out, cells, trials)


def check_speakers(utterances: Sequence[tuple[str, str]], source: str) -> None:
    """Check that ``(speaker, split)`` pairs have speakers for training, and others for the test."""
    sets = {name: {s for s, split in utterances if split == name} for name in ("train", "test")}
    for split, speakers in sets.items():
        if len(speakers) < 2:
            raise DataError(f"{source} has {len(speakers)} {split} speaker(s); ASV needs 2 or more")
    both = sorted(sets["train"] & sets["test"])
    if both:
        raise DataError(
            f"{source}: the speaker {both[0]} is in train and test; ASV tests speakers that are "
            "not in train"
        )


def _check_named(source: Path, trials: Iterable[Trial], names: Iterable[str]) -> None:
    known = {*names}
    for number, trial in enumerate(trials, start=1):
        for name in trial[1:]:
            if name not in known:
                raise DataError(
                    f"{source}: line {number}: {name[:80]!r} is not the path of a test utterance "
                    "in the manifest"
                )


def make_trials(recordings: Sequence[tuple[str, str]], seed: int) -> list[Trial]:
    """Pair recordings ``(name, speaker)``.

    All pairs of a speaker, or :data:`MAX_PAIRS` random ones; after each, its first recording with a
    random one of another speaker, so that each speaker has as many trials of both kinds.
    """
    rng = random.Random(f"trials {seed}")
    of_speaker: dict[str, list[str]] = {}
    for name, speaker in recordings:
        of_speaker.setdefault(speaker, []).append(name)
    trials = []
    for speaker, own in of_speaker.items():
        pairs = list(itertools.combinations(own, 2))
        if len(pairs) > MAX_PAIRS:
            pairs = sorted(rng.sample(pairs, MAX_PAIRS))
        others = [name for name, other in recordings if other != speaker]
        for first, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            unused: list[str] = []
            for _, second in group:
                unused = unused or rng.sample(others, len(others))
                trials += [Trial("1", first, second), Trial("0", first, unused.pop())]
    return trials


def check_trimmed(name: str, samples: int) -> None:
    """Raise DataError if a recording is too short for XVector."""
    if samples < MIN_SAMPLES:
        raise DataError(
            f"{name} has {samples} samples without silence; a recording of the test needs "
            f"{MIN_SAMPLES} ({MIN_SAMPLES / SAMPLE_RATE:g} s)"
        )


def _id(split: str, name: str) -> str:
    return f"{TRAIN if split == 'train' else TEST}/{name}"


def _write_table(folder: Path, cells: Iterable[Sequence[object]]) -> None:
    rows = ["\t".join(_COLUMNS)]
    for row in cells:
        size = (folder / str(row[0])).stat().st_size
        rows.append("\t".join(map(str, (*row, size))))
    write_lines(folder / PREPARED, rows)


def _prepare_voxceleb1(args: argparse.Namespace) -> None:
    check_voxceleb1(args.root)
    for name in (TRAIN, TEST):
        if not (args.root / name).is_dir():
            raise DataError(f"{args.root} has no {name}; unpack VoxCeleb1's archives there")
    trials = read_trials(args.trials, DataError)
    tests = sorted({name for trial in trials for name in trial[1:]})
    ids = [f"{TRAIN}/{name}" for name in find_recordings(args.root / TRAIN)]
    ids += [f"{TEST}/{name}" for name in tests]
    rows = [(name.split("/")[2], "train" if name.startswith(TRAIN) else "test") for name in ids]
    check_speakers(rows, str(args.root))
    locations = [str(args.trials) if name.startswith(TEST) else "" for name in ids]
    lengths = audio_lengths(args.root, ids, args.jobs, locations)
    trimmed = measure_trimmed([args.root / name for name in ids], args.jobs)
    for name, length in zip(ids, trimmed, strict=True):
        if name.startswith(TEST):
            check_trimmed(f"{args.root / name}", length)
    cells = [
        (name, name, *row, length, short)
        for name, row, length, short in zip(ids, rows, lengths, trimmed, strict=True)
    ]
    with new_folder(args.out, replace=args.replace) as folder:
        for name in (TRAIN, TEST):
            part = Path(name).parts[0]
            link_folder(args.root / part, folder / part)
        write_lines(folder / TRIALS, (" ".join(trial) for trial in trials))
        _write_table(folder, cells)
    _print_summary(args.out, cells, trials)


def _print_summary(out: Path, cells: Iterable[Sequence], trials: Sequence[Trial]) -> None:
    lengths: dict[str, list[int]] = {"train": [], "test": []}
    trimmed: dict[str, list[int]] = {"train": [], "test": []}
    for _, _, _, split, samples, length in cells:
        lengths[split].append(samples)
        trimmed[split].append(length)
    print_splits(lengths)
    print(", ".join(f"{k}: {total_hours(v):.2f} h" for k, v in trimmed.items()), "without silence")
    same = sum(trial.label == "1" for trial in trials)
    print(f"{len(trials)} trials, {same} of one speaker")
    print(f"wrote {out}; in the YAML: file_path: {out}")
    print(f"               test_meta_data and dev_meta_data: {out / TRIALS}")


ASV = PrepareTask(
    "VoxCeleb1's layout and trials from a manifest, for -d sv_voxceleb1",
    ASV_DESCRIPTION,
    _prepare_asv,
    _configure,
)
VOXCELEB1_ASV = PrepareTask(
    "check VoxCeleb1 and a list of trials, for -d sv_voxceleb1",
    VOXCELEB1_DESCRIPTION,
    _prepare_voxceleb1,
    inputs=(("root", "ROOT"), ("trials", "TRIALS")),
)
