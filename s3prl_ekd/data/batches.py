"""Batches of waveforms of similar length, bucketed as in s3prl."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import DataError, first_line
from .audio import SAMPLE_RATE, Recording, warn_once
from .bad_audio import BadUtterance, too_short_error
from .batch import Batch, BatchDataset, TargetSource, empty_batch
from .distortion.settings import DistortionSettings
from .loader import BatchLoader, shared_memory_advice, shared_memory_usage
from .sampling import (
    EpochSampler,
    FixedOrderSampler,
    OrderedEpochSampler,
    bucket,
    filter_by_length,
    padding_share,
    used,
)
from .settings import DataSettings
from .shar.shards import shar_shards
from .tables import Utterance, read_tables

if TYPE_CHECKING:
    from ..distill.span_mask import SpanMask

logger = logging.getLogger(__name__)


class DistillationDataset(BatchDataset):
    """Batches of the utterances of tables: random excerpts of long ones, padded.

    Args:
        rows: the utterances, sorted by length.
        min_samples, seed, targets, span_mask: see :class:`.BatchDataset`.

    Raises:
        DataError: a folder named in ``distortion`` cannot be used.
    """

    def __init__(
        self,
        data: DataSettings,
        rows: Sequence[Utterance],
        min_samples: int,
        distortion: DistortionSettings | None = None,
        seed: int = 0,
        targets: TargetSource | None = None,
        span_mask: SpanMask | None = None,
    ):
        super().__init__(data, min_samples, seed, targets, span_mask)
        self.root = Path(data.libri_root)
        max_samples = round(data.max_seconds * SAMPLE_RATE)
        self.batches = bucket(rows, data.train_batch_size, max_samples, data.sequence_length)
        if distortion is not None and distortion.setup != "clean":
            from .distortion.pipeline import Distorter  # imports torchaudio

            self.distorter = Distorter(distortion, seed, self.root, rows)
            if self.distorter.voices is not None:
                self.distorter.voices.skip_bad = self.skip_bad

    @property
    def utterances(self) -> int:
        return len(self.left_out) + sum(map(len, self.batches))

    @property
    def longest(self) -> int:
        return max(used(row, self.sequence_length) for batch in self.batches for row in batch)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Read batch ``index`` of epoch 0, or batch ``(epoch, index)``."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        rows = self.batches[index]
        return self.make_batch([(row.name, partial(self._read, row, epoch)) for row in rows], epoch)

    def _read(self, row: Utterance, epoch: int) -> Tensor:
        """Read an utterance, or this epoch's excerpt of a long one; raises BadAudio."""
        part = row.part(self.root)
        with Recording(part) as recording:
            length = recording.samples
            if length < self.min_samples:
                raise too_short_error(str(part), length, self.min_samples)
            if abs(length - row.length) > 1:  # tables of other tools may round differently
                message = (
                    f"{part} has {length} samples at {SAMPLE_RATE} Hz, its table gives "
                    f"{row.length}: using the file's length"
                )
                warn_once("length", message)
            return recording.read_speech(*self.excerpt(length, row.name, epoch))


def unwrap_batch(items: list[Batch]) -> Batch:
    """Return the only item, which is already a batch; for ``collate_fn``.

    In a worker process its tensors are moved to shared memory; cached targets are not read yet.
    Sending the batch would move them, too, but if shared memory is full, the worker would only
    print an error and the run would hang.
    """
    batch = items[0]
    if get_worker_info() is None:
        return batch
    try:
        for tensor in (batch.waves, batch.lengths, batch.teacher_waves, batch.spans):
            if tensor is not None and tensor.numel():
                tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        problem = (
            f"cannot move a batch to shared memory ({first_line(error)}): {shared_memory_usage()}; "
            f"{shared_memory_advice()}"
        )
        return empty_batch(batch.names, problem=problem)
    return batch


def ignore_stop_signals(worker: int) -> None:
    """Ignore the signals that make a run save and exit; for ``worker_init_fn``.

    Ctrl-C in a terminal and a cluster's signals reach every process of a run. If they killed a
    worker, the run would fail before it saves. :class:`.loader.BatchLoader` ends the workers, and
    they also exit when the main process does.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def train_loader(
    data: DataSettings,
    sets: Sequence[str],
    *,
    min_samples: int,
    distortion: DistortionSettings | None = None,
    seed: int = 0,
    shuffle: bool = True,
    targets: TargetSource | None = None,
    span_mask: SpanMask | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """Make a loader of :class:`Batch` for the utterances of tables or Shar folders.

    Each pass is an epoch with its own order, excerpts and distortions, which depend on seed and
    epoch only. The next pass starts at ``loader.sampler.epoch`` and ``loader.sampler.position``.

    Args:
        data: the run's data settings; its ``sets`` is not used.
        sets: names of the tables or Shar folders in ``data.file_path``.
        min_samples: samples of one frame; shorter utterances are left out.
        shuffle: if False, every pass is the same: batches from long to short, with the excerpts
            and distortions of epoch 0.
        distortion, seed, targets, span_mask: see :class:`DistillationDataset`.

    Raises:
        DataError: a table or the audio root is missing, a row is invalid, no utterance is left, or
            a folder named in ``distortion`` cannot be used.
    """
    dataset: BatchDataset
    sampler: EpochSampler | FixedOrderSampler
    shards = shar_shards(data.file_path, sets)
    if shards:
        from .shar.dataset import SharDataset

        if not shuffle:
            raise DataError(
                f"{', '.join(sets)} in {data.file_path}: Shar folders have no fixed order of "
                "batches; use length tables for dev_sets"
            )
        if targets is not None:
            raise DataError(
                f"{', '.join(sets)} in {data.file_path}: a target cache needs length tables, not "
                "Shar folders; leave out pretrain_expert.datarc.target_cache"
            )
        dataset = SharDataset(data, shards, min_samples, distortion, seed, span_mask)
        sampler = OrderedEpochSampler(len(dataset), seed)
    else:
        dataset = _table_dataset(data, sets, min_samples, distortion, seed, targets, span_mask)
        count = len(dataset)
        sampler = EpochSampler(count, seed) if shuffle else FixedOrderSampler(count)
    return BatchLoader(
        dataset,
        timeout=data.loader_timeout,
        batch_size=1,
        sampler=sampler,
        num_workers=data.num_workers,
        collate_fn=unwrap_batch,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        persistent_workers=data.num_workers > 0 and shuffle,
        # Each pass draws a seed for its workers. Drawn from torch's default generator, it would
        # change the student's dropout, and a resumed run starts its passes at other steps.
        generator=torch.Generator().manual_seed(0),
    )


def _table_dataset(
    data: DataSettings,
    sets: Sequence[str],
    min_samples: int,
    distortion: DistortionSettings | None,
    seed: int,
    targets: TargetSource | None,
    span_mask: SpanMask | None,
) -> DistillationDataset:
    """The utterances of length tables, bucketed by length; see :func:`train_loader`."""
    if not Path(data.libri_root).is_dir():
        raise DataError(f"pretrain_expert.datarc.libri_root: no such folder: {data.libri_root}")
    bad_rows: list[BadUtterance] = []
    skip_bad = data.on_bad_audio == "skip"
    all_rows = read_tables(data.file_path, sets, bad_rows if skip_bad else None)
    rows = filter_by_length(all_rows, data.max_timestep, min_samples)
    hours = sum(row.length for row in rows) / SAMPLE_RATE / 3600
    logger.info("data: %d utterances, %.2f h, from %s", len(rows), hours, ", ".join(sets))
    dataset = DistillationDataset(data, rows, min_samples, distortion, seed, targets, span_mask)
    sizes = [len(batch) for batch in dataset.batches]
    logger.info(
        "data: %d batches of %d to %d utterances, %.1f %% padding",
        len(sizes),
        min(sizes),
        max(sizes),
        100 * padding_share(dataset.batches, data.sequence_length),
    )
    if skip_bad:
        dataset.left_out.extend(bad_rows)
        for row in all_rows:
            if row.length < min_samples:
                error = too_short_error(row.name, row.length, min_samples)
                dataset.left_out.append(BadUtterance(row.name, error.kind, error.reason))
    return dataset
