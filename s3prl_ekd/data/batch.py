"""A batch of waveforms, and the base of datasets whose items are batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..distill.batch import CachedTargets
from ..errors import DataError
from .bad_audio import BAD_AUDIO_ADVICE, BadAudio, BadUtterance
from .sampling import generator
from .settings import DataSettings

if TYPE_CHECKING:
    from ..distill.span_mask import SpanMask
    from .distortion.pipeline import Distorter


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

    def check(self, name: str, wave: Tensor) -> None: ...

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


class BatchDataset(Dataset):
    """A dataset whose items are batches: bad audio left out, distorted, masked and padded.

    Args:
        min_samples: samples of one frame; shorter audio is bad.
        seed: seed of excerpts, distortions and masked spans. They depend on seed, epoch and
            utterance only; torch's random numbers would depend on the worker and on earlier draws.
        targets: cached targets of all utterances. They were computed on undistorted audio and on
            one excerpt of each long utterance, so every epoch uses that excerpt.
        span_mask: draws the masked frames of an utterance, which differ between epochs; None: no
            masking.

    Attributes:
        distorter: distorts the waveforms; None: clean.
        left_out: utterances that are in no batch because their table entry is bad.
    """

    distorter: Distorter | None = None

    def __init__(
        self,
        data: DataSettings,
        min_samples: int,
        seed: int = 0,
        targets: TargetSource | None = None,
        span_mask: SpanMask | None = None,
    ):
        self.sequence_length = data.sequence_length
        if 0 < self.sequence_length < min_samples:
            raise DataError(
                f"pretrain_expert.datarc.sequence_length: {self.sequence_length} samples are "
                f"shorter than a frame of the student, {min_samples}; raise it"
            )
        self.min_samples = min_samples
        self.seed = seed
        self.skip_bad = data.on_bad_audio == "skip"
        self.targets = targets
        self.span_mask = span_mask
        self.left_out: list[BadUtterance] = []

    @property
    def utterances(self) -> int:
        """Number of utterances, with those left out."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """Samples of the longest utterance or excerpt, as far as it is known."""
        raise NotImplementedError

    def make_batch(
        self, utterances: Sequence[tuple[str, Callable[[], Tensor]]], epoch: int
    ) -> Batch:
        """Read utterances, given as names and functions that read them or raise BadAudio."""
        good, bad = [], []
        try:
            for name, read in utterances:
                try:
                    wave = read()
                    if self.targets is not None:
                        self.targets.check(name, wave)
                except BadAudio as error:
                    if not self.skip_bad:
                        raise DataError(f"{error}; {BAD_AUDIO_ADVICE}") from None
                    bad.append(BadUtterance(name, error.kind, error.reason))
                else:
                    good.append((name, *self._distort(wave, name, epoch)))
            targets = None
            if good and self.targets is not None:
                targets = self.targets.batch([name for name, *_ in good])
        except DataError as error:
            return empty_batch([name for name, _ in utterances], problem=str(error))
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

    def excerpt(self, length: int, name: str, epoch: int) -> tuple[int, int]:
        """Return the first sample of the excerpt and its number of samples."""
        last_start = length - self.sequence_length
        if self.sequence_length == 0 or last_start <= 0:
            return 0, length
        seed, epoch = (self.seed, epoch) if self.targets is None else (self.targets.seed, 0)
        start = generator(seed, epoch, name, "excerpt").randrange(last_start + 1)
        return start, self.sequence_length
