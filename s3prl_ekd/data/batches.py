"""Batches of waveforms of like length, as s3prl buckets them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, get_worker_info

from ..distill.batch import CachedTargets
from ..errors import DataError, SetupError
from .audio import SAMPLE_RATE, Recording, warn_once
from .bad_audio import ADVICE, Bad, BadAudio, too_short
from .distortion.settings import DistortionSettings
from .loader import BatchLoader, share
from .sampling import EpochOrder, FixedOrder, bucket, generator, padding_share, within
from .settings import DataSettings
from .tables import Utterance, read_tables

if TYPE_CHECKING:
    from .distortion.pipeline import Distorter

logger = logging.getLogger(__name__)


class BatchTargets(Protocol):
    """Stored teacher targets of one batch; see :class:`..hidden_states.store.StoredTargets`."""

    def __iter__(self) -> Iterator[Any]: ...

    def on(self, device: str) -> CachedTargets:
        """The targets in float32, on the device."""


class TargetSource(Protocol):
    """Stored teacher targets of a corpus; see :class:`..hidden_states.store.TargetReader`."""

    seed: int

    def check(self, name: str, samples: int) -> None: ...

    def batch(self, names: Sequence[str]) -> BatchTargets: ...


class Batch(NamedTuple):
    """A batch as a loader gives it.

    ``waves``: the student's input, ``[batch, sample]`` at 16 kHz, zero-padded. ``lengths``:
    ``[batch]``, valid samples. ``names``: the utterances' paths. ``problem``: the error message of
    a file that could not be read; the batch is then empty. It is data, because an exception would
    arrive from a worker process as a traceback. ``teacher_waves``: the teachers' input, of the
    shape of ``waves``; None: the student's. ``bad``: utterances left out because their files are
    bad; if all are, ``names`` is empty. ``targets``: cached teacher targets.
    """

    waves: Tensor
    lengths: Tensor
    names: list[str]
    problem: str = ""
    teacher_waves: Tensor | None = None
    bad: Sequence[Bad] = ()
    targets: BatchTargets | None = None


class DistillationDataset(Dataset):
    """A dataset of whole batches: read the utterances, cut a random excerpt of long ones, pad.

    Args:
        data: the settings of a run.
        rows: the utterances, sorted by length.
        min_samples: shorter waveforms give no frame.
        distortion: of the waveforms; None or its setup ``clean``: none.
        seed: of the excerpts and the distortions, which depend on seed, epoch and utterance alone:
            torch's own numbers would depend on the worker and on what was drawn before.
        targets: cached targets of all utterances. They are of undistorted audio, and of one excerpt
            of each long utterance, which every epoch then has.

    Attributes:
        left_out: utterances that are in no batch, because they are bad by their table already.

    Raises:
        DataError: a folder that ``distortion`` names cannot be used.
    """

    def __init__(
        self,
        data: DataSettings,
        rows: Sequence[Utterance],
        min_samples: int,
        distortion: DistortionSettings | None = None,
        seed: int = 0,
        targets: TargetSource | None = None,
    ):
        self.root = Path(data.libri_root)
        most_samples = round(data.max_seconds * SAMPLE_RATE)
        self.batches = bucket(rows, data.train_batch_size, most_samples, data.sequence_length)
        self.sequence_length = data.sequence_length
        self.min_samples = min_samples
        self.seed = seed
        self.skip_bad = data.on_bad_audio == "skip"
        self.targets = targets
        self.left_out: list[Bad] = []
        self.distorter: Distorter | None = None
        if distortion is not None and distortion.setup != "clean":
            from .distortion.pipeline import Distorter  # loads torchaudio, which no one else needs

            self.distorter = Distorter(distortion, seed, self.root, [row.path for row in rows])
            if self.distorter.voices is not None:
                self.distorter.voices.skip_bad = self.skip_bad

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Batch ``index`` (of epoch 0), or batch ``(epoch, index)``."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        good, bad = [], []
        try:
            for row in self.batches[index]:
                try:
                    wave = self._read(row, epoch)
                    if self.targets is not None:
                        self.targets.check(row.path, len(wave))
                except BadAudio as error:
                    if not self.skip_bad:
                        raise DataError(f"{error}; {ADVICE}") from None
                    bad.append(Bad(row.path, error.kind, error.reason))
                else:
                    good.append((row.path, *self._distort(wave, row.path, epoch)))
            stored = None
            if good and self.targets is not None:
                stored = self.targets.batch([name for name, *_ in good])
        except DataError as error:
            names = [row.path for row in self.batches[index]]
            return Batch(torch.zeros(0), torch.zeros(0), names, str(error))
        if not good:
            return Batch(torch.zeros(0), torch.zeros(0), [], bad=bad)
        names, waves, teacher_waves = map(list, zip(*good, strict=True))
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = pad_sequence(waves, batch_first=True)
        if teacher_waves[0] is None:  # the setup decides, so it is the same for the whole batch
            return Batch(padded, lengths, names, bad=bad, targets=stored)
        teacher_padded = pad_sequence(teacher_waves, batch_first=True)
        return Batch(padded, lengths, names, teacher_waves=teacher_padded, bad=bad)

    def _distort(self, wave: Tensor, name: str, epoch: int) -> tuple[Tensor, Tensor | None]:
        """The student's input, and the teacher's if it is different."""
        if self.distorter is None:
            return wave, None
        student, teacher = self.distorter.pair(wave, name, epoch)
        return student, None if self.targets is not None else teacher

    def _read(self, row: Utterance, epoch: int) -> Tensor:
        """Read an utterance, or the excerpt of a long one for an epoch.

        Raises:
            BadAudio: see the table in :mod:`s3prl_ekd.data.bad_audio`.
        """
        path = self.root / row.path
        with Recording(path) as recording:
            length = recording.samples
            if length < self.min_samples:
                raise too_short(path, length, self.min_samples)
            if abs(length - row.length) > 1:  # other tools' tables may be rounded differently
                text = f"{path} has {length} samples at {SAMPLE_RATE} Hz, its table says"
                warn_once("length", f"{text} {row.length}: the file's length counts")
            return recording.read_speech(*self._excerpt(length, row.path, epoch))

    def _excerpt(self, length: int, name: str, epoch: int) -> tuple[int, int]:
        """First sample and number of samples."""
        room = length - self.sequence_length
        if self.sequence_length == 0 or room <= 0:
            return 0, length
        seed, epoch = (self.seed, epoch) if self.targets is None else (self.targets.seed, 0)
        start = generator(seed, epoch, name, "excerpt").randrange(room + 1)
        return start, self.sequence_length


def only_item(items: list[Batch]) -> Batch:
    """``collate_fn``: an item is a batch already. A worker puts it into shared memory."""
    batch = items[0]
    if get_worker_info() is None:
        return batch
    tensors = [batch.waves, batch.lengths, batch.teacher_waves, *(batch.targets or ())]
    try:
        share(tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.numel())
    except SetupError as error:
        return Batch(torch.zeros(0), torch.zeros(0), batch.names, str(error))
    return batch


def leave_signals_to_the_main_process(worker: int) -> None:
    """``worker_init_fn``: ignore the signals that ask the run to save and exit.

    Ctrl-C in a terminal and a cluster's signals reach every process of a run. If a worker died of
    one, the run would end before it has saved. Workers end with the main process, and
    :class:`.loader.BatchLoader` ends them before.
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
    pin_memory: bool = False,
) -> BatchLoader:
    """A loader of :class:`Batch` over tables, utterances bucketed by length.

    Each pass is an epoch with its own order, excerpts and distortions, which depend on seed and
    epoch alone; ``loader.sampler.epoch`` and ``.position`` say where the next pass begins.

    Args:
        data: the settings of a run; other tables than its ``sets`` may be read.
        sets: the tables in ``data.file_path``.
        min_samples: shorter waveforms give no frame.
        distortion: of the waveforms; None: clean.
        seed: of order, excerpts and distortions.
        shuffle: False: every pass is the same, batches from long to short, drawn as in epoch 0.
        targets: the batches get cached targets; the excerpts are then the same in each epoch.
        pin_memory: see :class:`torch.utils.data.DataLoader`.

    Raises:
        DataError: a table or the audio root is missing, a row is not valid, nothing is left, or
            a folder that ``distortion`` names cannot be used.
    """
    if not Path(data.libri_root).is_dir():
        raise DataError(f"the audio folder {data.libri_root} (libri_root) does not exist")
    bad_rows: list[Bad] = []
    skip_bad = data.on_bad_audio == "skip"
    all_rows = read_tables(data.file_path, sets, bad_rows if skip_bad else None)
    rows = within(all_rows, data.max_timestep, min_samples)
    hours = sum(row.length for row in rows) / SAMPLE_RATE / 3600
    logger.info("data: %d utterances, %.2f h, from %s", len(rows), hours, ", ".join(sets))
    dataset = DistillationDataset(data, rows, min_samples, distortion, seed, targets)
    sizes = [len(batch) for batch in dataset.batches]
    logger.info(
        "data: %d batches of %d to %d utterances, %.1f %% of their samples are padding",
        len(sizes),
        min(sizes),
        max(sizes),
        100 * padding_share(dataset.batches, data.sequence_length),
    )
    if skip_bad:
        dataset.left_out.extend(bad_rows)
        for row in all_rows:
            if row.length < min_samples:
                error = too_short(row.path, row.length, min_samples)
                dataset.left_out.append(Bad(row.path, error.kind, error.reason))
    return BatchLoader(
        dataset,
        timeout=data.loader_timeout,
        batch_size=1,
        sampler=EpochOrder(len(dataset), seed) if shuffle else FixedOrder(len(dataset)),
        num_workers=data.num_workers,
        collate_fn=only_item,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_main_process,
        persistent_workers=data.num_workers > 0 and shuffle,
        # Each pass draws a seed for its workers; from torch's own generator it would shift what
        # the student's dropout draws, and a resumed run begins its passes elsewhere.
        generator=torch.Generator().manual_seed(0),
    )
