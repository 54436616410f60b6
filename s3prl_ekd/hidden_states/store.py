"""Teacher targets on disk: number formats, layout, index, writer, reader.

========  =====  =============================================================================
dtype     bytes  largest rounding error of a number x
========  =====  =============================================================================
float16   2      2^-11 |x|, and 2^-25 near 0; nothing above 65504
bfloat16  2      2^-8 |x|; the range of float32
int8      1      half a step: the largest |x| of the utterance and layer, divided by 254
========  =====  =============================================================================

The files of a cache folder:

- ``index.json``: the :class:`Index`; ``complete`` is set at the end of the build;
- ``utterances.json``: the utterances in order, separate because the list may be long;
- ``targets.bin``: frames ``[frame, column]``, utterance after utterance;
- ``scales.bin`` (int8 only): float32 ``[vector]`` for each utterance;
- ``utterances.bin``: a :data:`RECORD` for each utterance, written after its targets. Its length
  shows how far an interrupted build has come.

These are no safetensors files, because a build must be able to continue after a power failure, and
a safetensors header names all tensors before the first of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import shlex
import time
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data.bad_audio import BadAudio
from ..distill.batch import CachedTargets
from ..distill.moments import usable_frames
from ..errors import DataError, TeacherError
from ..files.atomic import atomic_file
from ..files.formats import check_format_version
from ..files.text import check_regular, read_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
INT8_MAX = 127

INDEX, UTTERANCES, RECORDS = "index.json", "utterances.json", "utterances.bin"
TARGETS, SCALES = "targets.bin", "scales.bin"
FORMAT, VERSION = "s3prl_ekd.target_cache", 2  # version 1 has no loudness
PER_TEACHER = "per teacher"  # `contents` of a key whose targets are not aggregated
LOUDNESS_PARTS = 8
# stored frames (0: bad audio); samples the teachers got; CRC-32 of targets and scales; loudness of
# the parts of what the teachers got
RECORD = np.dtype(
    [("frames", "<u4"), ("samples", "<u4"), ("crc", "<u4"), ("loudness", "<f4", (LOUDNESS_PARTS,))]
)
RECORD_1 = np.dtype(RECORD.descr[:3])  # of version 1
KEY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "teachers": dict,
    "teacher_precision": str,
    "contents": (str, dict),
    "sequence_length": int,
    "max_timestep": int,
    "tables": dict,
}
INDEX_FIELDS = {
    "dtype": str,
    "layout": list,
    "seed": int,
    "key": dict,
    "utterances": str,
    "complete": bool,
    "digest": str,
    "version": int,
}  # `utterances` is the digest of utterances.json
MAX_LIST_BYTES = 1 << 32  # of utterances.json; tens of millions of utterances
BUILD = "s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o"
SYNC_SECONDS = 10.0  # seconds between two syncs to disk: the most that a power failure loses


class TargetBlock(NamedTuple):
    """A teacher's or target set's share of a frame: ``targets`` vectors of ``dim`` numbers."""

    name: str
    targets: int
    dim: int


TargetLayout = tuple[TargetBlock, ...]  # the blocks of a frame, in this order


def frame_width(layout: TargetLayout) -> int:
    """Number of values in a frame."""
    return sum(block.targets * block.dim for block in layout)


def vectors_per_frame(layout: TargetLayout) -> int:
    """Number of vectors in a frame; with int8 each has a scale."""
    return sum(block.targets for block in layout)


def array_dtype(dtype: str) -> np.dtype:
    """The dtype of arrays with stored values: integers of that size, as numpy has no bfloat16."""
    return np.dtype(f"i{DTYPES[dtype].itemsize}")


def encode_targets(
    values: Tensor, layout: TargetLayout, dtype: str, utterance: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert targets ``[frame, column]`` to the stored dtype and scales ``[vector]``.

    Raises:
        TeacherError: a number is not finite, too large for ``dtype``, or so large that int8 would
            round all other numbers to zero.
    """
    values = values.float()
    if not values.isfinite().all():
        raise TeacherError(f"{utterance}: a teacher's output is not finite; remove the utterance")
    if dtype != "int8":
        stored = values.to(DTYPES[dtype]).cpu()
        if not stored.isfinite().all():
            limit = torch.finfo(DTYPES[dtype]).max
            raise _too_large(values, f"above {dtype}'s {limit:g}", utterance)
        return stored.view(torch.int16).numpy(), None
    scales, blocks, column = [], [], 0
    for _, count, dim in layout:
        block = values[:, column : column + count * dim].view(-1, count, dim)
        if not usable_frames(block).all():
            raise _too_large(block, "and int8 would round all others to zero", utterance)
        scale = block.abs().amax((0, 2)) / INT8_MAX  # [target]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        blocks.append((block / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).flatten(1))
        scales.append(scale)
        column += count * dim
    return torch.cat(blocks, 1).to(torch.int8).cpu().numpy(), torch.cat(scales).cpu().numpy()


def _too_large(values: Tensor, reason: str, utterance: str) -> TeacherError:
    return TeacherError(
        f"{utterance}: a target is {values.abs().max():g}, {reason}; build with "
        "--dtype bfloat16, or remove the utterance"
    )


def pack_targets(targets: Mapping[str, Tensor], layout: TargetLayout) -> Tensor:
    """``{name: [1, target, frame, dim]}`` of one utterance -> ``[frame, column]``."""
    flat = [targets[block.name][0].transpose(0, 1).flatten(1) for block in layout]
    return torch.cat(flat, dim=1)


def unpack_targets(
    values: Tensor, scales: Tensor | None, layout: TargetLayout
) -> dict[str, Tensor]:
    """``[batch, frame, column]`` -> ``{name: [batch, target, frame, dim]}`` in float32.

    ``scales`` ``[batch, vector]`` has the factor of each vector.
    """
    batch, frames = values.shape[:2]
    targets, column, vector = {}, 0, 0
    for name, count, dim in layout:
        block = values[..., column : column + count * dim].view(batch, frames, count, dim)
        block = block.transpose(1, 2).float()  # [batch, target, frame, dim]
        if scales is not None:
            block = block * scales[:, vector : vector + count, None, None]
        targets[name] = block
        column, vector = column + count * dim, vector + count
    return targets


class TargetSubset(NamedTuple):
    """The subset of a cache that a run reads.

    ``layout``: its blocks; ``spans``: the ``(begin, end)`` of its values in a stored frame;
    ``vectors``: the indices of its vectors.
    """

    layout: TargetLayout
    spans: tuple[tuple[int, int], ...]
    vectors: tuple[int, ...]


def select_targets(layout: TargetLayout, selected: Mapping[str, Sequence[int]]) -> TargetSubset:
    """Select blocks by name, and targets of each by index, in the order of ``selected``."""
    starts, column, vector = {}, 0, 0
    for block in layout:
        starts[block.name] = block, column, vector
        column, vector = column + block.targets * block.dim, vector + block.targets
    blocks, vectors = [], []
    spans: list[tuple[int, int]] = []
    for name, targets in selected.items():
        block, column, vector = starts[name]
        blocks.append(TargetBlock(name, len(targets), block.dim))
        for target in targets:
            begin = column + target * block.dim
            if spans and spans[-1][1] == begin:
                spans[-1] = spans[-1][0], begin + block.dim
            else:
                spans.append((begin, begin + block.dim))
            vectors.append(vector + target)
    return TargetSubset(tuple(blocks), tuple(spans), tuple(vectors))


@dataclass(frozen=True)
class Index:
    """The contents of ``index.json`` and ``utterances.json``.

    ``seed``: of the excerpts; ``key``: see :mod:`.fingerprint`; ``digest``: of ``utterances.bin``;
    ``version``: of the format.
    """

    dtype: str
    layout: TargetLayout
    seed: int
    key: dict[str, Any]
    utterances: tuple[str, ...]
    complete: bool = False
    digest: str = ""
    version: int = VERSION

    @property
    def record(self) -> np.dtype:
        """The records of ``utterances.bin``."""
        return RECORD if self.version > 1 else RECORD_1

    def file_bytes(self, utterances: int, frames: int) -> dict[str, int]:
        """Size of each binary file after some utterances that have ``frames`` frames together."""
        sizes = {TARGETS: frames * frame_width(self.layout) * DTYPES[self.dtype].itemsize}
        if self.dtype == "int8":
            sizes[SCALES] = utterances * vectors_per_frame(self.layout) * 4
        return sizes | {RECORDS: utterances * self.record.itemsize}


def write_index(folder: Path, index: Index) -> None:
    """Write ``utterances.json``, then ``index.json``, each atomically. Raises OSError."""
    names = json.dumps(index.utterances, indent=0, ensure_ascii=True).encode()
    with atomic_file(folder / UTTERANCES) as file:
        file.write(names)
    data: dict[str, Any] = {"format": FORMAT, "made_by": f"s3prl_ekd {__version__}"}
    data |= asdict(index) | {"layout": [list(block) for block in index.layout]}
    data["utterances"] = _digest(names)
    with atomic_file(folder / INDEX) as file:
        file.write(json.dumps(data, indent=1).encode() + b"\n")


def read_index(folder: Path) -> Index:
    """Read ``index.json`` and ``utterances.json``.

    Raises:
        DataError: a file is missing, damaged or of another version.
        NewerFormatError: a newer s3prl_ekd wrote the cache.
    """
    try:
        data = read_json(folder / INDEX, "index of the target cache", DataError)
        if data["format"] == FORMAT:
            check_format_version(data["version"], VERSION, f"the target cache {folder}")
        check_regular(folder / UTTERANCES, "list of utterances", DataError, MAX_LIST_BYTES)
        return _index(data, (folder / UTTERANCES).read_bytes())
    except DataError as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot read {folder / UTTERANCES}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{folder / INDEX} is damaged or not the index of a target cache: {error!s:.200}"
    raise DataError(f"{reason}; build a cache with: {BUILD} NEW_FOLDER")


def _index(data: dict[str, Any], names: bytes) -> Index:
    """Check the contents of both files. Raises ValueError, KeyError, TypeError, AttributeError."""
    if data["format"] != FORMAT or data["version"] not in range(1, VERSION + 1):
        raise ValueError(f"format {data['format']!s:.40}, version {data['version']!s:.20}")
    for name, kind in INDEX_FIELDS.items():
        if type(data[name]) is not kind:
            raise TypeError(f"invalid `{name}`")
    layout = tuple(TargetBlock(*block) for block in data["layout"])
    for block in layout:
        if [type(value) for value in block] != [str, int, int]:
            raise TypeError("invalid `layout`")
        if not (0 < block.targets <= 10_000 and 0 < block.dim <= 1_000_000):
            raise ValueError("invalid `layout`")
    if data["dtype"] not in DTYPES or not layout or not _is_key(data["key"], layout):
        raise ValueError("invalid `dtype`, `layout` or `key`")
    if _digest(names) != data["utterances"]:
        raise ValueError(f"{UTTERANCES} has changed")
    utterances = json.loads(names)
    if type(utterances) is not list or not all(type(name) is str for name in utterances):
        raise TypeError(f"{UTTERANCES} is not a list of strings")
    values = {name: data[name] for name in INDEX_FIELDS}
    return Index(**values | {"layout": layout, "utterances": tuple(utterances)})


def _is_key(key: dict[str, Any], layout: TargetLayout) -> bool:
    """Whether a key has the fields that :mod:`.fingerprint` compares, and fits the layout."""
    if not all(isinstance(key[name], kind) for name, kind in KEY_FIELDS.items()):
        return False
    for teacher in key["teachers"].values():
        for target, output in zip(teacher["targets"], teacher["answer"], strict=True):
            if not (isinstance(target, list) and isinstance(output, (int, float))):
                return False
    counts = {name: len(teacher["targets"]) for name, teacher in key["teachers"].items()}
    aggregated = key["contents"] != PER_TEACHER
    return aggregated or counts == {block.name: block.targets for block in layout}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def loudness(wave: Tensor) -> np.ndarray:
    """The root mean square of each of the parts of a waveform ``[sample]``."""
    parts = np.array_split(wave.numpy(), LOUDNESS_PARTS)
    return np.array([np.sqrt(np.mean(np.square(part))) for part in parts], np.float32)


def same_loudness(stored: np.ndarray, current: np.ndarray) -> bool:
    """Whether two loudnesses are of the same audio, up to lossy decoding and resampling.

    True for records of version 1, which have none.
    """
    if np.isnan(stored).any():
        return True
    bound = 0.01 * stored + 1e-3 * stored.max()
    return bool((np.abs(current - stored) <= bound).all())


def _read_records(folder: Path, index: Index) -> np.ndarray:
    """Read the complete records of ``utterances.bin``. Raises OSError."""
    data, size = (folder / RECORDS).read_bytes(), index.record.itemsize
    return np.frombuffer(data[: len(data) // size * size], index.record)


def _checked_records(folder: Path, index: Index) -> np.ndarray:
    """Read the records of a complete cache; check the sizes of all files.

    Raises:
        DataError: the cache is not complete, a file is missing or has the wrong size, or the
            records have changed.
    """
    count = len(index.utterances)
    if not index.complete:
        done = len(_read_records(folder, index)) if (folder / RECORDS).is_file() else 0
        raise DataError(
            f"the target cache {folder} is not complete: {min(done, count)} of {count} utterances "
            f"are done; continue the build with: {BUILD} {shlex.quote(str(folder))}"
        )
    try:
        check_regular(folder / RECORDS, "file of the target cache", DataError)
        records = _read_records(folder, index)
        frames = int(records["frames"].sum(dtype=np.int64))
        for name, size in index.file_bytes(count, frames).items():
            check_regular(folder / name, "file of the target cache", DataError)
            actual = os.path.getsize(folder / name)
            if actual != size:
                raise _damaged(folder / name, f"expected {size} bytes, got {actual}")
    except OSError as error:
        path = Path(error.filename or folder / RECORDS)
        raise _damaged(path, str(error.strerror)) from None
    if _digest(records.tobytes()) != index.digest:
        raise _damaged(folder / RECORDS, "the digest does not match index.json")
    if index.record == RECORD:
        return records
    result = np.zeros(len(records), RECORD)
    for field in RECORD_1.names or ():
        result[field] = records[field]
    result["loudness"] = np.nan
    return result


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"the target cache is damaged: {path}: {reason}; build it again with: {BUILD} "
        f"{shlex.quote(str(path.parent))} --force"
    )


class StoredTargets:
    """Targets of a batch in the stored dtype, read when they are first used.

    A worker process sends the numbers of the utterances only, and the process that trains reads
    their targets: sending them would copy them to shared memory, which takes ten times as long as
    reading them from the page cache.

    Attributes:
        frames: ``[batch]``, frame counts.
    """

    def __init__(self, reader: TargetReader, rows: list[int]):
        self.frames = torch.from_numpy(reader.records["frames"][rows].astype(np.int64))
        self._reader, self._rows = reader, rows
        self._tensors: tuple[Tensor, Tensor | None] | None = None

    def __reduce__(self) -> tuple:
        return _stored_targets, (self._reader.token, self._rows)

    @property
    def values(self) -> Tensor:
        """``[batch, frame, column]``, padded with zeros."""
        return self.tensors()[0]

    @property
    def scales(self) -> Tensor | None:
        """``[batch, vector]`` for int8, else None."""
        return self.tensors()[1]

    def tensors(self, pin: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return ``values`` and ``scales``; ``pin``: read them into pinned memory."""
        if self._tensors is None:
            self._tensors = self._reader.read(self._rows, pin)
        return self._tensors

    def pin_memory(self) -> StoredTargets:
        """Read into pinned memory; called in the thread of a loader with ``pin_memory``."""
        self.tensors(pin=True)
        return self

    def to(self, device: str) -> StoredTargets:
        """Copy to ``device``, asynchronously from pinned memory."""
        values, scales = self.tensors()
        copy = StoredTargets(self._reader, self._rows)
        copy._tensors = (
            values.to(device, non_blocking=True),
            None if scales is None else scales.to(device, non_blocking=True),
        )
        return copy

    def on(self, device: str) -> CachedTargets:
        """Convert to float32 on ``device``."""
        values, scales = self.to(device).tensors()
        targets = unpack_targets(values, scales, self._reader.subset.layout)
        return CachedTargets(targets, self.frames, self._reader.aggregated)


_readers: weakref.WeakValueDictionary[str, TargetReader] = weakref.WeakValueDictionary()


def _stored_targets(token: str, rows: list[int]) -> StoredTargets:
    """Targets that a worker process sent; ``token``: of the reader that it has a copy of."""
    return StoredTargets(_readers[token], rows)


class TargetReader:
    """Read-only access to a complete cache; several processes may read the same one.

    The files are memory-mapped at the first read, so each worker process has its own map, forked or
    spawned. A process checks an utterance's CRC when it first makes a batch with it.

    Attributes:
        token: name of the reader, which its copies in worker processes have, too.
        seed: of the excerpts that the teachers got, all drawn as for epoch 0.
        subset: the subset that :meth:`read` returns; by default everything.

    Raises:
        DataError: the cache is not complete, or damaged.
    """

    def __init__(self, folder: str | Path):
        self.token = secrets.token_hex(16)
        _readers[self.token] = self
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.records = _checked_records(self.folder, self.index)
        self.seed = self.index.seed
        self.aggregated = self.index.key["contents"] != PER_TEACHER
        ends = np.cumsum(self.records["frames"], dtype=np.int64)
        self._starts = ends - self.records["frames"]
        self._rows = {name: row for row, name in enumerate(self.index.utterances)}
        self._width = frame_width(self.index.layout)
        all_vectors = tuple(range(vectors_per_frame(self.index.layout)))
        self.subset = TargetSubset(self.index.layout, ((0, self._width),), all_vectors)
        self._targets: np.ndarray | None = None  # [frame, column]
        self._scales: np.ndarray | None = None
        self._verified = np.zeros(len(self.records), bool)

    def __getstate__(self) -> dict:
        """Exclude the memory maps: pickling them for a spawned worker would copy the files."""
        return {**self.__dict__, "_targets": None, "_scales": None}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def check(self, name: str, wave: Tensor) -> None:
        """Reject an utterance without targets, or whose audio has changed.

        Args:
            name: of the utterance.
            wave: what the teachers got, or would get now, ``[sample]``.

        Raises:
            BadAudio: its audio was bad when the cache was built.
            DataError: it had another length or loudness when the cache was built.
        """
        record = self.records[self._rows[name]]
        if record["frames"] == 0:
            raise BadAudio(
                name, "no targets", f"it was bad when the target cache {self.folder} was built"
            )
        change = ""
        if record["samples"] != len(wave):
            change = f"{len(wave)} samples, was {record['samples']}"
        elif not same_loudness(record["loudness"], loudness(wave)):
            change = "another loudness"
        if change:
            raise DataError(
                f"{name}: the audio has changed since the target cache {self.folder} was built: "
                f"{change}; build another cache with: {BUILD} NEW_FOLDER"
            )

    def batch(self, names: Sequence[str]) -> StoredTargets:
        """Return the targets of utterances that passed :meth:`check`, after checking their CRCs.

        They are in the page cache then, so in a worker process this waits for the disk, and
        reading them in the process that trains does not.

        Raises:
            DataError: the file has changed since the cache was built.
        """
        rows = [self._rows[name] for name in names]
        for row in rows:
            stored = self._stored(row)
            if self._verified[row]:
                stored.reshape(-1)[:: mmap.PAGESIZE // stored.itemsize].max()  # of each page, one
                continue
            scale_bytes = b"" if self._scales is None else self._scales[row].tobytes()
            if _crc(stored, scale_bytes) != self.records["crc"][row]:
                name = self.index.utterances[row]
                raise _damaged(self.folder / TARGETS, f"the CRC of {name} does not match")
            self._verified[row] = True
        return StoredTargets(self, rows)

    def read(self, rows: Sequence[int], pin: bool) -> tuple[Tensor, Tensor | None]:
        """Read values ``[batch, frame, column]`` and, for int8, scales ``[batch, vector]``."""
        _, spans, vectors = self.subset
        frames = self.records["frames"][rows]
        shape = (len(rows), int(frames.max()), sum(end - begin for begin, end in spans))
        dtype = array_dtype(self.index.dtype)
        if pin:
            values = torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True)
        else:
            values = torch.from_numpy(np.empty(shape, dtype))  # numpy's memory has huge pages
        array = values.numpy()
        for i, row in enumerate(rows):
            stored, count, column = self._stored(row), frames[i], 0
            for begin, end in spans:
                array[i, :count, column : column + end - begin] = stored[:, begin:end]
                column += end - begin
            array[i, count:] = 0
        values = values.view(DTYPES[self.index.dtype])
        if self._scales is None:
            return values, None
        scales = torch.from_numpy(self._scales[rows][:, list(vectors)])
        return values, scales.pin_memory() if pin else scales

    def _stored(self, row: int) -> np.ndarray:
        """The stored targets ``[frame, column]`` of an utterance."""
        if self._targets is None:
            dtype = array_dtype(self.index.dtype)
            if self.index.dtype == "int8":
                scales = np.memmap(self.folder / SCALES, np.float32, mode="r")
                self._scales = scales.reshape(len(self.records), -1)
            targets = np.memmap(self.folder / TARGETS, dtype, mode="r")
            self._targets = targets.reshape(-1, self._width)
        start = self._starts[row]
        return self._targets[start : start + self.records["frames"][row]]


def _crc(stored: np.ndarray, scale_bytes: bytes) -> int:
    """CRC-32 of an utterance's targets ``[frame, column]``, followed by its scales."""
    return zlib.crc32(scale_bytes, zlib.crc32(stored.data))


class CacheWriter:
    """Writes the files of a cache; at the start, truncates them to the last complete record.

    Targets are synced to disk before their records are written, so an interrupted build has no
    record without targets, even after a power failure.

    Args:
        folder: an existing folder to which only this process writes.
        index: the index of the incomplete cache.

    Attributes:
        records: records of the finished utterances, in the order of the index.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        # the records last: save() flushes in this order
        self._files = {name: open(folder / name, "ab") for name in index.file_bytes(0, 0)}
        sizes = {name: os.path.getsize(folder / name) for name in self._files}
        records = _read_records(folder, index)[: len(index.utterances)]
        frames = [0, *np.cumsum(records["frames"], dtype=np.int64).tolist()]
        done = len(records)
        ends = index.file_bytes(done, frames[done])
        while any(sizes[name] < ends[name] for name in sizes):
            done -= 1
            ends = index.file_bytes(done, frames[done])
        for name, size in ends.items():
            self._files[name].truncate(size)
        self.records = [tuple(record) for record in records[:done].tolist()]
        self._saved = done  # number of records on the disk
        self._synced = time.monotonic()

    def add(self, stored: np.ndarray, scales: np.ndarray | None, wave: Tensor) -> None:
        """Append the next utterance's targets ``[frame, column]``. Raises OSError.

        ``wave``: what the teachers got, ``[sample]``.
        """
        stored = np.ascontiguousarray(stored)
        scale_bytes = b"" if scales is None else scales.astype("<f4").tobytes()
        self._files[TARGETS].write(stored.data)
        crc = _crc(stored, scale_bytes)
        self._add_record(scale_bytes, (len(stored), len(wave), crc, loudness(wave)))

    def add_bad(self) -> None:
        """Append an utterance with bad audio, without targets. Raises OSError."""
        scale_bytes = bytes(self.index.file_bytes(1, 0).get(SCALES, 0))
        self._add_record(scale_bytes, (0, 0, 0, 0.0))

    def _add_record(self, scale_bytes: bytes, record: tuple[Any, ...]) -> None:
        if scale_bytes:
            self._files[SCALES].write(scale_bytes)
        self.records.append(record)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.save()

    def save(self) -> None:
        """Sync the added utterances to disk. Raises OSError."""
        unsaved = np.array(self.records[self._saved :], RECORD)
        for name, file in self._files.items():
            if name == RECORDS:
                # Set first: Ctrl-C during the write may lose records but not write them twice.
                self._saved = len(self.records)
                file.write(unsaved.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._synced = time.monotonic()

    def finish(self) -> Index:
        """Save, and mark the index as complete. Raises OSError."""
        self.save()
        digest = _digest((self.folder / RECORDS).read_bytes())
        index = replace(self.index, complete=True, digest=digest)
        write_index(self.folder, index)
        return index

    def close(self) -> None:
        """Close the files; unsaved data is truncated at the next start."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk: the lost targets have no record
                file.close()
