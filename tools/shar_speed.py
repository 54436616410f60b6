"""Compare how fast one worker reads Shar folders and the same audio as files.

Writes noise as FLAC files and, with lhotse, as shards of 1,000 cuts. One worker then reads batches
of both, in turns, so that other load affects both: in `cold` turns, the files' pages are removed
from the page cache before (which other layers of a virtual disk may still have), in `warm` turns
they are in it. Also measured: how fast a resumed run skips batches of a Shar folder.

Prints audio seconds a second: the median over turns, and the median of the turns' ratios with its
quartiles.

example:
  python tools/shar_speed.py --utterances 4000 --turns 9
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from s3prl_ekd.data.audio_files import SAMPLE_RATE
from s3prl_ekd.data.batches import train_loader
from s3prl_ekd.data.lengths import write_table
from s3prl_ekd.data.settings import DataSettings
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.data.throughput import seconds_of

SECONDS = (4.0, 16.0)  # shortest and longest utterance
BATCH = 24
SHARD = 1000  # cuts
FILES, SHARDS, SKIPPED = "files", "shards", "shards, skipped"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="for the audio (default: a temporary folder)")
    parser.add_argument("--utterances", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=40, help="that a turn reads")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_corpus(Path(folder), args.utterances)
        print(f"{args.utterances} utterances, {BATCH} in a batch, {args.batches} batches a turn")
        for name, cold in (("cold", True), ("warm", False)):
            rates: dict[str, list[float]] = {FILES: [], SHARDS: [], SKIPPED: []}
            for turn in range(args.turns + 1):
                for kind, values in rates.items():
                    rate = measure(Path(folder), kind, args.batches, cold, seed=turn)
                    if turn:  # the first one warms up
                        values.append(rate)
            report(name, rates)


def write_corpus(folder: Path, count: int) -> None:
    """Write ``audio/``, its table ``files.csv`` and the Shar folder ``shards``."""
    from lhotse import CutSet, Recording

    rng, rows, cuts = np.random.default_rng(0), [], []
    (folder / "audio").mkdir()
    for i in range(count):
        samples = round(rng.uniform(*SECONDS) * SAMPLE_RATE)
        noise = np.convolve(rng.standard_normal(samples), np.hanning(8), "same")
        path = folder / f"audio/{i:05d}.flac"
        soundfile.write(path, 0.05 * noise, SAMPLE_RATE)  # about as compressible as speech
        rows.append(Utterance(path.name, samples))
        cuts.append(Recording.from_file(path, recording_id=f"{i:05d}").to_cut())
    write_table(folder / "files.csv", rows)
    (folder / SHARDS).mkdir()
    size = min(SHARD, max(1, count // 4))
    # the bytes of the files, as they are
    CutSet.from_cuts(cuts).to_shar(folder / SHARDS, {"recording": "original"}, shard_size=size)


def measure(folder: Path, kind: str, batches: int, cold: bool, seed: int) -> float:
    """Audio seconds a second of one worker, after its first batch."""
    if cold:
        for path in folder.rglob("*.*"):
            drop_pages(path)
    name = FILES if kind == FILES else SHARDS
    data = DataSettings(
        str(folder / "audio"), str(folder), (name,), BATCH, num_workers=1, shar_streams=1
    )
    loader = train_loader(data, data.sets, min_samples=400, seed=seed)
    if kind == SKIPPED:
        batches = min(batches, len(loader) - 1)
        read = iter(loader.dataset._batches(0, 0))
        next(read)
        start = time.perf_counter()
        audio = sum(sum(cut.duration for cut in next(read)) for _ in range(batches))
        return audio / (time.perf_counter() - start)
    audio, start = 0.0, 0.0
    for number, batch in zip(range(batches + 1), loader, strict=False):
        assert not batch.problem, batch.problem
        if number:
            audio += seconds_of(batch)
        else:
            start = time.perf_counter()
    elapsed = time.perf_counter() - start
    loader.close()
    return audio / elapsed


def drop_pages(path: Path) -> None:
    """Remove the pages of a file from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise") and path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(name: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{name}: audio seconds a second, median of {len(rates[FILES])} turns")
    for kind, values in rates.items():
        line = f"{kind:16} {statistics.median(values):10,.0f}"
        if kind != FILES:
            ratios = [a / b for a, b in zip(values, rates[FILES], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            line += "   {1:.2f} times the files' rate, quartiles {0:.2f} to {2:.2f}".format(
                *quartiles
            )
        print(line)


if __name__ == "__main__":
    main()
