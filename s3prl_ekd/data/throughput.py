"""Measure how many audio seconds a second the training data delivers on this machine."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import DataError
from .audio_files import SAMPLE_RATE
from .audio_writer import write_audio
from .batch import Batch
from .lengths import write_table
from .loader import BatchLoader
from .settings import DataSettings
from .tables import Utterance

SECONDS = 10.0  # of a measurement
NOISE_FILES = 48  # of 4 to 15.75 s


def write_noise(folder: Path) -> DataSettings:
    """Write a small corpus of noise, as compressible as speech; return settings that read it."""
    rng, rows = np.random.default_rng(0), []
    for i in range(NOISE_FILES):
        samples = (4 + i / 4) * SAMPLE_RATE
        noise = np.convolve(rng.standard_normal(int(samples)), np.hanning(8), "same")
        syllables = np.abs(np.sin(2 * np.pi * 2 * np.arange(len(noise)) / SAMPLE_RATE))
        write_audio(folder / f"{i}.flac", 0.05 * noise * syllables)
        rows.append(Utterance(f"{i}.flac", len(noise)))
    write_table(folder / "noise.csv", rows)
    return DataSettings(str(folder), str(folder), ("noise",), train_batch_size=8)


def measure_throughput(loader: BatchLoader) -> dict[str, float]:
    """Measure audio seconds a second, with a progress bar of :data:`SECONDS`.

    Args:
        loader: of training data, with one worker; it is not closed.

    Returns:
        ``worker``: delivered by the worker; ``targets``, if there is a target cache: whose targets
        the process that trains can read.

    Raises:
        DataError: no utterance can be used, or one cannot and ``on_bad_audio`` is ``error``.
    """
    kept: deque[Batch] = deque(maxlen=4)
    audio, unusable, start = 0.0, 0, None
    with tqdm(total=SECONDS, unit="s", desc="measuring", bar_format="{l_bar}{bar}") as bar:
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            if batch.problem:
                raise DataError(batch.problem)
            unusable = 0 if batch.names else unusable + 1
            if unusable > len(loader):
                raise DataError("no utterance of the tables can be used; check libri_root")
            if start is None:  # the first batch includes the start of the worker
                start = time.perf_counter()
                continue
            kept.append(batch)
            audio += seconds_of(batch)
            elapsed = time.perf_counter() - start
            bar.update(min(elapsed, SECONDS) - bar.n)
            if elapsed >= SECONDS:
                break
    rates = {"worker": audio / elapsed}
    cached = [batch for batch in kept if batch.targets is not None]
    if cached:
        start = time.perf_counter()
        for batch in cached:
            assert batch.targets is not None
            batch.targets.tensors()
        rates["targets"] = sum(map(seconds_of, cached)) / (time.perf_counter() - start)
    return rates


def seconds_of(batch: Batch) -> float:
    """Audio of a batch in seconds, without padding."""
    return float(batch.lengths.sum()) / SAMPLE_RATE


def workers_needed(rate: float, worker: float) -> int:
    """Workers that deliver ``rate`` audio seconds a second, if one delivers ``worker``."""
    return math.ceil(rate / worker)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
