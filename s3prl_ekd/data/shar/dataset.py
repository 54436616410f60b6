"""Batches from lhotse's Shar folders, whose shards are read from beginning to end.

The shards of an epoch are shuffled and dealt to ``shar_streams`` streams. A stream reads its shards
one after another and makes batches of cuts of similar length with lhotse's DynamicBucketingSampler,
which shuffles among the cuts that it holds. Batch ``i`` of an epoch is the next one of stream
``i % streams``. So the batches are a function of the settings, the seed and the epoch, and not of
the number of workers or processes. A worker reads the streams of its own batches only, if their
number is a multiple of workers times processes; else it also reads batches of others, without
decoding them. To resume, it reads its streams from the start of the epoch up to the position, also
without decoding.

An epoch has as many batches as the cuts fill. A stream that ends before the epoch does goes on with
shards of the next shuffle; what it still holds at the end of an epoch is not used in this epoch.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import DataError, first_line
from ..audio import check_samples, resample, warn_once
from ..audio_files import MAX_SAMPLES, SAMPLE_RATE, can_be_resampled
from ..bad_audio import BadAudio, too_short_error
from ..batch import Batch, BatchDataset
from ..distortion.settings import DistortionSettings
from ..manifest.cuts import import_lhotse
from ..sampling import generator
from ..settings import DataSettings
from .shards import Shard

if TYPE_CHECKING:
    from ...distill.span_mask import SpanMask

logger = logging.getLogger(__name__)

HELD_BATCHES = 16  # that a stream holds, encoded, to choose from; fewer of a small corpus
BUCKETS = 8  # of lengths; fewer of a small corpus
ESTIMATED = 100  # batches from which the number of cuts in a batch is estimated


class SharDataset(BatchDataset):
    """Batches of the cuts of Shar folders; see this module and :class:`..batch.BatchDataset`.

    Raises:
        DataError: a shard cannot be read, or a folder of ``distortion`` cannot be used.
        SetupError: lhotse is not installed.
    """

    def __init__(
        self,
        data: DataSettings,
        shards: Sequence[Shard],
        min_samples: int,
        distortion: DistortionSettings | None = None,
        seed: int = 0,
        span_mask: SpanMask | None = None,
    ):
        super().__init__(data, min_samples, seed, span_mask=span_mask)
        import_lhotse()  # raises SetupError
        self.data = data
        self.shards = list(shards)
        self.streams = min(data.shar_streams, len(self.shards))
        self.counts = {shard: _count_cuts(shard) for shard in self.shards}
        self._open: dict[int, _Stream] = {}
        if distortion is not None and distortion.setup != "clean":
            from ..distortion.pipeline import Distorter

            if distortion.babble:
                raise DataError(
                    "distortion.babble mixes in utterances of length tables, and sets are Shar "
                    "folders; set distortion.babble: false"
                )
            self.distorter = Distorter(distortion, seed)
        batches = self.utterances / self._choose_bins()
        self.count = max(1, round(batches / self.streams)) * self.streams
        logger.info(
            "data: %d cuts in %d shards, %d streams, %d batches in an epoch",
            self.utterances,
            len(self.shards),
            self.streams,
            self.count,
        )

    @property
    def utterances(self) -> int:
        return sum(self.counts.values())

    @property
    def longest(self) -> int:
        return self.sequence_length or MAX_SAMPLES

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Read batch ``index`` of epoch 0, or batch ``(epoch, index)``."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        item, number = divmod(index, self.streams)
        self._open = {n: stream for n, stream in self._open.items() if stream.epoch == epoch}
        stream = self._open.get(number)
        if stream is None or stream.position > item:
            stream = self._open[number] = _Stream(epoch, self._batches(epoch, number))
        try:
            cuts = stream.read(item)
        except DataError as error:
            del self._open[number]
            return self.make_batch([("", partial(_raise, error))], epoch)
        return self.make_batch([(cut.id, partial(self._read, cut)) for cut in cuts], epoch)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def _choose_bins(self) -> float:
        """Set the borders of the buckets by the cuts of the first shard.

        Returns the number of cuts that are read for a batch: those in it, and those that
        ``max_timestep`` leaves out.
        """
        from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

        shard = self.shards[0]
        cuts = list(self._cuts([shard], 0, audio=False))
        if not cuts:
            raise DataError(f"{shard.cuts}: no cut is left; check max_timestep")
        batch, per_stream = self.data.train_batch_size, self.utterances // self.streams
        self.held = max(batch, min(HELD_BATCHES * batch, per_stream // 8))
        # So that the cuts that are held always fill a batch of one bucket.
        buckets = min(BUCKETS, self.held // batch, len(cuts))
        self.bins = estimate_duration_buckets(cuts, buckets) if buckets > 1 else [math.inf]
        batches = itertools.islice(self._sampler(itertools.cycle(cuts), 0), ESTIMATED)
        cuts_in_batch = sum(len(batch) for batch in batches) / ESTIMATED
        return cuts_in_batch * self.counts[shard] / len(cuts)

    def _batches(self, epoch: int, number: int) -> Iterator[Sequence[Any]]:
        """Yield the batches of cuts of a stream, without end."""
        seed = generator(self.seed, epoch, str(number), "cuts").getrandbits(31)
        for batch in self._sampler(self._stream_cuts(epoch, number), seed):
            yield list(batch)
        raise DataError(f"lhotse's sampler ended stream {number} of epoch {epoch}")

    def _stream_cuts(self, epoch: int, number: int) -> Iterator[Any]:
        """Yield the cuts of a stream, again and again."""
        for repeat in itertools.count():
            rng = generator(self.seed, epoch, str(repeat), "shards")
            order = rng.sample(self.shards, len(self.shards))[number :: self.streams]
            is_empty = True
            for cut in self._cuts(order, epoch):
                is_empty = False
                yield cut
            if is_empty:
                names = ", ".join(shard.cuts.name for shard in order[:3])
                raise DataError(f"no cut is left in the shards {names} ...; check max_timestep")

    def _sampler(self, cuts: Iterable[Any], seed: int) -> Iterable[Any]:
        """Batches of cuts without end: at the end, lhotse may leave some out."""
        from lhotse.dataset import DynamicBucketingSampler

        return DynamicBucketingSampler(
            cuts,
            max_duration=self.data.max_seconds or None,
            max_cuts=self.data.train_batch_size,
            duration_bins=self.bins,
            buffer_size=self.held,
            shuffle=True,
            seed=seed,
            # The defaults would read the number of processes and of the worker.
            world_size=1,
            rank=0,
            sync_buckets=False,
        )

    def _cuts(self, shards: Sequence[Shard], epoch: int, audio: bool = True) -> Iterator[Any]:
        """Yield the cuts of shards, excerpts of long ones; without ``audio`` only what they are.

        Raises:
            DataError: a shard is damaged or incomplete.
        """
        from lhotse import CutSet

        for shard in shards:
            fields = {"cuts": [shard.cuts]} | ({"recording": [shard.recording]} if audio else {})
            read = 0
            try:
                for cut in CutSet.from_shar(fields=fields):
                    read += 1
                    if not self._is_excluded(cut):
                        yield self._shorten(cut, epoch)
            except Exception as error:  # lhotse, tarfile, gzip and json have classes of their own
                raise DataError(
                    f"cannot read cut {read + 1} of the shard {shard.cuts}: {first_line(error)}; "
                    "write it again"
                ) from None
            if read != self.counts[shard]:
                raise DataError(
                    f"{shard.recording} has the audio of {read} of {self.counts[shard]} cuts; "
                    "write the shard again"
                )

    def _is_excluded(self, cut: Any) -> bool:
        """Whether a cut is left out, as a row of a table is: by ``max_timestep``, or too short."""
        samples, limit = round(cut.duration * SAMPLE_RATE), self.data.max_timestep
        if samples < self.min_samples:
            warn_once("short cuts", f"{cut.id}: left out, as it has only {samples} samples")
            return True
        return samples >= limit > 0 or samples <= -limit > 0

    def _shorten(self, cut: Any, epoch: int) -> Any:
        start, samples = self.excerpt(round(cut.duration * SAMPLE_RATE), cut.id, epoch)
        if not start and samples == round(cut.duration * SAMPLE_RATE):
            return cut
        offset, duration = start / SAMPLE_RATE, samples / SAMPLE_RATE
        return cut.truncate(offset=offset, duration=duration, preserve_id=True)

    def _read(self, cut: Any) -> Tensor:
        """Read the audio of a cut, ``[sample]`` at 16 kHz.

        Raises:
            BadAudio: it cannot be used, or is not audio of the shard: lhotse can also name commands
                and files, which are never used.
        """
        from lhotse import MonoCut, MultiCut
        from lhotse.audio.backend import LibsndfileBackend, audio_backend

        recording: Any = getattr(cut, "recording", None)
        sources: list[Any] = [] if recording is None else recording.sources
        in_shard = [s.type == "memory" and isinstance(s.source, bytes) for s in sources] == [True]
        is_one = isinstance(cut, (MonoCut, MultiCut))  # each track of a MixedCut has a recording
        if not (is_one and in_shard) or recording.transforms:
            raise BadAudio(cut.id, "not in the shard", "its audio is not in the shard")
        rate = recording.sampling_rate
        if not can_be_resampled(rate):
            raise BadAudio(cut.id, "rate", f"{rate} Hz cannot be resampled well")
        try:
            with audio_backend(LibsndfileBackend()):  # others may need torchaudio or ffmpeg
                channels = torch.from_numpy(cut.load_audio())  # [channel, sample]
        except Exception as error:  # lhotse has a class for each of its audio backends
            reason = f"it is cut off or damaged ({first_line(error)})"
            raise BadAudio(cut.id, "damaged", reason) from None
        if len(channels) > 1:
            warn_once(f"{len(channels)} channels", f"{cut.id}: averaging {len(channels)} channels")
        wave, is_constant = check_samples(channels.float().mean(0), cut.id)
        if is_constant and cut.duration * SAMPLE_RATE < self.longest:  # not an excerpt in a pause
            raise BadAudio(cut.id, "silent", "it has no sound: all samples are equal")
        if rate != SAMPLE_RATE:
            warn_once(f"{rate} Hz", f"{cut.id} has {rate} Hz: resampling to {SAMPLE_RATE} Hz")
            wave = resample(wave, rate)
        if len(wave) < self.min_samples:
            raise too_short_error(cut.id, len(wave), self.min_samples)
        return wave


class _Stream:
    """The position in a stream of batches."""

    def __init__(self, epoch: int, batches: Iterator[Sequence[Any]]):
        self.epoch, self.position = epoch, 0
        self._batches = batches

    def read(self, item: int) -> Sequence[Any]:
        """Skip to a batch, which must not be before the position, and return it."""
        batch: Sequence[Any] = ()
        while self.position <= item:
            batch = next(self._batches)
            self.position += 1
        return batch


def _raise(error: DataError) -> Tensor:
    raise error


def _count_cuts(shard: Shard) -> int:
    from lhotse.lazy import count_newlines_fast

    try:
        count = count_newlines_fast(shard.cuts)
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read the shard {shard.cuts}: {first_line(error)}") from None
    if not count:
        raise DataError(f"the shard {shard.cuts} has no cuts; remove it")
    return count
