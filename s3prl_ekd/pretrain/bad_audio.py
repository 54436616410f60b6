"""The utterances that ``on_bad_audio: skip`` leaves out: warned of, counted, listed."""

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
    """What was left out of a run, as of its last update; and since, which a resumed run finds anew.

    It lives in the checkpoints, so that a run that was killed and resumed counts nothing twice.

    Args:
        folder: of the run; the list is written there.
        datasets: of the training and dev tables.
        saved: :func:`stored` in the checkpoint that the run goes on from.
        where: what messages call that.

    Raises:
        CheckpointError: ``saved`` is no such list.
    """

    def __init__(
        self,
        folder: str | Path,
        datasets: Sequence[DistillationDataset],
        saved: Any = None,
        where: str = "",
    ):
        self.path = Path(folder) / NAME
        self._skipping = any(data.skip_bad for data in datasets)
        self._total = sum(len(data.left_out) + sum(map(len, data.batches)) for data in datasets)
        self._known = _unpacked({} if saved is None else saved, where)
        self._since: dict[str, Entry] = {}
        self._elsewhere: list[dict[str, list]] = []
        self._warned: set[str] = set()
        for data in datasets:
            new = [bad for bad in data.left_out if bad.path not in self._known]
            self.found(new, 0)
        self.commit()

    def found(self, bad: Sequence[Bad], epoch: int) -> None:
        """Take down what a batch lacks; a warning for the first file of each kind."""
        for path, kind, reason in bad:
            first, times, begin = self._since.get(path, (reason, 0, epoch))
            self._since[path] = first, times + 1, begin
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning(
                    "left out %s: %s (said once for files of this kind; all will be in %s)",
                    path,
                    reason,
                    self.path,
                )

    def commit(self) -> None:
        """An update is done: what was found on its way belongs to it."""
        self._known, self._since = self._whole(), {}

    def packed(self) -> dict[str, list]:
        """The list as of the last update, as plain data."""
        return {path: list(entry) for path, entry in self._known.items()}

    def gathered(self, every: Sequence[dict[str, list]]) -> dict[str, list]:
        """The lists of all processes as one, and for :meth:`write` those of the others.

        Args:
            every: :meth:`packed` of each process, this one's first.
        """
        self._elsewhere = list(every[1:])
        whole: dict[str, list] = {}
        for entries in every:
            for path, (reason, times, epoch) in entries.items():
                first, before, begin = whole.get(path, (reason, 0, epoch))
                whole[path] = [first, before + times, min(begin, epoch)]
        return whole

    def write(self) -> None:
        """Write the list into the run's folder, and say how long it is. A list that cannot be
        written is a warning: checkpoints matter more."""
        mine = {path: list(entry) for path, entry in self._whole().items()}
        entries = self.gathered([mine, *self._elsewhere])
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
        """The error for a pass over ``what`` of which no utterance could be used."""
        found = [f"the first is {path}, {entry[0]}; " for path, entry in self._whole().items()]
        return DataError(
            f"no utterance of a whole pass over {what} can be used: {''.join(found[:1])}check "
            f"libri_root, and see {self.path}"
        )

    def _whole(self) -> dict[str, Entry]:
        whole = dict(self._known)
        for path, (reason, times, epoch) in self._since.items():
            first, before, begin = whole.get(path, (reason, 0, epoch))
            whole[path] = first, before + times, begin
        return whole


class UsableBatches:
    """The batches of a loader that have an utterance left; the others are in the list.

    Args:
        loader: of the batches.
        bad: the list.
        epoch: of the run.
        wait: what iterates over the loader.
    """

    def __init__(
        self,
        loader: DataLoader,
        bad: BadAudioList,
        epoch: int,
        wait: Callable[[DataLoader], Iterator[Batch]] = iter,
    ):
        self.loader = loader
        self.wait = wait
        self.bad = bad
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.wait(self.loader):
            self.bad.found(batch.bad, self.epoch)
            if batch.names:
                yield batch._replace(bad=())


def stored(entries: Mapping[str, list]) -> Tensor | dict:
    """The list as a checkpoint holds it: JSON in a tensor, for as values it could be more than what
    a checkpoint may have of them. An empty list is an empty mapping."""
    if not entries:
        return {}
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def _unpacked(data: Any, where: str) -> dict[str, Entry]:
    try:
        if isinstance(data, Tensor):
            data = json.loads(data.numpy().tobytes())
        if not isinstance(data, Mapping):
            raise TypeError("no mapping")
        for path, (reason, times, epoch) in data.items():
            kinds = [type(each) for each in (path, reason, times, epoch)]
            if kinds != [str, str, int, int]:
                raise TypeError(f"{path!r} has {reason!r}, {times!r}, {epoch!r}")
        return {path: tuple(entry) for path, entry in data.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: its list of bad audio: {error}") from None
