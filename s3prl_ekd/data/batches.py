"""Batches of waveforms of like length, as s3prl buckets them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .audio import SAMPLE_RATE, read_audio
from .distortion.plan import generator
from .distortion.settings import DistortionSettings
from .order import EpochOrder
from .tables import Utterance, read_tables

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """``waves`` ``[batch, sample]`` at 16 kHz, zero-padded; ``lengths`` ``[batch]`` in samples;
    ``names`` the utterances' paths; ``problem`` the sentence of a file that could not be read (the
    other fields are then empty); ``teacher_waves`` what the teachers hear, of the shape of
    ``waves``, or None where they hear the same as the student.

    A worker process hands its problem over as data: an exception would come back as a traceback.
    """

    waves: Tensor
    lengths: Tensor
    names: list[str]
    problem: str = ""
    teacher_waves: Tensor | None = None


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
        distortion: what is done to the waveforms; None or its setup ``clean`` does nothing.
        seed: of the excerpts and the distortions. Both follow from seed, epoch and utterance alone:
            torch's own numbers would depend on the worker and on what was drawn before.

    Raises:
        DataError: a folder that ``distortion`` names cannot be used.
    """

    def __init__(
        self,
        root: str | Path,
        rows: Sequence[Utterance],
        batch_size: int,
        sequence_length: int,
        min_samples: int,
        distortion: DistortionSettings | None = None,
        seed: int = 0,
    ):
        self.root = Path(root)
        self.batches = bucket(rows, batch_size)
        self.sequence_length = sequence_length
        self.min_samples = min_samples
        self.seed = seed
        self.distorter = None
        if distortion is not None and distortion.setup != "clean":
            from .distortion.pipeline import Distorter  # loads torchaudio, which no one else needs

            self.distorter = Distorter(distortion, seed, root, [row.path for row in rows])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Batch ``index`` (of epoch 0), or batch ``(epoch, index)``."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        names = [row.path for row in self.batches[index]]
        try:
            pairs = [self._utterance(name, epoch) for name in names]
        except DataError as error:
            empty = torch.zeros(0)
            return Batch(empty, empty, names, str(error))
        lengths = torch.tensor([len(wave) for wave, _ in pairs])
        waves = pad_sequence([wave for wave, _ in pairs], batch_first=True)
        if pairs[0][1] is None:  # the setup decides, so it is the same for the whole batch
            return Batch(waves, lengths, names)
        teacher_waves = pad_sequence([wave for _, wave in pairs], batch_first=True)
        return Batch(waves, lengths, names, teacher_waves=teacher_waves)

    def _utterance(self, name: str, epoch: int) -> tuple[Tensor, Tensor | None]:
        """What the student hears of an utterance, and the teacher if it hears something else."""
        wave = self._excerpt(self._read(name), name, epoch)
        return (wave, None) if self.distorter is None else self.distorter.pair(wave, name, epoch)

    def _read(self, name: str) -> Tensor:
        wave = read_audio(self.root / name)
        if len(wave) < self.min_samples:
            raise DataError(
                f"cannot use the audio file {self.root / name}: {len(wave)} samples at "
                f"{SAMPLE_RATE} Hz are too few for one frame ({self.min_samples}); remake the "
                "tables with: s3prl-ekd lengths"
            )
        return wave

    def _excerpt(self, wave: Tensor, name: str, epoch: int) -> Tensor:
        room = len(wave) - self.sequence_length
        if self.sequence_length == 0 or room <= 0:
            return wave
        start = generator(self.seed, epoch, name, "excerpt").randrange(room + 1)
        return wave[start : start + self.sequence_length]


def only_item(items: list[Batch]) -> Batch:
    """``collate_fn``: an item is a batch already."""
    return items[0]


def leave_signals_to_the_main_process(worker: int) -> None:
    """``worker_init_fn``: a worker outlives the signals that ask the run to save and leave.

    Ctrl-C in a terminal and a cluster's signals reach every process of a run. A worker that died of
    one would take the run with it before it has saved; workers end when the main process does.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
    distortion: DistortionSettings | None = None,
    seed: int = 0,
    shuffle: bool = True,
) -> DataLoader:
    """A loader of :class:`Batch` over the tables, utterances bucketed by length.

    Each pass over it is an epoch with an order, excerpts and distortions of its own. They follow
    from ``seed`` and the epoch, whatever the number of workers and whatever else draws random
    numbers; ``loader.sampler.epoch`` and ``.position`` say where the next pass begins. With
    ``shuffle`` off every pass is the same: batches from long to short, drawn as in epoch 0.

    Raises:
        DataError: a table or the audio root is missing, a row is not valid, nothing is left, or
            a folder that ``distortion`` names cannot be used.
    """
    if not Path(root).is_dir():
        raise DataError(f"the audio folder {root} (libri_root) does not exist")
    rows = within(read_tables(tables, sets), max_timestep, min_samples)
    hours = sum(row.length for row in rows) / SAMPLE_RATE / 3600
    logger.info("data: %d utterances, %.2f h, from %s", len(rows), hours, ", ".join(sets))
    dataset = DistillationDataset(
        root, rows, batch_size, sequence_length, min_samples, distortion, seed
    )
    return DataLoader(
        dataset,
        batch_size=1,
        sampler=EpochOrder(len(dataset), seed) if shuffle else range(len(dataset)),
        num_workers=num_workers,
        collate_fn=only_item,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_main_process,
        persistent_workers=num_workers > 0 and shuffle,
        # Each pass draws a seed for its workers; from torch's own generator it would shift what
        # the student's dropout draws, and a resumed run begins its passes elsewhere.
        generator=torch.Generator().manual_seed(0),
    )
