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
from ..files.atomic import atomic_file
from ..files.formats import check_format_version
from ..files.text import check_regular, read_json

# numpy has no bfloat16: its bits are stored as int16
NUMPY = {"float16": np.float16, "bfloat16": np.int16, "int8": np.int8}
BYTES = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}
INT8_MAX = 127

INDEX, UTTERANCES, RECORDS = "index.json", "utterances.json", "utterances.bin"
TARGETS, SCALES = "targets.bin", "scales.bin"
FORMAT, VERSION = "s3prl_ekd.target_cache", 1
PER_TEACHER = "per teacher"  # `contents` of a key whose targets are not aggregated
# stored frames (0: bad audio); samples the teachers got; CRC-32 of targets and scales
RECORD = np.dtype([("frames", "<u4"), ("samples", "<u4"), ("crc", "<u4")])
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
}  # `utterances` is the digest of utterances.json
MAX_LIST_BYTES = 1 << 32  # of utterances.json; tens of millions of utterances
BUILD = "s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o"
SYNC_SECONDS = 10.0  # seconds between two syncs to disk: the most that a power failure loses


def encode_targets(
    values: Tensor, layout: TargetLayout, dtype: str, utterance: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert targets ``[frame, column]`` to the stored dtype and scales ``[vector]``.

    Raises:
        TeacherError: a number is not finite, too large for float16, or so large that int8 would
            round all other numbers to zero.
    """
    values = values.float()
    if not values.isfinite().all():
        raise TeacherError(f"{utterance}: a teacher's output is not finite; remove the utterance")
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).cpu().view(torch.int16).numpy(), None
    if dtype == "float16":
        half = values.half()
        if not half.isfinite().all():
            raise TeacherError(
                f"{utterance}: a target is {values.abs().max():g}, above float16's 65504; build "
                "with --dtype bfloat16"
            )
        return half.cpu().numpy(), None
    scales, stored, column = [], [], 0
    for _, count, dim in layout:
        block = values[:, column : column + count * dim].view(-1, count, dim)
        if not usable_frames(block).all():
            raise TeacherError(
                f"{utterance}: a target is {block.abs().max():g}, and int8 would round all others "
                "to zero; build with --dtype bfloat16, or remove the utterance"
            )
        scale = block.abs().amax((0, 2)) / INT8_MAX  # [target]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        stored.append((block / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).flatten(1))
        scales.append(scale)
        column += count * dim
    return torch.cat(stored, 1).to(torch.int8).cpu().numpy(), torch.cat(scales).cpu().numpy()


def stored_to_tensor(stored: np.ndarray, dtype: str) -> Tensor:
    """View an array in the stored dtype, of any shape, as a tensor of ``dtype``."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


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


def pack_targets(targets: Mapping[str, Tensor], layout: TargetLayout) -> Tensor:
    """``{name: [1, target, frame, dim]}`` of one utterance -> ``[frame, column]``."""
    flat = [targets[block.name][0].transpose(0, 1).flatten(1) for block in layout]
    return torch.cat(flat, dim=1)


def unpack_targets(
    values: Tensor, scales: Tensor | None, layout: TargetLayout
) -> dict[str, Tensor]:
    """``[batch, frame, column]`` -> ``{name: [batch, target, frame, dim]}`` in float32.

    Args:
        values: as stored.
        scales: ``[batch, vector]``, the factor of each vector, or None.
        layout: the layout of ``values``.
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

    ``seed``: of the excerpts; ``key``: see :mod:`.fingerprint`; ``digest``: of ``utterances.bin``.
    """

    dtype: str
    layout: TargetLayout
    seed: int
    key: dict[str, Any]
    utterances: tuple[str, ...]
    complete: bool = False
    digest: str = ""

    @property
    def frame_bytes(self) -> int:
        return frame_width(self.layout) * BYTES[self.dtype]

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of an utterance."""
        return 4 * vectors_per_frame(self.layout) if self.dtype == "int8" else 0


def write_index(folder: Path, index: Index) -> None:
    """Write ``utterances.json``, then ``index.json``, each atomically. Raises OSError."""
    names = json.dumps(index.utterances, indent=0, ensure_ascii=True).encode()
    with atomic_file(folder / UTTERANCES) as file:
        file.write(names)
    data = {"format": FORMAT, "version": VERSION, "made_by": f"s3prl_ekd {__version__}"}
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
        if data.get("format") == FORMAT and data.get("version") != VERSION:
            check_format_version(data.get("version"), VERSION, f"the target cache {folder}")
            raise DataError(
                f"{folder}: expected a target cache of version {VERSION}, got version "
                f"{str(data.get('version'))[:20]}"
            )
        check_regular(folder / UTTERANCES, "list of utterances", DataError, MAX_LIST_BYTES)
        return _index(data, (folder / UTTERANCES).read_bytes())
    except DataError as error:
        raise DataError(f"{error}; build a cache with: {BUILD} NEW_FOLDER") from None
    except OSError as error:
        raise DataError(f"cannot read {folder / UTTERANCES}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / INDEX} is damaged or not the index of a target cache: {str(error)[:200]}; "
            f"build a cache with: {BUILD} NEW_FOLDER"
        ) from None


def _index(data: dict[str, Any], names: bytes) -> Index:
    if data["format"] != FORMAT:
        raise ValueError(f"format is not {FORMAT}")
    for name, kind in INDEX_FIELDS.items():
        if type(data[name]) is not kind:
            raise TypeError(f"invalid `{name}`")
    layout = tuple(TargetBlock(*block) for block in data["layout"])
    for name, targets, dim in layout:
        if not (type(name) is str and type(targets) is int and type(dim) is int):
            raise TypeError("invalid `layout`")
        if not (0 < targets <= 10_000 and 0 < dim <= 1_000_000):
            raise ValueError("invalid `layout`")
    if data["dtype"] not in BYTES or not layout:
        raise ValueError("invalid `dtype` or `layout`")
    if not all(isinstance(data["key"].get(name), kind) for name, kind in KEY_FIELDS.items()):
        raise TypeError("invalid `key`")
    if _digest(names) != data["utterances"]:
        raise ValueError(f"{UTTERANCES} has changed")
    utterances = json.loads(names)
    if type(utterances) is not list or not all(type(name) is str for name in utterances):
        raise TypeError(f"{UTTERANCES} is not a list of strings")
    values = {name: data[name] for name in INDEX_FIELDS}
    return Index(**values | {"layout": layout, "utterances": tuple(utterances)})


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_records(folder: Path) -> np.ndarray:
    """Read the complete records of ``utterances.bin``. Raises OSError."""
    data = (folder / RECORDS).read_bytes()
    return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)


def records_digest(folder: Path) -> str:
    """Digest of ``utterances.bin``, which has a CRC of each utterance's targets. Raises OSError."""
    return _digest((folder / RECORDS).read_bytes())


def checked_records(folder: Path, index: Index) -> np.ndarray:
    """Read the records of a complete cache; check the sizes of all files.

    Raises:
        DataError: the cache is not complete, a file is missing or has the wrong size, or the
            records have changed.
    """
    if not index.complete:
        done = 0
        if (folder / RECORDS).is_file():
            done = min(len(read_records(folder)), len(index.utterances))
        raise DataError(
            f"the target cache {folder} is not complete: {done} of {len(index.utterances)} "
            f"utterances are done; continue the build with: {BUILD} {shlex.quote(str(folder))}"
        )
    count = len(index.utterances)
    try:
        check_regular(folder / RECORDS, "file of the target cache", DataError)
        records = read_records(folder)
        expected = {
            RECORDS: count * RECORD.itemsize,
            TARGETS: int(records["frames"].sum(dtype=np.int64)) * index.frame_bytes,
        }
        if index.scale_bytes:
            expected[SCALES] = count * index.scale_bytes
        for name, size in expected.items():
            check_regular(folder / name, "file of the target cache", DataError)
            actual = os.path.getsize(folder / name)
            if actual != size:
                raise _damaged(folder / name, f"expected {size} bytes, got {actual}")
        if records_digest(folder) != index.digest:
            raise _damaged(folder / RECORDS, "the digest does not match index.json")
    except OSError as error:
        raise _damaged(error.filename, str(error.strerror)) from None
    return records


def _damaged(path: str | Path, reason: str) -> DataError:
    return DataError(
        f"the target cache is damaged: {path}: {reason}; build it again with: {BUILD} "
        f"{shlex.quote(str(Path(path).parent))} --force"
    )


class StoredTargets(NamedTuple):
    """Targets of a batch in the stored dtype, which makes the copy to the device small.

    ``values`` ``[batch, frame, column]``, padded with zeros; ``frames`` ``[batch]``: frame counts;
    ``scales`` ``[batch, vector]`` for int8; ``layout``: of ``values``; ``aggregated``: they are
    target sets, not each teacher's own targets.
    """

    values: Tensor
    frames: Tensor
    scales: Tensor | None
    layout: TargetLayout
    aggregated: bool

    def on(self, device: str) -> CachedTargets:
        """Convert to float32 on ``device``."""
        values = self.values.to(device, non_blocking=True)
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        # pinning memory may turn the tuples of the layout into lists
        targets = unpack_targets(values, scales, self.layout)
        return CachedTargets(
            targets, self.frames.to(device, non_blocking=True), bool(self.aggregated)
        )


class TargetReader:
    """Read-only access to a complete cache; several processes may read the same one.

    The files are memory-mapped at the first read, so each worker process has its own map, forked or
    spawned. A process checks an utterance's CRC when it first reads it.

    Args:
        folder: the folder of the cache.
        index: its index, if already read.

    Attributes:
        seed: of the excerpts that the teachers got, all drawn as for epoch 0.
        subset: the subset that :meth:`batch` returns; by default everything.

    Raises:
        DataError: the cache is not complete, or damaged.
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
        all_vectors = tuple(range(vectors_per_frame(self.index.layout)))
        self.subset = TargetSubset(self.index.layout, ((0, self._width),), all_vectors)
        self._targets: np.ndarray | None = None  # [frame, column]; None if no frame is stored
        self._scales: np.ndarray | None = None
        self._verified = np.zeros(len(self.records), bool)

    def __getstate__(self) -> dict:
        """Exclude the memory maps: pickling them for a spawned worker would copy the files."""
        return {**self.__dict__, "_targets": None, "_scales": None}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def check(self, name: str, samples: int) -> None:
        """Reject an utterance without targets, or whose length has changed.

        Raises:
            BadAudio: its audio was bad when the cache was built.
            DataError: the excerpt had another number of samples when the cache was built.
        """
        frames, cached_samples, _ = self.records[self._rows[name]]
        if frames == 0:
            raise BadAudio(
                name, "no targets", f"it was bad when the target cache {self.folder} was built"
            )
        if cached_samples != samples:
            raise DataError(
                f"{name}: the audio has changed since the target cache {self.folder} was built: "
                f"{samples} samples, was {cached_samples}; build another cache with: {BUILD} "
                "NEW_FOLDER"
            )

    def batch(self, names: Sequence[str]) -> StoredTargets:
        """Read the targets of utterances that passed :meth:`check`.

        Raises:
            DataError: the file has changed since the cache was built.
        """
        if self._targets is None:
            self._map()
        targets = self._targets
        assert targets is not None  # check() rejects utterances without targets
        rows = [self._rows[name] for name in names]
        frames = self.records["frames"][rows].astype(np.int64)
        layout, spans, vectors = self.subset
        width = sum(end - begin for begin, end in spans)
        values = np.empty((len(rows), frames.max(), width), NUMPY[self.index.dtype])
        for i, row in enumerate(rows):
            count, start = frames[i], self._starts[row]
            stored = targets[start : start + count]
            if not self._verified[row]:
                self._verify(row, stored)
            column = 0
            for begin, end in spans:
                values[i, :count, column : column + end - begin] = stored[:, begin:end]
                column += end - begin
            values[i, count:] = 0
        scales = None
        if self._scales is not None:
            scales = torch.from_numpy(self._scales[rows][:, list(vectors)])
        return StoredTargets(
            stored_to_tensor(values, self.index.dtype),
            torch.from_numpy(frames),
            scales,
            layout,
            self.index.key["contents"] != PER_TEACHER,
        )

    def _map(self) -> None:
        if self.records["frames"].any():
            shape = (-1, self._width)
            dtype = NUMPY[self.index.dtype]
            self._targets = np.memmap(self.folder / TARGETS, dtype, mode="r").reshape(shape)
        if self.index.scale_bytes:
            shape = (len(self.records), -1)
            self._scales = np.memmap(self.folder / SCALES, np.float32, mode="r").reshape(shape)

    def _verify(self, row: int, stored: np.ndarray) -> None:
        scales = b"" if self._scales is None else self._scales[row].tobytes()
        if targets_crc(stored, scales) != self.records["crc"][row]:
            raise DataError(
                f"the target cache is damaged: {self.folder / TARGETS}: the CRC of "
                f"{self.index.utterances[row]} does not match; build it again with: {BUILD} "
                f"{shlex.quote(str(self.folder))} --force"
            )
        self._verified[row] = True


def targets_crc(stored: np.ndarray, scales: bytes = b"") -> int:
    """CRC-32 of an utterance's targets ``[frame, column]``, followed by its scales."""
    return zlib.crc32(scales, zlib.crc32(stored.data))


class CacheWriter:
    """Writes the files of a cache; at the start, truncates them to the last complete record.

    An utterance's record is written after its targets, so an interrupted build has no record
    without targets. This also holds after a power failure, because the targets are synced before
    their records are written.

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
        self._unsaved: list[np.void] = []
        self._synced = time.monotonic()

    def add(self, stored: np.ndarray, scales: np.ndarray | None, samples: int) -> None:
        """Append the next utterance's targets ``[frame, column]``. Raises OSError."""
        stored = np.ascontiguousarray(stored)
        scale_bytes = b"" if scales is None else scales.astype("<f4").tobytes()
        self._files[TARGETS].write(stored.data)
        if self.index.scale_bytes:
            self._files[SCALES].write(scale_bytes)
        self._record(len(stored), samples, targets_crc(stored, scale_bytes))

    def add_bad(self) -> None:
        """Append an utterance with bad audio, without targets. Raises OSError."""
        if self.index.scale_bytes:
            self._files[SCALES].write(bytes(self.index.scale_bytes))
        self._record(0, 0, 0)

    def _record(self, frames: int, samples: int, crc: int) -> None:
        record = np.array([(frames, samples, crc)], RECORD)[0]
        self.records.append(record)
        self._unsaved.append(record)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.save()

    def save(self) -> None:
        """Sync the added utterances to disk. Raises OSError."""
        for name in (TARGETS, SCALES):
            if name in self._files:
                self._files[name].flush()
                os.fsync(self._files[name].fileno())
        # Emptied first: Ctrl-C during the write may lose records but must not write them twice.
        unsaved, self._unsaved = self._unsaved, []
        self._files[RECORDS].write(b"".join(record.tobytes() for record in unsaved))
        self._files[RECORDS].flush()
        os.fsync(self._files[RECORDS].fileno())
        self._synced = time.monotonic()

    def finish(self) -> Index:
        """Save, and mark the index as complete. Raises OSError."""
        self.save()
        values = {**self.index.__dict__, "complete": True, "digest": records_digest(self.folder)}
        index = Index(**values)
        write_index(self.folder, index)
        return index

    def close(self) -> None:
        """Close the files; unsaved data is truncated at the next start."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk: the lost targets have no record
                pass
        self._files.clear()
