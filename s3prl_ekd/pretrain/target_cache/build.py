"""Build a target cache: run the teachers over a corpus, one utterance at a time.

A padded batch would change the targets, because the first conv layer of the Base models normalises
over time. So a cached target is that of a single utterance, or of its fixed excerpt.
:func:`relative_differences` compares cached targets with targets computed in padded batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.audio_files import is_hidden_or_system
from ...data.bad_audio import BadUtterance
from ...data.batches import DistillationDataset, ignore_stop_signals, unwrap_batch
from ...data.loader import BatchLoader
from ...data.sampling import filter_by_length, used
from ...data.settings import DataSettings
from ...data.shar.shards import shar_shards
from ...data.tables import Utterance, read_tables, sort_key
from ...distill.aggregation import Aggregation
from ...distill.conv_layers import ConvLayers, receptive_field, stride_of
from ...distill.teachers import TeacherEnsemble
from ...errors import DataError, SetupError
from ...files.atomic import remove_leftovers
from ...files.text import CONTROL
from ...hidden_states.fingerprint import check_same_key
from ...hidden_states.store import (
    INDEX,
    RECORDS,
    SCALES,
    TARGETS,
    UTTERANCES,
    CacheWriter,
    Index,
    encode_targets,
    pack_targets,
    read_index,
    write_index,
)
from ..interrupts import explain_worker_errors, is_out_of_memory
from ..settings import load_runner_config

logger = logging.getLogger(__name__)

SPARE = 64 << 20  # bytes to leave free on the disk
TargetFn = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]  # from waveforms ``[sample]``


def cached_rows(data: DataSettings, min_samples: int) -> list[Utterance]:
    """Read the utterances of ``sets`` and ``dev_sets``, longest first.

    ``min_samples``: shorter utterances are left out.

    Raises:
        DataError: see :func:`...data.tables.read_tables`.
    """
    if shar_shards(data.file_path, data.sets):
        raise DataError(
            f"{', '.join(data.sets)} in {data.file_path}: a target cache needs length tables, not "
            "Shar folders; write them with: s3prl-ekd length-tables CUTS.jsonl.gz -o TABLE_FOLDER"
        )
    rows: dict[str, Utterance] = {}
    bad: list[BadUtterance] | None = [] if data.on_bad_audio == "skip" else None
    for sets in filter(None, (data.sets, data.dev_sets)):
        table = read_tables(data.file_path, sets, bad)
        usable = filter_by_length(table, data.max_timestep, min_samples)
        rows |= {row.name: row for row in usable}
    if bad:
        logger.warning("left out %d utterances, first %s: %s", len(bad), bad[0].path, bad[0].reason)
    return sorted(rows.values(), key=sort_key)


def estimate_bytes(
    rows: Sequence[Utterance], sequence_length: int, index: Index, conv: ConvLayers
) -> int:
    """Estimate the size of a cache of these utterances from the lengths in the tables."""
    field, stride = receptive_field(conv), stride_of(conv)
    frames = sum((used(row, sequence_length) - field) // stride + 1 for row in rows)
    names = sum(len(row.name) + 4 for row in rows)  # in utterances.json
    return sum(index.file_bytes(len(rows), frames).values()) + names


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, or of its nearest existing parent.

    Raises:
        SetupError: the disk's usage cannot be read.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise SetupError(f"cannot use {existing}: {error.strerror}") from None


def check_room(size: int, folder: Path) -> None:
    """Raise SetupError if the rest of a cache of ``size`` bytes does not fit on the disk."""
    files = (folder / name for name in (TARGETS, SCALES, RECORDS))  # of an interrupted build
    existing = sum(path.stat().st_size for path in files if path.is_file())
    required, free = size - existing + SPARE, free_bytes(folder)
    if required > free:
        raise SetupError(
            f"the target cache requires {required / 1e9:.3f} GB more, but the disk of {folder} has "
            f"{free / 1e9:.3f} GB free; choose a folder on another disk, or use --dtype int8 or "
            "--aggregated"
        )


def make_target_fn(
    teachers: TeacherEnsemble, aggregate: Aggregation | None, weights: Mapping[str, float]
) -> TargetFn:
    """Make the function that computes the targets: ``{name: [batch, target, frame, dim]}``.

    Args:
        teachers: the frozen teachers.
        aggregate: the aggregation to apply, or None for per-teacher targets.
        weights: of the teachers in the aggregation.
    """

    @torch.no_grad()
    def compute_targets(waves: Sequence[Tensor]) -> Mapping[str, Tensor]:
        hidden = teachers(waves)
        return hidden if aggregate is None else aggregate(hidden, weights)

    return compute_targets


def start_build(folder: Path, index: Index, force: bool) -> Index:
    """Write ``index`` for a new build, or return that of an interrupted build of the same cache.

    Raises:
        DataError: the folder has another cache and ``force`` is false, or has other files.
        OSError: it cannot be written.
    """
    names = (INDEX, UTTERANCES, TARGETS, SCALES, RECORDS)
    for name in names:  # written in place, so a symlink could point out of the folder
        remove_leftovers(folder, name)
        if (folder / name).is_symlink():
            raise DataError(f"{folder / name} is a symlink; a target cache has regular files only")
    for path in folder.iterdir():
        if path.name not in names and not is_hidden_or_system(path.name):
            raise DataError(
                f"{folder} has files that are not of a target cache ({path.name}); choose another "
                "folder"
            )
    if (folder / INDEX).exists() and not force:
        return _check_same_build(read_index(folder), index, folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    write_index(folder, index)
    return index


def _check_same_build(existing: Index, index: Index, folder: Path) -> Index:
    try:
        for part in ("dtype", "seed"):
            value, previous = getattr(index, part), getattr(existing, part)
            if value != previous:
                raise DataError(f"{part} is {value}, was {previous}")
        if existing.version < index.version and not existing.complete:
            raise DataError("an earlier version of s3prl_ekd began it")
        check_same_key(existing.key, index.key)
        if (existing.utterances, existing.layout) != (index.utterances, index.layout):
            raise DataError("its utterances or layout differ")
    except DataError as error:
        raise DataError(
            f"{folder} holds a different target cache: {CONTROL.sub('?', str(error))[:500]}; "
            "choose another folder, or add --force to replace it"
        ) from None
    return existing


def build_cache(
    folder: Path,
    index: Index,
    compute: TargetFn,
    rows: Sequence[Utterance],
    data: DataSettings,
    *,
    min_samples: int,
    device: str,
) -> Index:
    """Build a cache, or the rest of it, with a progress bar.

    Args:
        folder: of the cache; only this process writes to it.
        index: of :func:`start_build`, for ``rows`` in this order.
        compute: see :func:`make_target_fn`.
        data: as in training.
        min_samples: shorter waveforms have no frame.
        device: of the teachers.

    Raises:
        EkdError: audio is bad and not skipped, a target exceeds the dtype, or the disk is full.
            The same command continues from there.
    """
    dataset = _single_utterances(data, rows, min_samples, index.seed)
    hint = "run the same command again to continue"
    try:
        with contextlib.closing(CacheWriter(folder, index)) as writer:
            try:
                with explain_worker_errors(hint):
                    _compute_missing(writer, dataset, compute, data, device)
                if not any(record[0] for record in writer.records):  # frames
                    raise DataError(
                        f"no usable utterance in the tables; check libri_root {data.libri_root}"
                    )
                return writer.finish()
            except OSError:
                raise
            except (Exception, KeyboardInterrupt) as error:
                writer.save()
                count = len(writer.records)
                logger.warning("cached %d of %d utterances; %s", count, len(rows), hint)
                if not is_out_of_memory(error):
                    raise
                raise SetupError(
                    f"out of memory on {device} with a batch of one utterance; lower "
                    "sequence_length, or use another --device"
                ) from None
    except OSError as error:
        raise SetupError(
            f"cannot write the target cache {folder}: {error.strerror}; free some space and {hint}"
        ) from None


def _single_utterances(
    data: DataSettings, rows: Sequence[Utterance], min_samples: int, seed: int
) -> DistillationDataset:
    """A dataset whose batches are one clean utterance, or its fixed excerpt, each."""
    data = dataclasses.replace(data, train_batch_size=1, max_seconds=0)
    return DistillationDataset(data, rows, min_samples, seed=seed)


class CachedWaves:
    """The waveforms that ``s3prl-ekd cache`` passes to the teachers, with their names.

    Iterates over pairs of a name (the path relative to ``libri_root``; ``PATH@OFFSET+LENGTH`` for a
    segment) and a waveform ``[sample]`` at 16 kHz, from long to short: whole utterances, or the
    excerpt of a longer one than ``sequence_length``. Bad audio is left out. For teachers that
    another program runs; see :func:`~s3prl_ekd.teachers.stored.write_states`.

    Args:
        config: the runner config, as for ``-c``.
        seed: as for ``--seed``.
        min_samples: samples of the student's first frame; shorter utterances are left out.

    Raises:
        ConfigError: the config is not valid.
        DataError: a table cannot be read; while iterating, audio is bad and not skipped.
    """

    def __init__(self, config: str | Path, seed: int = 1337, min_samples: int = 400):
        expert = load_runner_config(config).pretrain_expert
        rows = cached_rows(expert.datarc, min_samples)
        self._dataset = _single_utterances(expert.datarc, rows, min_samples, seed)

    def __len__(self) -> int:
        """Number of utterances, with those of bad audio."""
        return len(self._dataset)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for i in range(len(self._dataset)):
            batch = self._dataset[i]
            if batch.problem:
                raise DataError(batch.problem)
            if not batch.bad:
                yield batch.names[0], batch.waves[0]


def _compute_missing(
    writer: CacheWriter,
    dataset: DistillationDataset,
    compute: TargetFn,
    data: DataSettings,
    device: str,
) -> None:
    """Compute and write the targets of the utterances that the cache lacks."""
    index, count, cached = writer.index, len(dataset), len(writer.records)
    loader = BatchLoader(
        dataset,
        timeout=data.loader_timeout,
        batch_size=1,
        sampler=range(cached, count),
        num_workers=data.num_workers,
        collate_fn=unwrap_batch,
        worker_init_fn=ignore_stop_signals,
    )
    bar = tqdm(total=count, initial=cached, unit="utt", desc="targets", dynamic_ncols=True)
    with bar, contextlib.closing(loader):
        for batch in loader:
            if batch.problem:
                raise DataError(batch.problem)
            if batch.bad:
                logger.warning("left out %s: %s", batch.bad[0].path, batch.bad[0].reason)
                writer.add_bad()
            else:
                targets = pack_targets(compute([batch.waves[0].to(device)]), index.layout)
                encoded = encode_targets(targets, index.layout, index.dtype, batch.names[0])
                writer.add(*encoded, batch.waves[0])
            bar.update()


def relative_differences(
    dataset: DistillationDataset, compute: TargetFn, device: str
) -> dict[str, tuple[float, float]]:
    """Compare cached targets with targets computed in padded batches, for about four batches.

    Args:
        dataset: of a run with this cache, so that its batches have the cached targets.
        compute: see :func:`make_target_fn`.
        device: of the teachers.

    Returns:
        Mean and maximum of the absolute difference, divided by the mean absolute target.

    Raises:
        DataError: the audio is not that of the cache.
    """
    stride = max(1, len(dataset) // 4)  # from the longest utterances to the shortest
    # Sum of differences, largest difference, sum of absolute targets, number of values.
    totals: dict[str, tuple[float, float, float, int]] = {}
    for i in range(stride // 2, len(dataset), stride):
        batch = dataset[i]
        if batch.problem:
            raise DataError(batch.problem)
        if batch.targets is None:
            continue
        pairs = zip(batch.waves, batch.lengths.tolist(), strict=True)
        computed = compute([wave[:length].to(device) for wave, length in pairs])
        cached = batch.targets.on(device)
        for name, target in computed.items():
            stored = cached.values[name]
            count = min(target.shape[2], stored.shape[2])
            mask = torch.arange(count, device=stored.device) < cached.frames[:, None]
            target, stored = (x[:, :, :count].transpose(1, 2)[mask] for x in (target, stored))
            difference = (target - stored).abs()  # [valid frame, target, dim]
            total, worst, magnitude, values = totals.get(name, (0.0, 0.0, 0.0, 0))
            totals[name] = (
                total + float(difference.sum(dtype=torch.float64)),
                max(worst, float(difference.max())),
                magnitude + float(stored.abs().sum(dtype=torch.float64)),
                values + stored.numel(),
            )
    return {
        name: (total / (magnitude or 1.0), worst * values / (magnitude or 1.0))
        for name, (total, worst, magnitude, values) in totals.items()
    }
