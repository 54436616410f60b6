"""``bad_audio.tsv``: the utterances that ``on_bad_audio: skip`` leaves out of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.bad_audio import BadUtterance
from ..data.batches import Batch, DistillationDataset
from ..errors import CheckpointError, DataError, printable
from ..files.atomic import atomic_file

logger = logging.getLogger(__name__)

FILE_NAME = "bad_audio.tsv"
COLUMNS = ("path", "reason", "times", "first epoch")
# Escapes as in PostgreSQL's text format, so that a cell has no tab and no line break.
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

BadAudioRow = tuple[str, int, int]  # reason, times, first epoch


class BadAudioList:
    """The utterances that a run has left out, with the reason and how often.

    :meth:`record` collects entries, :meth:`commit` adds them once the step is complete. Checkpoints
    contain the list, so that a resumed run counts no utterance twice.

    Args:
        folder: of the run; the list is written there.
        datasets: of the training and dev tables.
        saved: the list in the checkpoint that the run resumes from, as :func:`as_tensor` made it.
        path: of that checkpoint, for messages.

    Raises:
        CheckpointError: ``saved`` is invalid.
    """

    def __init__(
        self,
        folder: str | Path,
        datasets: Sequence[DistillationDataset],
        saved: Any = None,
        path: str = "",
    ):
        self.path = Path(folder) / FILE_NAME
        self._skipping = any(data.skip_bad for data in datasets)
        self._total = sum(len(data.left_out) + sum(map(len, data.batches)) for data in datasets)
        self._entries = _parse({} if saved is None else saved, path)
        self._uncommitted: dict[str, BadAudioRow] = {}
        self._from_other_ranks: list[dict[str, list]] = []  # entries of the other ranks
        self._warned_kinds: set[str] = set()
        for data in datasets:
            self.record([bad for bad in data.left_out if bad.path not in self._entries], 0)
        self.commit()

    def record(self, bad: Sequence[BadUtterance], epoch: int) -> None:
        """Add the bad utterances of a batch; log the first of each kind of error."""
        for path, kind, reason in bad:
            first_reason, times, first_epoch = self._uncommitted.get(path, (reason, 0, epoch))
            self._uncommitted[path] = first_reason, times + 1, first_epoch
            if kind not in self._warned_kinds:
                self._warned_kinds.add(kind)
                logger.warning(
                    "left out %s: %s (logged once for each kind of error; see %s for all files)",
                    path,
                    reason,
                    self.path,
                )

    def commit(self) -> None:
        """Add the entries recorded during the step, which is complete."""
        self._entries, self._uncommitted = self._all_entries(), {}

    def state(self) -> dict[str, list]:
        """The committed entries, as plain data."""
        return {path: list(entry) for path, entry in self._entries.items()}

    def merge(self, states: Sequence[dict[str, list]]) -> dict[str, list]:
        """Merge the entries of all processes; keep the other processes' for :meth:`write`.

        Args:
            states: :meth:`state` of each process, this one's first.
        """
        self._from_other_ranks = list(states[1:])
        merged: dict[str, list] = {}
        for entries in states:
            for path, (reason, times, epoch) in entries.items():
                first_reason, count, first_epoch = merged.get(path, (reason, 0, epoch))
                merged[path] = [first_reason, count + times, min(first_epoch, epoch)]
        return merged

    def write(self) -> None:
        """Write the list into the run's folder and log its length.

        If that fails, only log a warning, because checkpoints matter more.
        """
        entries_here = {path: list(entry) for path, entry in self._all_entries().items()}
        entries = self.merge([entries_here, *self._from_other_ranks])
        if not entries:
            if self._skipping:
                logger.info("no bad audio in %d utterances", self._total)
            return
        lines = ["\t".join(COLUMNS)]
        for path, (reason, times, epoch) in sorted(entries.items()):
            texts = (printable(text.translate(_ESCAPED)) for text in (path, reason))
            lines.append("\t".join([*texts, str(times), str(epoch)]))
        try:
            with atomic_file(self.path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            logger.warning("cannot write %s: %s", self.path, error.strerror)
            return
        logger.warning(
            "%d of %d utterances left out because of bad audio: see %s",
            len(entries),
            self._total,
            self.path,
        )

    def no_usable_audio(self, tables: str) -> DataError:
        """The error for an epoch over ``tables`` (``sets``, ``dev_sets``) without usable audio."""
        files = [
            f"the first is {path}, {entry[0]}; " for path, entry in self._all_entries().items()
        ]
        return DataError(
            f"no usable utterance in an epoch over the tables of {tables}: {''.join(files[:1])}"
            f"check libri_root, and see {self.path}"
        )

    def _all_entries(self) -> dict[str, BadAudioRow]:
        entries = dict(self._entries)
        for path, (reason, times, epoch) in self._uncommitted.items():
            first_reason, count, first_epoch = entries.get(path, (reason, 0, epoch))
            entries[path] = first_reason, count + times, first_epoch
        return entries


class UsableBatches:
    """Iterate over the batches with a usable utterance; record bad audio in the list.

    Args:
        loader: gives the batches.
        bad: the list.
        epoch: current epoch, for the list.
        iterate: iterates over the loader.

    Raises:
        DataError: during iteration, if an utterance could not be read.
    """

    def __init__(
        self,
        loader: DataLoader,
        bad: BadAudioList,
        epoch: int,
        iterate: Callable[[DataLoader], Iterator[Batch]] = iter,
    ):
        self.loader = loader
        self.iterate = iterate
        self.bad = bad
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.iterate(self.loader):
            self.bad.record(batch.bad, self.epoch)
            if batch.problem:
                raise DataError(batch.problem)
            if batch.names:
                yield batch._replace(bad=())


def as_tensor(entries: Mapping[str, list]) -> Tensor | dict:
    """Encode the list for a checkpoint: JSON in a uint8 tensor; ``{}`` for an empty list.

    Our checkpoint reader limits the number of values, and a tensor counts as one.
    """
    if not entries:
        return {}
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def _parse(data: Any, checkpoint: str) -> dict[str, BadAudioRow]:
    try:
        if isinstance(data, Tensor):
            data = json.loads(data.numpy().tobytes())
        if not isinstance(data, Mapping):
            raise TypeError("not a mapping")
        for path, (reason, times, epoch) in data.items():
            types = [type(value) for value in (path, reason, times, epoch)]
            if types != [str, str, int, int]:
                raise TypeError(f"{path!r} has {reason!r}, {times!r}, {epoch!r}")
        return {path: tuple(entry) for path, entry in data.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: bad_audio: {error}") from None
