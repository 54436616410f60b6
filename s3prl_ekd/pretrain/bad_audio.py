"""``bad_audio.tsv``: the utterances that ``on_bad_audio: skip`` leaves out of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.bad_audio import BadUtterance
from ..data.batch import Batch, BatchDataset
from ..errors import CheckpointError, DataError, printable
from ..files.atomic import atomic_file

logger = logging.getLogger(__name__)

FILE_NAME = "bad_audio.tsv"
COLUMNS = ("path", "reason", "times", "first epoch")
# Escapes as in PostgreSQL's text format, so that a cell has no tab and no line break.
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

Entries = dict[str, list]  # path -> [reason, times, first epoch]


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
        datasets: Sequence[BatchDataset],
        saved: Any = None,
        path: str = "",
    ):
        self.path = Path(folder) / FILE_NAME
        self._skipping = any(data.skip_bad for data in datasets)
        self._total = sum(data.utterances for data in datasets)
        self._entries = _parse({} if saved is None else saved, path)
        self._uncommitted: Entries = {}
        self._from_other_ranks: Sequence[Entries] = ()
        self._warned_kinds: set[str] = set()
        for data in datasets:
            self.record([bad for bad in data.left_out if bad.path not in self._entries], 0)
        self.commit()

    def record(self, bad: Sequence[BadUtterance], epoch: int) -> None:
        """Add the bad utterances of a batch; log the first of each kind of error."""
        for path, kind, reason in bad:
            _add(self._uncommitted, {path: [reason, 1, epoch]})
            if kind not in self._warned_kinds:
                self._warned_kinds.add(kind)
                logger.warning(
                    "left out %s: %s (logged once for each kind of error; see %s for all files)",
                    path,
                    reason,
                    self.path,
                )

    def usable(self, batch: Batch, epoch: int) -> Batch:
        """Record the bad utterances of a batch; return it without them.

        Raises DataError if an utterance could not be read, and ``on_bad_audio`` is ``error``.
        """
        self.record(batch.bad, epoch)
        if batch.problem:
            raise DataError(batch.problem)
        return batch._replace(bad=())

    def commit(self) -> None:
        """Add the entries recorded during the step, which is complete."""
        _add(self._entries, self._uncommitted)
        self._uncommitted = {}

    def state(self) -> Entries:
        """The committed entries, as plain data."""
        return self._entries

    def merge(self, states: Sequence[Entries]) -> Entries:
        """Merge :meth:`state` of each process, this one's first; keep the others for the file."""
        self._from_other_ranks = states[1:]
        return _add({}, *states)

    def write(self) -> None:
        """Write the list into the run's folder and log its length.

        If that fails, only log a warning, because checkpoints matter more.
        """
        entries = self._all_entries()
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
        first = next(iter(self._all_entries().items()), None)
        example = f"the first is {first[0]}, {first[1][0]}; " if first else ""
        return DataError(
            f"no usable utterance in an epoch over the tables of {tables}: {example}"
            f"check libri_root, and see {self.path}"
        )

    def _all_entries(self) -> Entries:
        return _add({}, self._entries, self._uncommitted, *self._from_other_ranks)


def _add(total: Entries, *lists: Mapping[str, Sequence]) -> Entries:
    """Add lists to ``total``: the first reason and epoch of an utterance, and all its times."""
    for entries in lists:
        for path, (reason, times, epoch) in entries.items():
            first_reason, count, first_epoch = total.get(path, (reason, 0, epoch))
            total[path] = [first_reason, count + times, min(first_epoch, epoch)]
    return total


def as_tensor(entries: Mapping[str, list]) -> Tensor | dict:
    """Encode the list for a checkpoint: JSON in a uint8 tensor; ``{}`` for an empty list.

    Our checkpoint reader limits the number of values, and a tensor counts as one.
    """
    if not entries:
        return {}
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def _parse(data: Any, checkpoint: str) -> Entries:
    try:
        if isinstance(data, Tensor):
            data = json.loads(data.numpy().tobytes())
        if not isinstance(data, Mapping):
            raise TypeError("not a mapping")
        for path, (reason, times, epoch) in data.items():
            if [type(value) for value in (path, reason, times, epoch)] != [str, str, int, int]:
                raise TypeError(f"{path!r} has {reason!r}, {times!r}, {epoch!r}")
        return dict(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: bad_audio: {error}") from None
