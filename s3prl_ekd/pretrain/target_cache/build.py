"""Run the teachers over a corpus, one utterance at a time, and keep what they say.

One at a time because their outputs depend on the padding that company brings (the first conv layer
of the Base models normalises over time). So a stored target is that of the utterance, or of its
fixed excerpt, alone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.audio_files import is_passed_over
from ...data.batches import DistillationDataset, leave_signals_to_the_main_process, only_item
from ...data.loader import BatchLoader
from ...data.sampling import FixedOrder
from ...data.tables import Utterance
from ...distill.aggregation import Separate
from ...distill.teachers import TeacherEnsemble
from ...errors import DataError, SetupError
from ...files.atomic import remove_leftovers
from ...hidden_states.fingerprint import same_key
from ...hidden_states.layout import joined
from ...hidden_states.numbers import to_numbers
from ...hidden_states.store import (
    INDEX,
    NAMES,
    RECORDS,
    SCALES,
    TARGETS,
    Index,
    read_index,
    write_index,
)
from ...hidden_states.writer import CacheWriter
from ..memory import is_out_of_memory, workers_explained

logger = logging.getLogger(__name__)

Tell = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]


def targets_of(
    teachers: TeacherEnsemble, aggregate: Separate | None, weights: Mapping[str, float]
) -> Tell:
    """What is stored of waveforms: ``{name: [batch, target, frame, dim]}``.

    Args:
        teachers: that are asked.
        aggregate: whose target sets to give; None: each teacher's own targets.
        weights: of the teachers in the aggregate.
    """

    @torch.no_grad()
    def tell(waves: Sequence[Tensor]) -> Mapping[str, Tensor]:
        hidden = teachers(waves)
        return hidden if aggregate is None else aggregate.targets(hidden, weights)

    return tell


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
    tell: Tell,
    rows: Sequence[Utterance],
    *,
    root: str,
    sequence_length: int,
    min_samples: int,
    skip_bad: bool,
    num_workers: int,
    device: str,
    timeout: float = 0,
) -> Index:
    """Make the rest of a cache; a progress bar shows how far it is.

    Args:
        folder: of the cache; this process alone writes to it.
        index: of :func:`begin`, for ``rows`` in this order.
        tell: see :func:`targets_of`.
        root, sequence_length, min_samples, skip_bad, num_workers: as in training.
        device: where the teachers are.
        timeout: seconds without an utterance from the workers until they are given up; 0: never.

    Raises:
        EkdError: audio is bad and not to be skipped, a target cannot be stored, or the disk is
            full; what was done stays done.
    """
    dataset = DistillationDataset(
        root, rows, 1, sequence_length, min_samples, seed=index.seed, skip_bad=skip_bad
    )
    again = "type the same command again, it goes on where it is"
    try:
        writer = CacheWriter(folder, index)
        try:
            with workers_explained(again):
                _fill(writer, dataset, tell, num_workers, device, timeout)
            if not any(record["frames"] for record in writer.records):
                raise DataError(f"no utterance of the tables can be used; check libri_root {root}")
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
    tell: Tell,
    num_workers: int,
    device: str,
    timeout: float,
) -> None:
    """From the first utterance that is not there to the last."""
    index, order = writer.index, FixedOrder(len(dataset))
    order.rank = done = len(writer.records)
    loader = BatchLoader(
        dataset,
        timeout=timeout,
        batch_size=1,
        sampler=order,
        num_workers=num_workers,
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
                targets = joined(tell([batch.waves[0].to(device)]), index.layout)
                numbers = to_numbers(targets, index.layout, index.dtype, batch.names[0])
                writer.add(*numbers, int(batch.lengths[0]))
            bar.update()
