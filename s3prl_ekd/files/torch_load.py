"""What reading a torch file would do, found out before it is read.

``torch.save`` writes a zip archive of uncompressed members, of which ``data.pkl`` is a pickle and
the others are the tensors' numbers, or, before torch 1.6, several pickles with the numbers behind
them. A pickle is a program: here it is read as a list of instructions and none is carried out.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .torch_pickle import Storages, TorchFileError, follow

__all__ = ["TorchFileError", "named_globals"]

MAX_PICKLE = 4 << 20  # bytes; 5000 tensors take 1.3 million
MAX_MEMBERS = 65_536  # in the archive: one a tensor
MAX_CONTENTS = 8 << 20  # bytes of the archive's list of members
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles before torch 1.6


def named_globals(path: Path) -> Iterator[str]:
    """The classes and functions that a torch file asks for, as ``module.name``.

    Raises:
        TorchFileError: it is no torch file, one that takes far more room once it is read, or one
            that makes ``torch.load(weights_only=True)`` of some version do more than read data
            (:mod:`.torch_pickle`).
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            yield from _in_archive(path, file)
            return
        file.seek(0)
        yield from _in_pickles(file, path.stat().st_size)


def _in_pickles(file: BinaryIO, size: int) -> Iterator[str]:
    """torch's format before 1.6: a magic number, a version, facts of the machine, the object, the
    names of its storages, and behind these pickles the storages."""
    if _is_tar(file.read(tarfile.BLOCKSIZE)):
        raise TorchFileError(
            "is a tar archive as torch wrote it before 0.1.10, and reading one can run code; load "
            "it where you trust it and write it again with torch.save"
        )
    file.seek(0)
    limited, storages = _Limited(file), Storages(parts=6)
    for expected in (_MAGIC, _PROTOCOL, None, None, None):
        result = yield from follow(limited, storages)
        if expected is not None and result != expected:
            raise TorchFileError("is damaged or no torch file")
    if storages.bytes > size:
        raise TorchFileError(f"declares tensors of {storages.bytes:,} bytes and has {size:,}")


def _is_tar(block: bytes) -> bool:
    """Whether Python's tarfile, which old torch asks first, would take it for an archive."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _in_archive(path: Path, file: BinaryIO) -> Iterator[str]:
    size = path.stat().st_size
    count = _check_contents(file, size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != count:
                raise TorchFileError("is damaged: its list of contents has another length")
            records = _check_members(members, size)
            if "data.pkl" not in records:
                raise TorchFileError("is no torch file: it has no data.pkl")
            if "constants.pkl" in records:
                raise TorchFileError("is a program (TorchScript) and not data")
            member = records["data.pkl"]
            if member.file_size > MAX_PICKLE:
                raise TorchFileError(f"has a pickle of {member.file_size:,} bytes")
            sizes = {
                name.removeprefix("data/"): record.file_size
                for name, record in records.items()
                if name.startswith("data/")
            }
            with archive.open(member) as stream:
                yield from follow(_Limited(stream), Storages(parts=5, records=sizes))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        raise TorchFileError("is damaged or no torch file") from None


def _check_contents(file: BinaryIO, size: int) -> int:
    """How many members the archive has; whoever opens it reads the list of them whole.

    Python finds that list from the end of the file, and torch by the place that the end gives. They
    must be the same: else one list could be looked through here, and another be loaded.
    """
    end = size - _END.size
    fields = _read(file, _END, end)
    if fields is None or fields[0] != b"PK\x05\x06" or fields[-1]:  # of a comment
        raise TorchFileError("is damaged or no torch file")
    count, length, begin = fields[4:7]
    locator = _read(file, _LOCATOR, end - _LOCATOR.size)
    if locator is not None and locator[0] == b"PK\x06\x07":
        end -= _LOCATOR.size + _LARGE_END.size
        fields = _read(file, _LARGE_END, end)
        if fields is None or fields[0] != b"PK\x06\x06" or locator[2] != end:
            raise TorchFileError("is damaged or no torch file")
        count, length, begin = fields[7:10]
    if length > MAX_CONTENTS:
        raise TorchFileError(f"has a list of contents of {length:,} bytes")
    if begin + length != end:
        raise TorchFileError("is damaged: its list of contents is not where it says")
    return count


# The end of an archive, and before it where there are large numbers; see PKWARE's APPNOTE.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_LARGE_END = struct.Struct("<4sQ2H2L4Q")


def _read(file: BinaryIO, kind: struct.Struct, at: int) -> tuple | None:
    if at < 0:
        return None
    file.seek(at)
    data = file.read(kind.size)
    return kind.unpack(data) if len(data) == kind.size else None


def _check_members(members: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by their names inside the archive's one folder."""
    if len(members) > MAX_MEMBERS:
        raise TorchFileError(f"has {len(members):,} members")
    # The name as it stands in the file: Python may show another (a NUL in it, an extra field).
    names = [member.orig_filename for member in members]
    if len({name.lower() for name in names}) < len(names):  # torch ignores upper and lower case
        raise TorchFileError("has two members of one name")
    if len({name.partition("/")[0] for name in names}) > 1 or any("\0" in name for name in names):
        raise TorchFileError("is no torch file: its members are not in one folder")
    for member in members:
        if member.flag_bits & 1:
            raise TorchFileError("is encrypted")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise TorchFileError(
                f"has a compressed member ({member.filename[:60]!r}), which torch.save never writes"
            )
    if sum(member.file_size for member in members) > size:
        raise TorchFileError("has members that take more room than the file")
    return {name.partition("/")[2]: member for name, member in zip(names, members, strict=True)}


class _Limited:
    """A stream of which no more than :data:`MAX_PICKLE` bytes can be read."""

    def __init__(self, stream):
        self._stream, self._left = stream, MAX_PICKLE

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise TorchFileError(f"has a pickle of more than {MAX_PICKLE:,} bytes")
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise TorchFileError(f"has a pickle of more than {MAX_PICKLE:,} bytes")
        return line

    def tell(self) -> int:
        return MAX_PICKLE - self._left
