"""The list of utterances that ``on_bad_audio: skip`` leaves out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.bad_audio import Bad
from ..data.batches import Batch, DistillationDataset
from ..errors import CheckpointError, DataError, printable
from ..files.atomic import whole_file

logger = logging.getLogger(__name__)

NAME = "bad_audio.tsv"
COLUMNS = ("path", "reason", "times", "first epoch")
# As in PostgreSQL's text format: a line stays a line, a cell a cell.
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

Entry = tuple[str, int, int]  # reason, times, first epoch


class BadAudioList:
    """The utterances that a run has left out, with the reason and how often.

    Entries count from the step after which they are committed. The list is part of a checkpoint, so
    that a run that was killed and resumed counts nothing twice.

    Args:
        folder: of the run; the list is written there.
        datasets: of the training and dev tables.
        saved: :func:`as_tensor` in the checkpoint that the run resumes from.
        path: of that checkpoint, for messages.

    Raises:
        CheckpointError: ``saved`` is no such list.
    """

    def __init__(
        self,
        folder: str | Path,
        datasets: Sequence[DistillationDataset],
        saved: Any = None,
        path: str = "",
    ):
        self.path = Path(folder) / NAME
        self._skipping = any(data.skip_bad for data in datasets)
        self._total = sum(len(data.left_out) + sum(map(len, data.batches)) for data in datasets)
        self._entries = _parse({} if saved is None else saved, path)
        self._uncommitted: dict[str, Entry] = {}
        self._of_others: list[dict[str, list]] = []  # entries of the other processes
        self._warned: set[str] = set()
        for data in datasets:
            new = [bad for bad in data.left_out if bad.path not in self._entries]
            self.record(new, 0)
        self.commit()

    def record(self, bad: Sequence[Bad], epoch: int) -> None:
        """Add the utterances that a batch lacks; warn of the first file of each kind."""
        for path, kind, reason in bad:
            first, times, begin = self._uncommitted.get(path, (reason, 0, epoch))
            self._uncommitted[path] = first, times + 1, begin
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning(
                    "left out %s: %s (said once for files of this kind; all will be in %s)",
                    path,
                    reason,
                    self.path,
                )

    def commit(self) -> None:
        """Count what was recorded since the last step: the step is done."""
        self._entries, self._uncommitted = self._all_entries(), {}

    def state(self) -> dict[str, list]:
        """The entries as of the last step, as plain data."""
        return {path: list(entry) for path, entry in self._entries.items()}

    def merge(self, states: Sequence[dict[str, list]]) -> dict[str, list]:
        """Merge the entries of all processes; keep those of the others for :meth:`write`.

        Args:
            states: :meth:`state` of each process, this one's first.
        """
        self._of_others = list(states[1:])
        merged: dict[str, list] = {}
        for entries in states:
            for path, (reason, times, epoch) in entries.items():
                first, before, begin = merged.get(path, (reason, 0, epoch))
                merged[path] = [first, before + times, min(begin, epoch)]
        return merged

    def write(self) -> None:
        """Write the list into the run's folder, and log its length. If it cannot be written, warn:
        checkpoints matter more."""
        own = {path: list(entry) for path, entry in self._all_entries().items()}
        entries = self.merge([own, *self._of_others])
        if not entries:
            if self._skipping:
                logger.info("no audio file was bad, of %d utterances", self._total)
            return
        lines = ["\t".join(COLUMNS)]
        for path, (reason, times, epoch) in sorted(entries.items()):
            texts = (printable(text.translate(_ESCAPED)) for text in (path, reason))
            lines.append("\t".join([*texts, str(times), str(epoch)]))
        try:
            with whole_file(self.path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            logger.warning("cannot write %s: %s", self.path, error.strerror)
            return
        logger.warning(
            "%d of %d utterances were left out, their audio is bad: see %s",
            len(entries),
            self._total,
            self.path,
        )

    def nothing_left(self, what: str) -> DataError:
        """The error for an epoch of ``what`` without a usable utterance."""
        files = [
            f"the first is {path}, {entry[0]}; " for path, entry in self._all_entries().items()
        ]
        return DataError(
            f"no utterance of a whole pass over {what} can be used: {''.join(files[:1])}check "
            f"libri_root, and see {self.path}"
        )

    def _all_entries(self) -> dict[str, Entry]:
        entries = dict(self._entries)
        for path, (reason, times, epoch) in self._uncommitted.items():
            first, before, begin = entries.get(path, (reason, 0, epoch))
            entries[path] = first, before + times, begin
        return entries


class UsableBatches:
    """The batches of a loader that have a usable utterance; what they lack goes into the list.

    Args:
        loader: of the batches.
        bad: the list.
        epoch: of the run.
        iterate: iterates over the loader.

    Raises:
        DataError: on iterating: an utterance could not be read.
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
    """The list as a checkpoint holds it: JSON in a tensor, because the reader limits how many
    values a checkpoint may have. An empty list is an empty mapping."""
    if not entries:
        return {}
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def _parse(data: Any, checkpoint: str) -> dict[str, Entry]:
    try:
        if isinstance(data, Tensor):
            data = json.loads(data.numpy().tobytes())
        if not isinstance(data, Mapping):
            raise TypeError("no mapping")
        for path, (reason, times, epoch) in data.items():
            types = [type(value) for value in (path, reason, times, epoch)]
            if types != [str, str, int, int]:
                raise TypeError(f"{path!r} has {reason!r}, {times!r}, {epoch!r}")
        return {path: tuple(entry) for path, entry in data.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: its list of bad audio: {error}") from None
