"""Batches of waveforms of like length, as s3prl buckets them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .audio import SAMPLE_RATE, read_audio
from .tables import Utterance, read_tables

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """``waves`` ``[batch, sample]`` at 16 kHz, zero-padded; ``lengths`` ``[batch]`` in samples;
    ``names`` the utterances' paths; ``problem`` the sentence of a file that could not be read (the
    other fields are then empty).

    A worker process hands its problem over as data: an exception would come back as a traceback.
    """

    waves: Tensor
    lengths: Tensor
    names: list[str]
    problem: str = ""


def bucket(rows: Sequence[Utterance], size: int) -> list[list[Utterance]]:
    """Cut rows, sorted by length, into batches of neighbours. The last one may be smaller: unlike
    s3prl, a single leftover utterance is kept."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def within(rows: Sequence[Utterance], max_timestep: int, min_samples: int) -> list[Utterance]:
    """Drop what s3prl's ``max_timestep`` excludes and what is too short for one frame; the log
    says how many of each.

    Raises:
        DataError: nothing is left.
    """
    kept = [row for row in rows if row.length >= min_samples]
    if len(kept) < len(rows):
        count = len(rows) - len(kept)
        logger.warning("data: left out %d utterances below %d samples", count, min_samples)
    before = len(kept)
    if max_timestep > 0:
        kept = [row for row in kept if row.length < max_timestep]
    elif max_timestep < 0:
        kept = [row for row in kept if row.length > -max_timestep]
    if len(kept) < before:
        logger.info(
            "data: max_timestep %d left out %d utterances", max_timestep, before - len(kept)
        )
    if not kept:
        raise DataError("no utterance is left in the corpus tables; check sets and max_timestep")
    return kept


class DistillationDataset(Dataset):
    """One item a batch: read its utterances, cut a random excerpt of each long one, pad.

    Args:
        root: the folder that the tables' paths start from.
        rows: the utterances, sorted by length.
        batch_size: utterances a batch.
        sequence_length: longest excerpt in samples; 0 takes whole utterances.
        min_samples: shorter waveforms give no frame.
    """

    def __init__(
        self,
        root: str | Path,
        rows: Sequence[Utterance],
        batch_size: int,
        sequence_length: int,
        min_samples: int,
    ):
        self.root = Path(root)
        self.batches = bucket(rows, batch_size)
        self.sequence_length = sequence_length
        self.min_samples = min_samples

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        names = [row.path for row in self.batches[index]]
        try:
            waves = [self._excerpt(self._read(name)) for name in names]
        except DataError as error:
            empty = torch.zeros(0)
            return Batch(empty, empty, names, str(error))
        lengths = torch.tensor([len(wave) for wave in waves])
        return Batch(pad_sequence(waves, batch_first=True), lengths, names)

    def _read(self, name: str) -> Tensor:
        wave = read_audio(self.root / name)
        if len(wave) < self.min_samples:
            raise DataError(
                f"cannot use the audio file {self.root / name}: {len(wave)} samples at "
                f"{SAMPLE_RATE} Hz are too few for one frame ({self.min_samples}); remake the "
                "tables with: s3prl-ekd lengths"
            )
        return wave

    def _excerpt(self, wave: Tensor) -> Tensor:
        room = len(wave) - self.sequence_length
        if self.sequence_length == 0 or room <= 0:
            return wave
        start = int(torch.randint(room + 1, ()))
        return wave[start : start + self.sequence_length]


def only_item(items: list[Batch]) -> Batch:
    """``collate_fn``: an item is a batch already."""
    return items[0]


def train_loader(
    root: str | Path,
    tables: str | Path,
    sets: Sequence[str],
    *,
    batch_size: int,
    sequence_length: int,
    max_timestep: int,
    num_workers: int,
    min_samples: int,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of :class:`Batch` over the tables, batches in random order, utterances bucketed.

    Raises:
        DataError: a table or the audio root is missing, a row is not valid, or nothing is left.
    """
    if not Path(root).is_dir():
        raise DataError(f"the audio folder {root} (libri_root) does not exist")
    rows = within(read_tables(tables, sets), max_timestep, min_samples)
    hours = sum(row.length for row in rows) / SAMPLE_RATE / 3600
    logger.info("data: %d utterances, %.2f h, from %s", len(rows), hours, ", ".join(sets))
    return DataLoader(
        DistillationDataset(root, rows, batch_size, sequence_length, min_samples),
        batch_size=1,
        shuffle=True,
        num_workers=num_workers,
        collate_fn=only_item,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
