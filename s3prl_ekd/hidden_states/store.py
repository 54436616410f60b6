"""The files of a cache's folder.

``index.json``: what it is, ``complete`` only at the end. ``utterances.json``: whose targets in
which order, a list apart as it may be long. ``targets.bin``: frames ``[frame, column]``, one
utterance after the other. ``scales.bin`` (int8): float32 ``[piece]`` an utterance.
``utterances.bin``: a :data:`RECORD` an utterance, written after its targets, so its length says how
far a cut build has come.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import DataError
from ..files.atomic import whole_file
from ..files.formats import refuse_newer
from ..files.text import check_regular, read_json
from .layout import Block, Layout, columns, pieces
from .numbers import BYTES

INDEX, NAMES, RECORDS = "index.json", "utterances.json", "utterances.bin"
TARGETS, SCALES = "targets.bin", "scales.bin"
FORMAT, VERSION = "s3prl_ekd.target_cache", 1
# frames that are stored (0: its audio is bad); samples that were heard; CRC-32 of targets, scales
RECORD = np.dtype([("frames", "<u4"), ("samples", "<u4"), ("crc", "<u4")])
PARTS = {
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


def _damaged(path, why: str) -> DataError:
    return DataError(
        f"the target cache is damaged: {path}: {why}; build it anew with --force: {BUILD} "
        f"{Path(path).parent} --force"
    )
