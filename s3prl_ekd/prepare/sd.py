"""``prepare sd`` and ``prepare libri2mix``: Kaldi folders of two-speaker mixtures, for SD.

``sd`` mixes utterances as Libri2Mix does in its mode max: two speakers begin together, at levels
that differ by up to 8 dB, and the longer utterance goes on alone.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.audio_files import SAMPLE_RATE
from ..data.audio_writer import write_audio
from ..data.diarization_folder import (
    SpokenRecording,
    check_audio,
    check_reference,
    read_folder,
    write_folder,
)
from ..data.manifest import MAX_LIST, SPLITS, ManifestEntry
from ..data.manifest.phones import SILENCE, parse_segments
from ..data.rttm import SpeakerTurns, read_rttm
from ..errors import DataError
from ..files.text import read_text
from ..system.seeds import seed_number
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

MIXTURES = "wav"  # in the output folder
SPEAKERS = 2
LONGEST = 20 * SAMPLE_RATE  # samples of a mixture: a chunk of SUPERB's recipe at 10 ms a frame
LEVELS = (-33.0, -25.0)  # dB of the speech of a source below full scale; the range of Libri2Mix
PEAK = 0.9

# Speech by energy, in frames of 10 ms with windows of 25 ms
HOP, WINDOW = 160, 400
RANGE = 30.0  # dB below the loud frames (the 95th percentile)
SHORTEST_PAUSE, SHORTEST_SPEECH = 30, 10  # frames

# Libri2Mix: its subsets' names in wav16k/max, and in the folder of LibriSpeech's RTTM files
SUBSETS = {
    "train": ("train-100", "train_clean_100"),
    "dev": ("dev", "dev_clean"),
    "test": ("test", "test_clean"),
}

COLUMNS = ("mixture_ID", "mixture_path", "length")  # of its tables

SD_DESCRIPTION = """\
Mix utterances of two speakers for `run_downstream.py -d diarization`: OUT/wav, Kaldi folders
OUT/train, OUT/dev and OUT/test, and OUT/prepared.tsv.

Needs the columns path, split and speaker. Each utterance is in one mixture, with one of another
speaker; those of a speaker with more than half of a split are left out in part. Speech is where
there are phones (column segments, see prepare alignments), or else where the energy is at most
30 dB below the loud parts, so the recordings must be clean.

example:
  s3prl-ekd prepare sd my_corpus/sd.tsv -o data/sd
"""
LIBRI2MIX_DESCRIPTION = """\
Write Kaldi folders OUT/train, OUT/dev and OUT/test for `run_downstream.py -d diarization` from
Libri2Mix, generated with s3prl's LibriMix (generate_librimix_sd.sh). LIBRI2MIX has the folder
wav16k/max; RTTM is metadata/LibriSpeech of that LibriMix. No audio is copied.

example:
  s3prl-ekd prepare libri2mix /data/Libri2Mix /data/LibriMix/metadata/LibriSpeech -o data/libri2mix
"""


@dataclass(frozen=True)
class Source:
    """An utterance to mix: its line in the manifest, and its audio."""

    entry: ManifestEntry
    audio: PreparedAudio

    @property
    def speaker(self) -> str:
        return self.entry.cells["speaker"]


def speech_by_energy(wave: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of speech, in samples.

    Args:
        wave: ``[sample]`` at 16 kHz.
    """
    padded = np.pad(wave.astype(np.float64), (WINDOW // 2, WINDOW))
    sums = np.cumsum(np.pad(padded**2, (1, 0)))
    starts = np.arange(0, len(wave), HOP)
    energy = 10 * np.log10((sums[starts + WINDOW] - sums[starts]) / WINDOW + 1e-12)
    speech = energy > np.percentile(energy, 95) - RANGE
    closed: list[list[int]] = []
    for begin, end in _runs(speech):
        if closed and begin - closed[-1][1] < SHORTEST_PAUSE:
            closed[-1][1] = end
        else:
            closed.append([begin, end])
    return [
        (begin * HOP, min(end * HOP, len(wave)))
        for begin, end in closed
        if end - begin >= SHORTEST_SPEECH
    ]


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(values.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def speech_by_phones(entry: ManifestEntry, samples: int) -> list[tuple[int, int]]:
    """Begin and end of speech in samples, from the column ``segments``; pauses are closed too."""
    spans: list[tuple[int, int]] = []
    for phone in parse_segments(entry):
        begin, end = phone.start, min(phone.end, samples)
        if phone.phone == SILENCE or begin >= end:
            continue
        if spans and begin - spans[-1][1] < SHORTEST_PAUSE * HOP:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((begin, end))
    return spans


def pair(sources: Sequence[Source], rng: random.Random) -> list[tuple[Source, Source]]:
    """Pair utterances of different speakers, each at most once and as many as possible."""
    queues: dict[str, list[Source]] = {}
    for source in sources:
        queues.setdefault(source.speaker, []).append(source)
    heap = []
    for speaker, own in queues.items():
        rng.shuffle(own)
        heap.append((-len(own), rng.random(), speaker))
    heapq.heapify(heap)
    pairs = []
    while len(heap) > 1:  # one from each of the two speakers with most
        drawn = [heapq.heappop(heap), heapq.heappop(heap)]
        first, second = (queues[speaker].pop() for _, _, speaker in drawn)
        pairs.append((first, second))
        for count, _, speaker in drawn:
            if count < -1:
                heapq.heappush(heap, (count + 1, rng.random(), speaker))
    rng.shuffle(pairs)
    return pairs


def mix(waves: Sequence[np.ndarray], speech: Sequence[Any], levels: Sequence[float]) -> np.ndarray:
    """Add waveforms ``[sample]`` that begin together.

    Args:
        speech: begin and end of the speech in each waveform.
        levels: of that speech, in dB below full scale.
    """
    total = np.zeros(max(map(len, waves)))
    for wave, spans, level in zip(waves, speech, levels, strict=True):
        spoken = np.concatenate([wave[begin:end] for begin, end in spans]).astype(np.float64)
        total[: len(wave)] += wave * (10 ** (level / 20) / np.sqrt(np.mean(spoken**2)))
    return total * min(1.0, PEAK / np.abs(total).max())


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        metavar="N",
        help="seed of pairs and levels (%(default)s)",
    )
    add_convert_option(parser)


def _prepare_sd(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "split", "speaker"))
    for entry in manifest.entries:
        if len(speaker_of(entry).split()) != 1:
            raise DataError(
                f"{entry.location}: speaker must be one word, got {entry.cells['speaker']!r:.60}"
            )
    parts = read_audio_parts(args, manifest, manifest.entries)
    sources = [Source(*pair) for pair in zip(manifest.entries, parts, strict=True)]
    pairs: dict[str, list[tuple[Source, Source]]] = {}
    for split in SPLITS:
        rng = random.Random(f"sd {args.seed} {split}")
        own = [source for source in sources if source.entry.split == split]
        pairs[split] = pair(own, rng)
        if not pairs[split]:
            raise DataError(
                f"{manifest.source} has no two utterances of different speakers for {split}; SD "
                f"needs {', '.join(SPLITS)}"
            )
    left_out = len(sources) - 2 * sum(map(len, pairs.values()))
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    recordings: dict[str, dict[str, SpokenRecording]] = {split: {} for split in SPLITS}
    prepared = ["id\tpaths\tspeakers\tsplit\tsamples"]
    with new_folder(args.out, replace=args.replace) as folder:
        (folder / MIXTURES).mkdir()
        items = [(split, own) for split in SPLITS for own in pairs[split]]
        for number, (split, both) in enumerate(placing(items)):
            name = f"mix{number:06d}"
            file = f"{MIXTURES}/{name}.flac"
            rng = random.Random(f"sd {args.seed} {name}")
            samples, segments = _write_mixture(folder / file, both, rng)
            path = str(args.out.resolve() / file)
            recording = SpokenRecording("", path, samples / SAMPLE_RATE, segments)
            recordings[split][name] = recording
            lengths[split].append(samples)
            paths, names = (
                " ".join(values)
                for values in zip(*((s.entry.name, s.speaker) for s in both), strict=True)
            )
            prepared.append(f"{name}\t{paths}\t{names}\t{split}\t{samples}")
        _write_folders(folder, recordings)
        write_lines(folder / PREPARED, prepared)
    print_splits(lengths)
    if left_out:
        print(f"{left_out} utterances are in no mixture, as no other speaker was left for them")
    _print_keys(args.out)


def _write_mixture(
    path: Path, pair: tuple[Source, Source], rng: random.Random
) -> tuple[int, list[tuple[str, float, float]]]:
    """Write a mixture; return its samples, and (speaker, begin, end) of its speech in seconds."""
    from ..data.audio import read_audio  # torch; not for prepare --help

    waves, speech, segments = [], [], []
    for source in pair:
        wave = read_audio(source.audio.part, speech=True)[:LONGEST].numpy()
        spans = speech_by_phones(source.entry, len(wave)) or speech_by_energy(wave)
        if not any(wave[begin:end].any() for begin, end in spans):
            raise DataError(f"{source.entry.location}: no speech of 0.1 s in the first 20 s")
        waves.append(wave)
        speech.append(spans)
        segments += [(source.speaker, b / SAMPLE_RATE, e / SAMPLE_RATE) for b, e in spans]
    mixture = mix(waves, speech, [rng.uniform(*LEVELS) for _ in pair])
    write_audio(path, mixture)
    return len(mixture), segments


def _prepare_libri2mix(args: argparse.Namespace) -> None:
    top = args.corpus / "wav16k" / "max"
    if not top.is_dir():
        raise DataError(
            f"{args.corpus} has no wav16k/max; give the Libri2Mix of generate_librimix_sd.sh"
        )
    recordings = {}
    lengths = {}
    for split, (subset, rttm) in SUBSETS.items():
        table = top / "metadata" / f"mixture_{subset}_mix_both.csv"
        folder = (top / subset / "mix_both").resolve()
        recordings[split] = _read_mixtures(table, folder, read_rttm(args.rttm / f"{rttm}.rttm"))
        check_audio(list(recordings[split].values()), jobs=args.jobs)
        lengths[split] = [round(r.seconds * SAMPLE_RATE) for r in recordings[split].values()]
    prepared = [f"{split}\t{name}" for split, own in recordings.items() for name in own]
    with new_folder(args.out, replace=args.replace) as folder:
        _write_folders(folder, recordings)
        write_lines(folder / PREPARED, ["split\tid", *prepared])
    print_splits(lengths)
    _print_keys(args.out)


def _read_mixtures(
    table: Path, folder: Path, turns: dict[str, SpeakerTurns]
) -> dict[str, SpokenRecording]:
    """Read LibriMix's table of mixtures; ``turns`` are those of LibriSpeech's utterances.

    A mixture is named ``SPEAKER-CHAPTER-NUMBER_SPEAKER-CHAPTER-NUMBER``, and an utterance in the
    RTTM file ``CHAPTER-NUMBER``.
    """
    recordings: dict[str, SpokenRecording] = {}
    text = read_text(table, "table of mixtures", DataError, MAX_LIST, "utf-8-sig")
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        location = f"{table}: line {number}"
        name, path, length = (row.get(key) or "" for key in COLUMNS)
        sources = [source.partition("-")[::2] for source in name.split("_")]
        if len(sources) != SPEAKERS or not path or not length.isdecimal():
            raise DataError(
                f"{location}: expected mixture_ID (such as 1-2-0003_4-5-0006), mixture_path and "
                "length"
            )
        file = folder / Path(path.replace("\\", "/")).name
        recording = SpokenRecording(location, str(file), int(length) / SAMPLE_RATE)
        for speaker, utterance in sources:
            own = turns.get(utterance, {}).get(speaker)
            if not own:
                raise DataError(f"{location}: the RTTM file has no {utterance} of {speaker}")
            # as float sums: their rounding decides between two frames in SUPERB's labels
            recording.segments.extend((speaker, start, start + seconds) for start, seconds in own)
        if name in recordings:
            raise DataError(f"{location}: {name} is there twice")
        recordings[name] = recording
    if not recordings:
        raise DataError(f"{table} has no mixtures")
    return recordings


def _write_folders(folder: Path, recordings: dict[str, dict[str, SpokenRecording]]) -> None:
    for split, own in recordings.items():
        write_folder(folder / split, own)
        check_reference(folder / split, read_folder(folder / split, SPEAKERS))


def _print_keys(out: Path) -> None:
    print(f"wrote {out}; in the YAML: train_dir: {out / 'train'}")
    print(f"               dev_dir: {out / 'dev'}")
    print(f"               test_dir: {out / 'test'}")


SD = PrepareTask(
    "two-speaker mixtures from a manifest, for -d diarization",
    SD_DESCRIPTION,
    _prepare_sd,
    _configure,
)
LIBRI2MIX = PrepareTask(
    "Kaldi folders from Libri2Mix, for -d diarization",
    LIBRI2MIX_DESCRIPTION,
    _prepare_libri2mix,
    inputs=(("corpus", "LIBRI2MIX"), ("rttm", "RTTM")),
)
