"""Run the teachers over a corpus, one utterance at a time, and store their targets.

One at a time because their outputs depend on padding (the first conv layer of the Base models
normalises over time): a stored target is that of the utterance, or of its fixed excerpt, alone.
:func:`distances` measures how far targets computed in padded batches are from the stored ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.audio_files import SAMPLE_RATE, is_passed_over
from ...data.bad_audio import Bad
from ...data.batches import DistillationDataset, leave_signals_to_the_main_process, only_item
from ...data.loader import BatchLoader
from ...data.sampling import FixedOrder, used, within
from ...data.settings import DataSettings
from ...data.tables import Utterance, read_tables
from ...distill.aggregation import Aggregation
from ...distill.conv_layers import ConvLayers
from ...distill.settings import StudentSettings
from ...distill.teachers import TeacherEnsemble
from ...errors import DataError, SetupError
from ...files.atomic import remove_leftovers
from ...hidden_states.fingerprint import same_key
from ...hidden_states.store import (
    INDEX,
    NAMES,
    RECORD,
    RECORDS,
    SCALES,
    TARGETS,
    CacheWriter,
    Index,
    joined,
    read_index,
    to_numbers,
    write_index,
)
from ..interrupts import is_out_of_memory, workers_explained

logger = logging.getLogger(__name__)


SPARE = 64 << 20  # bytes to leave free on the disk
TargetFn = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]  # of waveforms ``[sample]``


def cached_rows(data: DataSettings, student: StudentSettings) -> list[Utterance]:
    """The utterances of ``sets`` and ``dev_sets``, the longest first.

    Raises:
        DataError: see :func:`...data.tables.read_tables`.
    """
    rows: dict[str, Utterance] = {}
    bad: list[Bad] | None = [] if data.on_bad_audio == "skip" else None
    for sets in (data.sets, data.dev_sets):
        if sets:
            table = read_tables(data.file_path, sets, bad)
            rows |= {row.path: row for row in within(table, data.max_timestep, student.min_samples)}
    if bad:
        logger.warning("left out %d: %s: %s", len(bad), bad[0].path, bad[0].reason)
    return sorted(rows.values(), key=lambda row: (-row.length, row.path))


def frames_of(samples: int, conv: ConvLayers) -> int:
    """Frames of a waveform."""
    for _, kernel, stride in conv:
        samples = (samples - kernel) // stride + 1
    return samples


@dataclass(frozen=True)
class Size:
    """Of a cache, by the tables' lengths: ``utterances``, ``seconds`` of audio, ``bytes``."""

    utterances: int
    seconds: float
    bytes: int

    @property
    def gigabytes(self) -> float:
        return self.bytes / 1e9


def size_of(
    rows: Sequence[Utterance], sequence_length: int, index: Index, conv: ConvLayers
) -> Size:
    """The size that a cache of these utterances will have."""
    lengths = [used(row, sequence_length) for row in rows]
    frames = sum(frames_of(length, conv) for length in lengths)
    names = sum(len(row.path) + 4 for row in rows)  # in the index
    each = RECORD.itemsize + index.scale_bytes
    total = frames * index.frame_bytes + len(rows) * each + names
    return Size(len(rows), sum(lengths) / SAMPLE_RATE, total)


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, or of the nearest one above it that exists.

    Raises:
        SetupError: it cannot be told.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError as error:
        raise SetupError(f"cannot use {there}: {error.strerror}") from None


def existing_bytes(folder: Path) -> int:
    """Bytes of a cut build, or of the cache that is replaced."""
    files = (folder / name for name in (TARGETS, SCALES, RECORDS))
    return sum(path.stat().st_size for path in files if path.is_file())


def check_room(size: Size, folder: Path) -> None:
    """Raise SetupError where the disk has not enough room for the rest of a cache."""
    need, free = size.bytes - existing_bytes(folder) + SPARE, free_bytes(folder)
    if need > free:
        raise SetupError(
            f"the targets need {need / 1e9:.3f} GB more and the disk of {folder} has "
            f"{free / 1e9:.3f} GB free; name a folder on another disk, or make them smaller with "
            "--dtype int8 or --aggregated"
        )


def targets_of(
    teachers: TeacherEnsemble, aggregate: Aggregation | None, weights: Mapping[str, float]
) -> TargetFn:
    """The function that computes what is stored: ``{name: [batch, target, frame, dim]}``.

    Args:
        teachers: the frozen teachers.
        aggregate: for the targets of an aggregation; None: each teacher's own targets.
        weights: of the teachers in the aggregate.
    """

    @torch.no_grad()
    def compute_targets(waves: Sequence[Tensor]) -> Mapping[str, Tensor]:
        hidden = teachers(waves)
        return hidden if aggregate is None else aggregate(hidden, weights)

    return compute_targets


def begin(folder: Path, index: Index, force: bool) -> Index:
    """The index to build by: a new one, or the one that is there if it is of the same.

    Raises:
        DataError: the folder has a cache of something else, or no cache at all.
        OSError: it cannot be written.
    """
    path = folder / INDEX
    files = (NAMES, TARGETS, SCALES, RECORDS)
    for name in (INDEX, *files):  # they are written in place, so a link would lead out of here
        remove_leftovers(folder, name)
        if (folder / name).is_symlink():
            raise DataError(f"{folder / name} is a link; a target cache has plain files only")
    others = [p.name for p in folder.iterdir() if p.name not in (*files, INDEX)]
    others = [name for name in others if not is_passed_over(name)]
    if others:
        raise DataError(
            f"{folder} holds something else than a target cache ({others[0]}); name a new folder"
        )
    if path.exists() and not force:
        return _same(read_index(folder), index, folder)
    for name in (INDEX, *files):
        (folder / name).unlink(missing_ok=True)
    write_index(folder, index)
    return index


def _same(there: Index, index: Index, folder: Path) -> Index:
    try:
        difference = same_key(there.key, index.key)
    except (KeyError, TypeError, ValueError, AttributeError):
        difference = "its index.json is damaged"
    for part in ("dtype", "seed"):
        if getattr(there, part) != getattr(index, part):
            difference = f"{part} is {getattr(index, part)} and was {getattr(there, part)}"
    if not difference and (
        there.utterances != index.utterances or list(there.layout) != list(index.layout)
    ):
        difference = "its utterances or layout are others"
    if difference:
        raise DataError(
            f"{folder} holds the targets of something else: {difference}; name another folder, or "
            "add --force to replace it"
        )
    return there


def build(
    folder: Path,
    index: Index,
    compute: TargetFn,
    rows: Sequence[Utterance],
    data: DataSettings,
    *,
    min_samples: int,
    device: str,
) -> Index:
    """Build the rest of a cache, with a progress bar.

    Args:
        folder: of the cache; this process alone writes to it.
        index: of :func:`begin`, for ``rows`` in this order.
        compute: see :func:`targets_of`.
        data: as in training.
        min_samples: shorter waveforms give no frame.
        device: where the teachers are.

    Raises:
        EkdError: audio is bad and not to be skipped, a target cannot be stored, or the disk is
            full; what was done stays done.
    """
    data = dataclasses.replace(data, train_batch_size=1, max_seconds=0)
    dataset = DistillationDataset(data, rows, min_samples, seed=index.seed)
    again = "type the same command again, it goes on where it is"
    try:
        writer = CacheWriter(folder, index)
        try:
            with workers_explained(again):
                _fill(writer, dataset, compute, data, device)
            if not any(record["frames"] for record in writer.records):
                raise DataError(
                    f"no utterance of the tables can be used; check libri_root {data.libri_root}"
                )
            return writer.finish()
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, OSError):
                raise
            writer.save()
            done = len(writer.records)
            logger.warning("%d of %d utterances are done; %s", done, len(rows), again)
            if not is_out_of_memory(error):
                raise
            raise SetupError(
                f"out of memory on {device} at one utterance; lower sequence_length, or name "
                "another device"
            ) from None
        finally:
            writer.close()
    except OSError as error:
        raise SetupError(
            f"cannot write the target cache {folder}: {error.strerror}; make room and {again}"
        ) from None


def _fill(
    writer: CacheWriter,
    dataset: DistillationDataset,
    compute: TargetFn,
    data: DataSettings,
    device: str,
) -> None:
    """Add the utterances that the cache does not have yet."""
    index, order = writer.index, FixedOrder(len(dataset))
    order.rank = done = len(writer.records)
    loader = BatchLoader(
        dataset,
        timeout=data.loader_timeout,
        batch_size=1,
        sampler=order,
        num_workers=data.num_workers,
        collate_fn=only_item,
        worker_init_fn=leave_signals_to_the_main_process,
    )
    count = len(dataset)
    bar = tqdm(total=count, initial=done, unit="utt", desc="targets", dynamic_ncols=True)
    with bar, contextlib.closing(loader):
        for batch in loader:
            if batch.problem:
                raise DataError(batch.problem)
            if batch.bad:
                logger.warning("left out %s: %s", batch.bad[0].path, batch.bad[0].reason)
                writer.add_bad()
            else:
                targets = joined(compute([batch.waves[0].to(device)]), index.layout)
                numbers = to_numbers(targets, index.layout, index.dtype, batch.names[0])
                writer.add(*numbers, int(batch.lengths[0]))
            bar.update()


class Distance(NamedTuple):
    """``mean`` and ``worst`` absolute difference, as shares of the mean absolute target."""

    mean: float
    worst: float


def distances(
    dataset: DistillationDataset, compute: TargetFn, device: str, batches: int = 4
) -> Mapping[str, Distance]:
    """Compare stored targets with computed ones, in some batches spread over the lengths.

    Args:
        dataset: with the cache in it, so that its batches carry the stored targets.
        compute: see :func:`targets_of`.
        device: where the teachers are.
        batches: how many.
    """
    step = max(1, len(dataset) // batches)
    sums: dict[str, list[float]] = {}  # of differences, the largest, of targets, how many
    for i in range(step // 2, len(dataset), step):
        batch = dataset[i]
        if batch.targets is None:
            continue
        pairs = zip(batch.waves, batch.lengths.tolist(), strict=True)
        live = compute([wave[:length].to(device) for wave, length in pairs])
        cached = batch.targets.on(device)
        stored, frames = cached.values, cached.lengths
        for name, target in live.items():
            count = min(target.shape[2], stored[name].shape[2])
            mask = torch.arange(count, device=frames.device) < frames[:, None]  # [batch, frame]
            mask = mask[:, None, :, None].expand_as(target[:, :, :count])
            apart = (target[:, :, :count] - stored[name][:, :, :count]).abs()[mask]
            sizes = stored[name][:, :, :count].abs()[mask]
            total = sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            total[0] += float(apart.sum(dtype=torch.float64))
            total[1] = max(total[1], float(apart.max()))
            total[2] += float(sizes.sum(dtype=torch.float64))
            total[3] += sizes.numel()
    result = {}
    for name, (total_apart, worst, size, numbers) in sums.items():
        result[name] = (
            Distance(total_apart / size, worst / (size / numbers)) if size else Distance(0, 0)
        )
    return result
