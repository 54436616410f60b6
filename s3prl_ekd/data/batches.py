"""Batches of waveforms of similar length, bucketed as in s3prl."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, get_worker_info

from ..distill.batch import CachedTargets
from ..errors import DataError, first_line
from .audio import SAMPLE_RATE, Recording, warn_once
from .bad_audio import BAD_AUDIO_ADVICE, BadAudio, BadUtterance, too_short_error
from .distortion.settings import DistortionSettings
from .loader import BatchLoader, shared_memory_advice, shared_memory_usage
from .sampling import (
    EpochSampler,
    FixedOrderSampler,
    bucket,
    filter_by_length,
    generator,
    padding_share,
)
from .settings import DataSettings
from .tables import Utterance, read_tables

if TYPE_CHECKING:
    from ..distill.span_mask import SpanMask
    from .distortion.pipeline import Distorter

logger = logging.getLogger(__name__)


class BatchTargets(Protocol):
    """Cached teacher targets of one batch; see :class:`..hidden_states.store.StoredTargets`.

    ``frames``: ``[batch]``, frame counts.
    """

    @property
    def frames(self) -> Tensor: ...

    def to(self, device: str) -> BatchTargets:
        """Copy to ``device`` in the stored dtype, asynchronously from pinned memory."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that :meth:`to` copies."""

    def on(self, device: str) -> CachedTargets:
        """Return the targets in float32 on ``device``."""


class TargetSource(Protocol):
    """Cached teacher targets of a corpus; see :class:`..hidden_states.store.TargetReader`."""

    seed: int

    def check(self, name: str, samples: int) -> None: ...

    def batch(self, names: Sequence[str]) -> BatchTargets: ...


class Batch(NamedTuple):
    """A batch from a loader.

    - ``waves``: the student's input, ``[batch, sample]`` at 16 kHz, zero-padded.
    - ``lengths``: valid samples, ``[batch]``.
    - ``names``: of the utterances, see :attr:`.tables.Utterance.name`.
    - ``problem``: an error message; ``waves`` is then empty. It is a field because an exception in
      a worker process would reach the user as a traceback.
    - ``teacher_waves``: the teachers' input, of the same shape as ``waves``; None: the same input
      as the student's.
    - ``bad``: utterances left out because their files are bad; ``names`` is empty if all are.
    - ``targets``: cached teacher targets.
    - ``spans``: bool ``[batch, frame]``, the student's frames in masked spans; None: no masking.
    """

    waves: Tensor
    lengths: Tensor
    names: list[str]
    problem: str = ""
    teacher_waves: Tensor | None = None
    bad: Sequence[BadUtterance] = ()
    targets: BatchTargets | None = None
    spans: Tensor | None = None


def empty_batch(names: list[str], **fields: Any) -> Batch:
    return Batch(torch.zeros(0), torch.zeros(0), names, **fields)


class DistillationDataset(Dataset):
    """A dataset whose items are batches: random excerpts of long utterances, padded.

    Args:
        rows: the utterances, sorted by length.
        min_samples: samples of one frame; shorter files are bad.
        seed: seed of the excerpts and distortions. They depend on seed, epoch and utterance only;
            torch's random numbers would depend on the worker and on earlier draws.
        targets: cached targets of all utterances. They were computed on undistorted audio and on
            one excerpt of each long utterance, so every epoch uses that excerpt.
        span_mask: draws the masked frames of an utterance, which differ between epochs; None: no
            masking.

    Attributes:
        left_out: utterances that are in no batch because their table entry is bad.

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
        self.root = Path(data.libri_root)
        max_samples = round(data.max_seconds * SAMPLE_RATE)
        self.batches = bucket(rows, data.train_batch_size, max_samples, data.sequence_length)
        self.sequence_length = data.sequence_length
        self.min_samples = min_samples
        self.seed = seed
        self.skip_bad = data.on_bad_audio == "skip"
        self.targets = targets
        self.span_mask = span_mask
        self.left_out: list[BadUtterance] = []
        self.distorter: Distorter | None = None
        if distortion is not None and distortion.setup != "clean":
            from .distortion.pipeline import Distorter  # imports torchaudio

            self.distorter = Distorter(distortion, seed, self.root, rows)
            if self.distorter.voices is not None:
                self.distorter.voices.skip_bad = self.skip_bad

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Read batch ``index`` of epoch 0, or batch ``(epoch, index)``."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        good, bad = [], []
        try:
            for row in self.batches[index]:
                try:
                    wave = self._read(row, epoch)
                    if self.targets is not None:
                        self.targets.check(row.name, len(wave))
                except BadAudio as error:
                    if not self.skip_bad:
                        raise DataError(f"{error}; {BAD_AUDIO_ADVICE}") from None
                    bad.append(BadUtterance(row.name, error.kind, error.reason))
                else:
                    good.append((row.name, *self._distort(wave, row.name, epoch)))
            targets = None
            if good and self.targets is not None:
                targets = self.targets.batch([name for name, *_ in good])
        except DataError as error:
            return empty_batch([row.name for row in self.batches[index]], problem=str(error))
        if not good:
            return empty_batch([], bad=bad)
        names, waves, teacher_waves = map(list, zip(*good, strict=True))
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = Batch(pad_sequence(waves, batch_first=True), lengths, names, bad=bad)
        if self.span_mask is not None:
            spans = [
                self.span_mask.draw(len(wave), generator(self.seed, epoch, name, "spans"))
                for name, wave in zip(names, waves, strict=True)
            ]
            batch = batch._replace(spans=pad_sequence(spans, batch_first=True))
        if teacher_waves[0] is None:  # depends on the setup, so the same for all utterances
            return batch._replace(targets=targets)
        return batch._replace(teacher_waves=pad_sequence(teacher_waves, batch_first=True))

    def _distort(self, wave: Tensor, name: str, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return the student's input, and the teachers' if it differs."""
        if self.distorter is None:
            return wave, None
        student, teacher = self.distorter.pair(wave, name, epoch)
        return student, None if self.targets is not None else teacher

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
            return recording.read_speech(*self._excerpt(length, row.name, epoch))

    def _excerpt(self, length: int, name: str, epoch: int) -> tuple[int, int]:
        """Return the first sample of the excerpt and its number of samples."""
        last_start = length - self.sequence_length
        if self.sequence_length == 0 or last_start <= 0:
            return 0, length
        seed, epoch = (self.seed, epoch) if self.targets is None else (self.targets.seed, 0)
        start = generator(seed, epoch, name, "excerpt").randrange(last_start + 1)
        return start, self.sequence_length


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
    """Make a loader of :class:`Batch` for the utterances of tables, bucketed by length.

    Each pass is an epoch with its own order, excerpts and distortions, which depend on seed and
    epoch only. The next pass starts at ``loader.sampler.epoch`` and ``loader.sampler.position``.

    Args:
        data: the run's data settings; its ``sets`` is not used.
        sets: names of the tables in ``data.file_path``.
        min_samples: samples of one frame; shorter utterances are left out.
        shuffle: if False, every pass is the same: batches from long to short, with the excerpts
            and distortions of epoch 0.
        distortion, seed, targets, span_mask: see :class:`DistillationDataset`.

    Raises:
        DataError: a table or the audio root is missing, a row is invalid, no utterance is left, or
            a folder named in ``distortion`` cannot be used.
    """
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
    return BatchLoader(
        dataset,
        timeout=data.loader_timeout,
        batch_size=1,
        sampler=EpochSampler(len(dataset), seed) if shuffle else FixedOrderSampler(len(dataset)),
        num_workers=data.num_workers,
        collate_fn=unwrap_batch,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        persistent_workers=data.num_workers > 0 and shuffle,
        # Each pass draws a seed for its workers. Drawn from torch's default generator, it would
        # change the student's dropout, and a resumed run starts its passes at other steps.
        generator=torch.Generator().manual_seed(0),
    )
