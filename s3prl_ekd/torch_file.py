"""What reading a torch file would do, found out before it is read.

``torch.save`` writes a zip archive of uncompressed members, of which ``data.pkl`` is a pickle and
the others are the tensors' numbers, or, before torch 1.6, several pickles with the numbers behind
them. A pickle is a program: here it is read as a list of instructions and none is carried out.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_PICKLE = 4 << 20  # bytes; 5000 tensors take 1.3 million
MAX_INSTRUCTIONS = 500_000  # 5000 tensors take 130,000; about a second to follow
MAX_MEMBERS = 65_536  # in the archive: one a tensor
MAX_CONTENTS = 8 << 20  # bytes of the archive's list of members
_LEGACY_PICKLES = 5  # a magic number, a version, facts of the machine, the object, its storages


class TorchFileError(Exception):
    """The file is not as ``torch.save`` writes it; the message continues "the file ..."."""


def named_globals(path: Path) -> Iterator[str]:
    """The classes and functions that a torch file asks for, as ``module.name``.

    Raises:
        TorchFileError: it is no torch file, or one that takes far more room once it is read.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            yield from _in_archive(path, file)
            return
        file.seek(0)
        limited = _Limited(file)
        for _ in range(_LEGACY_PICKLES):
            yield from _in_pickle(limited)


def _in_archive(path: Path, file: BinaryIO) -> Iterator[str]:
    size = path.stat().st_size
    _check_contents(file, size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, size)
            pickles = [member for member in members if member.filename.endswith("/data.pkl")]
            if not pickles:
                raise TorchFileError("is no torch file: it has no data.pkl")
            for member in pickles:
                if member.file_size > MAX_PICKLE:
                    raise TorchFileError(f"has a pickle of {member.file_size:,} bytes")
                with archive.open(member) as stream:
                    yield from _in_pickle(_Limited(stream))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        raise TorchFileError("is damaged or no torch file") from None


def _check_contents(file: BinaryIO, size: int) -> None:
    """The list of members is read whole by whoever opens an archive: how long is it?"""
    begin = max(0, size - (1 << 16) - 100)
    file.seek(begin)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise TorchFileError("is damaged or no torch file")
    length = int.from_bytes(tail[end + 12 : end + 16], "little")
    large = tail.rfind(b"PK\x06\x06", 0, end)
    if large >= 0:
        length = int.from_bytes(tail[large + 40 : large + 48], "little")
    if length > MAX_CONTENTS:
        raise TorchFileError(f"has a list of contents of {length:,} bytes")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if len(members) > MAX_MEMBERS:
        raise TorchFileError(f"has {len(members):,} members")
    if len({member.filename for member in members}) < len(members):
        raise TorchFileError("has two members of one name")
    for member in members:
        if member.flag_bits & 1:
            raise TorchFileError("is encrypted")
        if member.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(
                f"has a compressed member ({member.filename[:60]!r}), which torch.save never writes"
            )
    if sum(member.file_size for member in members) > size:
        raise TorchFileError("has members that take more room than the file")


def _in_pickle(stream: _Limited) -> Iterator[str]:
    texts: deque[str] = deque(maxlen=2)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_INSTRUCTIONS:
                raise TorchFileError(f"has a pickle of more than {MAX_INSTRUCTIONS:,} instructions")
            if opcode.name in ("GLOBAL", "INST"):
                yield ".".join(str(argument).split(" ", 1))
            elif opcode.name == "STACK_GLOBAL" or opcode.name.startswith("EXT"):
                # torch.save never writes these. What they name is on the stack: mostly the last
                # two texts, but that is not known before it is run.
                yield f"{'.'.join(texts)[:80]} on the pickle's stack"
            elif isinstance(argument, str):
                texts.append(argument)
    except (ValueError, LookupError, OverflowError, MemoryError, EOFError):
        raise TorchFileError("is damaged or no torch file") from None


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
