"""Teacher targets on disk: number formats, layout, index, writer, reader.

========  =====  =============================================================================
dtype     bytes  largest error of a number x (to nearest)
========  =====  =============================================================================
float16   2      2^-11 |x|, and 2^-25 near 0; nothing above 65504
bfloat16  2      2^-8 |x|; the range of float32
int8      1      half a step: the largest |x| of the utterance and layer, by 254
========  =====  =============================================================================

The files of a folder: ``index.json``, ``complete`` only at the end; ``utterances.json``, the
utterances in order, apart as the list may be long; ``targets.bin``, frames ``[frame, column]``, one
utterance after the other; ``scales.bin`` (int8), float32 ``[piece]`` an utterance;
``utterances.bin``, a :data:`RECORD` an utterance, written after its targets, so that its length
says how far a killed build has come.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data.bad_audio import BadAudio
from ..distill.batch import CachedTargets
from ..distill.target_norm import usable_frames
from ..errors import DataError, TeacherError
from ..files.atomic import whole_file
from ..files.formats import refuse_newer
from ..files.text import check_regular, read_json

# numpy has no bfloat16: its files hold the bits as int16
NUMPY = {"float16": np.float16, "bfloat16": np.int16, "int8": np.int8}
BYTES = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()}
STEPS = 127  # of int8, on either side of 0

INDEX, NAMES, RECORDS = "index.json", "utterances.json", "utterances.bin"
TARGETS, SCALES = "targets.bin", "scales.bin"
FORMAT, VERSION = "s3prl_ekd.target_cache", 1
PER_TEACHER = "per teacher"  # contents of a key: each teacher's own targets, not aggregated ones
# frames that are stored (0: its audio is bad); samples that were heard; CRC-32 of targets, scales
RECORD = np.dtype([("frames", "<u4"), ("samples", "<u4"), ("crc", "<u4")])
PARTS: dict[str, type | tuple[type, ...]] = {
    "teachers": dict,
    "teacher_precision": str,
    "contents": (str, dict),
    "sequence_length": int,
    "max_timestep": int,
    "tables": dict,
}  # of a key
KINDS = {
    "dtype": str,
    "layout": list,
    "seed": int,
    "key": dict,
    "utterances": str,
    "complete": bool,
    "digest": str,
}  # of the index; of the utterances it has a digest
MAX_NAMES = 1 << 32  # bytes; some ten million utterances
BUILD = "s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o"
EVERY = 10.0  # seconds between two moments from which a machine that lost its power could go on


def to_numbers(
    values: Tensor, layout: Layout, dtype: str, utterance: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Targets ``[frame, column]`` of an utterance as they are stored, and their scales ``[piece]``.

    Raises:
        TeacherError: a number is not finite, too large for float16, or so large that int8 would
            make zeros of all others.
    """
    values = values.float()
    if not values.isfinite().all():
        raise TeacherError(f"a teacher's output for {utterance} is not finite; leave it out")
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).cpu().view(torch.int16).numpy(), None
    if dtype == "float16":
        half = values.half()
        if not half.isfinite().all():
            raise TeacherError(
                f"a target of {utterance} is {values.abs().max():g}, and float16 ends at 65504; "
                "build with --dtype bfloat16"
            )
        return half.cpu().numpy(), None
    scales, stored, column = [], [], 0
    for _, count, dim in layout:
        part = values[:, column : column + count * dim].view(-1, count, dim)
        if not usable_frames(part).all():
            raise TeacherError(
                f"a target of {utterance} is {part.abs().max():g}, and int8 would make zeros of "
                "all others; build with --dtype bfloat16, or leave the utterance out"
            )
        scale = part.abs().amax((0, 2)) / STEPS  # [target]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        stored.append((part / scale[:, None]).round().clamp(-STEPS, STEPS).flatten(1))
        scales.append(scale)
        column += count * dim
    return torch.cat(stored, 1).to(torch.int8).cpu().numpy(), torch.cat(scales).cpu().numpy()


def to_tensor(stored: np.ndarray, dtype: str) -> Tensor:
    """The array of :func:`to_numbers`, of any shape, as a tensor of its ``dtype``."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


class Block(NamedTuple):
    """``targets`` vectors of ``dim`` numbers in each frame, of a teacher or a target set."""

    name: str
    targets: int
    dim: int


Layout = tuple[Block, ...]  # side by side in a frame, in this order


def columns(layout: Layout) -> int:
    """Numbers in a frame."""
    return sum(block.targets * block.dim for block in layout)


def pieces(layout: Layout) -> int:
    """Vectors in a frame, each of which has a scale where the numbers are int8."""
    return sum(block.targets for block in layout)


def joined(targets: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """``{name: [1, target, frame, dim]}`` of one utterance as ``[frame, column]``."""
    flat = [targets[block.name][0].transpose(0, 1).flatten(1) for block in layout]
    return torch.cat(flat, dim=1)


def parted(values: Tensor, scales: Tensor | None, layout: Layout) -> dict[str, Tensor]:
    """``[batch, frame, column]`` as ``{name: [batch, target, frame, dim]}`` in float32.

    Args:
        values: as stored.
        scales: ``[batch, piece]`` to multiply each vector with, or None.
        layout: of the columns.
    """
    batch, frames = values.shape[:2]
    targets, column, piece = {}, 0, 0
    for name, count, dim in layout:
        part = values[..., column : column + count * dim].view(batch, frames, count, dim)
        part = part.transpose(1, 2).float()  # [batch, target, frame, dim]
        if scales is not None:
            part = part * scales[:, piece : piece + count, None, None]
        targets[name] = part
        column, piece = column + count * dim, piece + count
    return targets


class Part(NamedTuple):
    """The share of a cache that a run reads: its ``layout``, the ``spans`` of columns ``(from,
    to)`` that it is made of, and the numbers of its ``pieces``."""

    layout: Layout
    spans: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]


def part_of(layout: Layout, wanted: Mapping[str, Sequence[int]]) -> Part:
    """Choose blocks, and of each some targets by their numbers, in the order of ``wanted``."""
    starts, column, piece = {}, 0, 0
    for block in layout:
        starts[block.name] = block, column, piece
        column, piece = column + block.targets * block.dim, piece + block.targets
    chosen, numbers = [], []
    spans: list[tuple[int, int]] = []
    for name, targets in wanted.items():
        block, column, piece = starts[name]
        chosen.append(Block(name, len(targets), block.dim))
        for target in targets:
            begin = column + target * block.dim
            if spans and spans[-1][1] == begin:
                spans[-1] = spans[-1][0], begin + block.dim
            else:
                spans.append((begin, begin + block.dim))
            numbers.append(piece + target)
    return Part(tuple(chosen), tuple(spans), tuple(numbers))


@dataclass(frozen=True)
class Index:
    """``key``: see :mod:`.fingerprint`. ``seed``: of the excerpts. ``digest``: of
    ``utterances.bin``."""

    dtype: str
    layout: Layout
    seed: int
    key: dict[str, Any]
    utterances: tuple[str, ...]
    complete: bool = False
    digest: str = ""

    @property
    def frame_bytes(self) -> int:
        return columns(self.layout) * BYTES[self.dtype]

    @property
    def scale_bytes(self) -> int:
        """Bytes of an utterance's scales."""
        return 4 * pieces(self.layout) if self.dtype == "int8" else 0


def write_index(folder: Path, index: Index) -> None:
    """Write the names, then ``index.json``, each whole or not at all. Raises OSError."""
    names = json.dumps(index.utterances, indent=0, ensure_ascii=True).encode()
    with whole_file(folder / NAMES) as file:
        file.write(names)
    data = {"format": FORMAT, "version": VERSION, "made_by": f"s3prl_ekd {__version__}"}
    data |= asdict(index) | {"layout": [list(block) for block in index.layout]}
    data["utterances"] = _digest(names)
    with whole_file(folder / INDEX) as file:
        file.write(json.dumps(data, indent=1).encode() + b"\n")


def read_index(folder: Path) -> Index:
    """Read ``index.json`` and the names.

    Raises:
        DataError: they are not there, or damaged or of another version.
        NewerFormatError: a newer s3prl_ekd wrote them.
    """
    try:
        data = read_json(folder / INDEX, "index of the target cache", DataError)
        if data.get("format") == FORMAT and data.get("version") != VERSION:
            refuse_newer(data.get("version"), VERSION, f"the target cache {folder}")
            raise DataError(
                f"{folder} is a target cache of version {str(data.get('version'))[:20]}; this "
                f"s3prl_ekd reads version {VERSION}"
            )
        check_regular(folder / NAMES, "list of utterances", DataError, MAX_NAMES)
        return _index(data, (folder / NAMES).read_bytes())
    except DataError as error:
        raise DataError(f"{error}; build one with: {BUILD} NEW_FOLDER") from None
    except OSError as error:
        raise DataError(f"cannot read {folder / NAMES}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / INDEX} is damaged or no index of a target cache: {str(error)[:200]}; build "
            f"one with: {BUILD} NEW_FOLDER"
        ) from None


def _index(data: dict[str, Any], names: bytes) -> Index:
    if data["format"] != FORMAT:
        raise ValueError("it says that it is something else")
    for name, kind in KINDS.items():
        if type(data[name]) is not kind:
            raise TypeError(f"its {name} is none")
    layout = tuple(Block(*block) for block in data["layout"])
    for name, targets, dim in layout:
        if not (type(name) is str and type(targets) is int and type(dim) is int):
            raise TypeError("its layout is none")
        if not (0 < targets <= 10_000 and 0 < dim <= 1_000_000):
            raise ValueError("its layout is none")
    if data["dtype"] not in BYTES or not layout:
        raise ValueError("its dtype or layout is none")
    if not all(isinstance(data["key"].get(part), kind) for part, kind in PARTS.items()):
        raise TypeError("its key is none")
    if _digest(names) != data["utterances"]:
        raise ValueError(f"{NAMES} has changed")
    utterances = json.loads(names)
    if type(utterances) is not list or not all(type(name) is str for name in utterances):
        raise TypeError(f"{NAMES} is no list of texts")
    made = {name: data[name] for name in KINDS}
    return Index(**made | {"layout": layout, "utterances": tuple(utterances)})


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_records(folder: Path) -> np.ndarray:
    """The whole records of ``utterances.bin``, as many as there are. Raises OSError."""
    data = (folder / RECORDS).read_bytes()
    return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)


def digest(folder: Path) -> str:
    """Of ``utterances.bin``, which has a checksum of each utterance's targets. Raises OSError."""
    return _digest((folder / RECORDS).read_bytes())


def checked_records(folder: Path, index: Index) -> np.ndarray:
    """The records of a complete cache, all files being as long as they say.

    Raises:
        DataError: it is not complete, a file is missing or has another size, or the records have
            changed.
    """
    if not index.complete:
        done = 0
        if (folder / RECORDS).is_file():
            done = min(len(read_records(folder)), len(index.utterances))
        raise DataError(
            f"the target cache {folder} is not complete: {done} of {len(index.utterances)} "
            f"utterances are done; go on building it with: {BUILD} {shlex.quote(str(folder))}"
        )
    count = len(index.utterances)
    try:
        check_regular(folder / RECORDS, "target cache's file", DataError)
        records = read_records(folder)
        expected = {
            RECORDS: count * RECORD.itemsize,
            TARGETS: int(records["frames"].sum(dtype=np.int64)) * index.frame_bytes,
        }
        if index.scale_bytes:
            expected[SCALES] = count * index.scale_bytes
        for name, size in expected.items():
            check_regular(folder / name, "target cache's file", DataError)
            found = os.path.getsize(folder / name)
            if found != size:
                raise _damaged(folder / name, f"it has {found} bytes and should have {size}")
        if digest(folder) != index.digest:
            raise _damaged(folder / RECORDS, "its contents have changed")
    except OSError as error:
        raise _damaged(error.filename, str(error.strerror)) from None
    return records


def _damaged(path: str | Path, why: str) -> DataError:
    return DataError(
        f"the target cache is damaged: {path}: {why}; build it anew with --force: {BUILD} "
        f"{Path(path).parent} --force"
    )


class StoredTargets(NamedTuple):
    """Targets of a batch on their way to the device: as they are stored, so no larger than needed.

    ``values`` ``[batch, frame, column]``, zeros behind the end of each; ``frames`` ``[batch]``;
    ``scales`` ``[batch, piece]`` where the numbers are int8; ``layout`` of the columns;
    ``aggregated``: they are target sets, and not each teacher's own targets.
    """

    values: Tensor
    frames: Tensor
    scales: Tensor | None
    layout: Layout
    aggregated: bool

    def on(self, device: str) -> CachedTargets:
        """In float32, on a device."""
        values = self.values.to(device, non_blocking=True)
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        # a pinned copy may come back with lists in the place of tuples
        targets = parted(values, scales, self.layout)
        return CachedTargets(
            targets, self.frames.to(device, non_blocking=True), bool(self.aggregated)
        )


class TargetReader:
    """A complete cache, read only; any number of processes may have one.

    The files are mapped where they are first read, so a worker process has a map of its own whether
    it was forked or spawned. An utterance's checksum is looked at when a process first reads it.

    Args:
        folder: of the cache.
        index: of it, where it was read already.

    Attributes:
        seed: of the excerpts that the teachers heard, all drawn as for epoch 0.
        part: what :meth:`batch` gives; everything, unless it is set.

    Raises:
        DataError: it is not complete, or damaged.
    """

    def __init__(self, folder: str | Path, index: Index | None = None):
        self.folder = Path(folder)
        self.index = read_index(self.folder) if index is None else index
        self.records = checked_records(self.folder, self.index)
        self.seed = self.index.seed
        ends = np.cumsum(self.records["frames"], dtype=np.int64)
        self._starts = ends - self.records["frames"]
        self._rows = {name: row for row, name in enumerate(self.index.utterances)}
        self._width = self.index.frame_bytes // np.dtype(NUMPY[self.index.dtype]).itemsize
        every = tuple(range(pieces(self.index.layout)))
        self.part = Part(self.index.layout, ((0, self._width),), every)
        self._targets: np.ndarray | None = None  # [frame, column]; no map where nothing is stored
        self._scales: np.ndarray | None = None
        self._seen = np.zeros(len(self.records), bool)

    def __getstate__(self) -> dict:
        """Without the maps: pickled for a spawned worker they would be copies of the files."""
        return {**self.__dict__, "_targets": None, "_scales": None}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def check(self, name: str, samples: int) -> None:
        """Refuse an utterance that has no targets, or not those of these ``samples``.

        Raises:
            BadAudio: its audio was bad when the cache was built.
            DataError: the audio is longer or shorter than it was then.
        """
        frames, heard, _ = self.records[self._rows[name]]
        if frames == 0:
            raise BadAudio(
                name, "no targets", f"it was bad when the target cache {self.folder} was built"
            )
        if heard != samples:
            raise DataError(
                f"{name} has {samples} samples to hear and the teachers heard {heard} when the "
                f"target cache {self.folder} was built: its audio has changed; build another with: "
                f"{BUILD} NEW_FOLDER"
            )

    def batch(self, names: Sequence[str]) -> StoredTargets:
        """The targets of utterances that :meth:`check` has nothing against.

        Raises:
            DataError: the file's contents have changed since it was built.
        """
        if self._targets is None:
            self._map()
        targets = self._targets
        assert targets is not None  # check() refuses utterances without any
        rows = [self._rows[name] for name in names]
        frames = self.records["frames"][rows].astype(np.int64)
        layout, spans, wanted = self.part
        width = sum(end - begin for begin, end in spans)
        values = np.empty((len(rows), frames.max(), width), NUMPY[self.index.dtype])
        for i, row in enumerate(rows):
            count, start = frames[i], self._starts[row]
            stored = targets[start : start + count]
            if not self._seen[row]:
                self._verify(row, stored)
            column = 0
            for begin, end in spans:
                values[i, :count, column : column + end - begin] = stored[:, begin:end]
                column += end - begin
            values[i, count:] = 0
        scales = None
        if self._scales is not None:
            scales = torch.from_numpy(self._scales[rows][:, list(wanted)])
        return StoredTargets(
            to_tensor(values, self.index.dtype),
            torch.from_numpy(frames),
            scales,
            layout,
            self.index.key["contents"] != PER_TEACHER,
        )

    def _map(self) -> None:
        if self.records["frames"].any():
            shape = (-1, self._width)
            kind = NUMPY[self.index.dtype]
            self._targets = np.memmap(self.folder / TARGETS, kind, mode="r").reshape(shape)
        if self.index.scale_bytes:
            shape = (len(self.records), -1)
            self._scales = np.memmap(self.folder / SCALES, np.float32, mode="r").reshape(shape)

    def _verify(self, row: int, stored: np.ndarray) -> None:
        scales = b"" if self._scales is None else self._scales[row].tobytes()
        if checksum(stored, scales) != self.records["crc"][row]:
            raise DataError(
                f"the target cache is damaged: in {self.folder / TARGETS} the targets of "
                f"{self.index.utterances[row]} have changed since they were written; build it anew "
                f"with --force: {BUILD} {shlex.quote(str(self.folder))} --force"
            )
        self._seen[row] = True


def checksum(stored: np.ndarray, scales: bytes = b"") -> int:
    """CRC-32 of an utterance's targets ``[frame, column]`` and then its scales."""
    return zlib.crc32(scales, zlib.crc32(stored.data))


class CacheWriter:
    """The files of a cache that is being built; what is behind the last whole record is cut off.

    Targets first, their record after them: whatever ends the process, the records that are there
    are of targets that are there. The same goes for a power cut, as the targets are synced before
    their records are written.

    Args:
        folder: exists, and this process alone writes to it.
        index: not complete; its file is written if there is none.

    Attributes:
        records: of the utterances done, in the index's order.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        self._files: dict[str, BinaryIO] = {}
        for name in (RECORDS, TARGETS, *([SCALES] if index.scale_bytes else [])):
            (folder / name).touch()
        records = read_records(folder)[: len(index.utterances)]
        sizes = os.path.getsize(folder / TARGETS), 0
        if index.scale_bytes:
            sizes = sizes[0], os.path.getsize(folder / SCALES)
        frames = np.cumsum(records["frames"], dtype=np.int64)
        done = int(np.searchsorted(frames * index.frame_bytes, sizes[0], side="right"))
        if index.scale_bytes:
            done = min(done, sizes[1] // index.scale_bytes)
        self.records = list(records[:done])
        ends = {
            RECORDS: done * RECORD.itemsize,
            TARGETS: int(frames[done - 1]) * index.frame_bytes if done else 0,
            SCALES: done * index.scale_bytes,
        }
        for name in (TARGETS, SCALES, RECORDS):
            if name == SCALES and not index.scale_bytes:
                continue
            file = self._files[name] = open(folder / name, "r+b")
            file.truncate(ends[name])
            file.seek(0, os.SEEK_END)
        self._waiting: list[np.void] = []
        self._synced = time.monotonic()

    def add(self, stored: np.ndarray, scales: np.ndarray | None, samples: int) -> None:
        """The next utterance's targets ``[frame, column]``. Raises OSError."""
        stored = np.ascontiguousarray(stored)
        last = b"" if scales is None else scales.astype("<f4").tobytes()
        self._files[TARGETS].write(stored.data)
        if self.index.scale_bytes:
            self._files[SCALES].write(last)
        self._record(len(stored), samples, checksum(stored, last))

    def add_bad(self) -> None:
        """The next utterance has no targets: its audio is bad. Raises OSError."""
        if self.index.scale_bytes:
            self._files[SCALES].write(bytes(self.index.scale_bytes))
        self._record(0, 0, 0)

    def _record(self, frames: int, samples: int, crc: int) -> None:
        record = np.array([(frames, samples, crc)], RECORD)[0]
        self.records.append(record)
        self._waiting.append(record)
        if time.monotonic() - self._synced > EVERY:
            self.save()

    def save(self) -> None:
        """Put on the disk what was added. Raises OSError."""
        for name in (TARGETS, SCALES):
            if name in self._files:
                self._files[name].flush()
                os.fsync(self._files[name].fileno())
        # Taken out first: Ctrl-C on the way may lose records, and must not write them twice.
        waiting, self._waiting = self._waiting, []
        self._files[RECORDS].write(b"".join(record.tobytes() for record in waiting))
        self._files[RECORDS].flush()
        os.fsync(self._files[RECORDS].fileno())
        self._synced = time.monotonic()

    def finish(self) -> Index:
        """All are there: say so in the index. Raises OSError."""
        self.save()
        values = {**self.index.__dict__, "complete": True, "digest": digest(self.folder)}
        index = Index(**values)
        write_index(self.folder, index)
        return index

    def close(self) -> None:
        """Close the files; what was not saved is cut off at the next start."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk: what is lost was never recorded
                pass
        self._files.clear()
