"""Scan a torch file before ``torch.load(weights_only=True)`` reads it.

``torch.save`` writes a zip archive of uncompressed members: the pickle ``data.pkl``, and one
storage for each tensor. Before torch 1.6 it wrote several pickles followed by the storages. A
pickle is a program: with ``weights_only=True`` it could run code before torch 2.6 (CVE-2025-32434)
and overwrite memory before 2.10 (CVE-2026-24747), and with any version it can run for ever or
allocate a terabyte. So it first runs in Python's own unpickler with only the opcodes that
``torch.save`` writes, where classes and tensors are replaced by :class:`_Inert` objects.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

MAX_PICKLE = 4 << 20  # bytes; 5000 tensors take 1.3 million
MAX_STEPS = 1_000_000  # opcodes, short arguments and copied items; 5000 tensors take 250,000
_MAX_DIMENSIONS = 64  # of a tensor, as in torch; also the parts of a key
MAX_DIRECTORY = 8 << 20  # bytes of an archive's central directory, at about 80 a tensor
# The opcodes of protocol 2 that torch.save writes.
_OPCODES = """
    PROTO BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING NONE NEWTRUE NEWFALSE
    EMPTY_TUPLE EMPTY_LIST EMPTY_DICT MARK TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM
    SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID GLOBAL REDUCE NEWOBJ BUILD STOP
""".split()
_STORAGES = {  # name -> bytes of an item
    **{"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16},
    **{"Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Int": 4, "Long": 8},
}


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]
_CODES: dict[str, Any] = pickletools.code2op  # type: ignore[attr-defined]


class TorchFileError(Exception):
    """A file that ``torch.save`` would not write; the message continues "the file ..."."""


class ForbiddenName(TorchFileError):
    """The pickle names a class or function that is not allowed, as ``name``."""

    def __init__(self, name: str):
        super().__init__(f"has a pickle that names {name:.200}, which can run code")
        self.name = name


class _ForbiddenOpcode(TorchFileError):
    """The pickle has an opcode that ``torch.save`` does not write."""


class _Inert:
    """Stands for a value of a class whose code must not run. It has no attributes or items."""

    __slots__ = ()


class _Unlisted:
    """Stands for a class or function outside the list, which torch checks."""

    def __init__(self, *arguments: Any) -> None:
        pass


class _StorageType(_Inert):
    """Stands for a class such as ``torch.FloatStorage``: not callable, since
    ``UntypedStorage(10**12)`` would allocate a terabyte."""

    __slots__ = ("item_bytes",)

    def __init__(self, item_bytes: int):
        self.item_bytes = item_bytes


class _Storage(_Inert):
    __slots__ = ("bytes", "item_bytes")

    def __init__(self, bytes_: int, item_bytes: int):
        self.bytes, self.item_bytes = bytes_, item_bytes


class _Dict(dict[Any, Any]):
    """A dict or OrderedDict with keys of which a hash is computed quickly.

    Hashing nested tuples, or many integers with equal hashes, can take for ever.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        parts = key if type(key) is tuple else (key,)
        if len(parts) > _MAX_DIMENSIONS:
            raise TorchFileError(f"has a key of more than {_MAX_DIMENSIONS} parts")
        for part in parts:
            plain = type(part) in (str, bool, float, type(None), _Inert)
            if not plain and not (type(part) is int and abs(part) < 2**64):
                raise TorchFileError("has a mapping or set with a key that is not text or a number")
        super().__setitem__(key, value)


class _List(list[Any]):
    __setitem__ = None  # type: ignore[assignment]  # opcode SETITEM is for dicts


class _Opcodes(dict[int, Callable[..., None]]):
    def __missing__(self, code: int) -> Callable[..., None]:
        if chr(code) not in _CODES:
            raise TorchFileError("is damaged or not a torch file")
        raise _ForbiddenOpcode(_CODES[chr(code)].name)


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Python's unpickler without C, so that opcodes can be removed and replaced.

    Args:
        stream: of the pickle.
        allow: classes that it may name, besides torch's own; None for all, if torch checks them.
        storage_bytes: returns the bytes that the file has for a storage's key, or None if they are
            not known yet.
    """

    dispatch: Any = _Opcodes(
        (ord(opcode.code), _PythonUnpickler.dispatch[ord(opcode.code)])
        for opcode in pickletools.opcodes
        if opcode.name in _OPCODES
    )
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Dict())
    dispatch[pickle.EMPTY_LIST[0]] = lambda self: self.append(_List())
    dispatch[pickle.BUILD[0]] = lambda self: self._build()
    dispatch[pickle.REDUCE[0]] = lambda self: self._reduce()

    def __init__(
        self, stream: Any, allow: Sequence[type] | None, storage_bytes: Callable[[str], int | None]
    ):
        super().__init__(self)
        self._stream, self._storage_bytes = stream, storage_bytes
        self._any_name = allow is None
        self._bytes_left, self._steps_left = MAX_PICKLE, MAX_STEPS
        self.storages: dict[str, _Storage] = {}
        self._known: dict[str, Any] = {
            "collections.OrderedDict": self._ordered_dict,
            **dict.fromkeys(("builtins.set", "__builtin__.set"), self._set),
            "torch.Size": self._size,
            "torch.device": self._value,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._value,
            "torch.storage.UntypedStorage": _StorageType(1),
            **{f"torch.{name}Storage": _StorageType(size) for name, size in _STORAGES.items()},
            **{str(v): _Inert() for v in vars(torch).values() if isinstance(v, torch.dtype)},
            **{
                f"{cls.__module__}.{cls.__qualname__}": type("Allowed", (), {})
                for cls in allow or ()
            },
        }

    def read(self, size: int) -> bytes:
        self._bytes_left -= size
        self._steps_left -= size == 1  # each opcode is a byte, read by itself
        self._check_limits()
        data: bytes = self._stream.read(size)
        return data

    def readline(self) -> bytes:
        line: bytes = self._stream.readline(max(0, self._bytes_left) + 1)
        self._bytes_left -= len(line)
        self._check_limits()
        return line

    def _check_limits(self) -> None:
        if self._bytes_left < 0:
            raise TorchFileError(f"has a pickle of more than {MAX_PICKLE:,} bytes")
        if self._steps_left < 0:
            raise TorchFileError(f"has a pickle that takes more than {MAX_STEPS:,} steps to read")

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._known and not self._any_name:
            raise ForbiddenName(full_name)
        return self._known.get(full_name, _Unlisted)

    def load(self) -> Any:
        start = self._stream.tell()
        try:
            return super().load()
        except _ForbiddenOpcode as error:
            self._stream.seek(start)
            name = _first_name(self._stream.read(MAX_PICKLE))
            raise ForbiddenName(name or f"an object of another protocol (opcode {error})") from None

    def persistent_load(self, reference: Any) -> _Storage:
        """The storage of ("storage", type, key, device, items)."""
        kind, type_, key, device, items, *view = reference
        if not (
            (kind, view) in (("storage", []), ("storage", [None]))  # a view: before torch 1.6
            and isinstance(type_, _StorageType)
            and (type(key), type(device), type(items)) == (str, str, int)
            and items >= 0
        ):
            raise TorchFileError("has a storage of unknown type or size")
        storage = _Storage(items * type_.item_bytes, type_.item_bytes)
        size = self._storage_bytes(key)
        if size not in (None, storage.bytes):
            raise TorchFileError(
                f"is damaged: it declares {storage.bytes:,} bytes for the storage {key[:40]!r} but "
                f"has {size:,}"
            )
        known = self.storages.setdefault(key, storage)
        if (known.bytes, known.item_bytes) != (storage.bytes, storage.item_bytes):
            raise TorchFileError(f"is damaged: it declares the storage {key[:40]!r} twice")
        return storage

    def _reduce(self) -> None:
        self._counted(self.stack[-1])  # the arguments of a call
        self.load_reduce()

    def _build(self) -> None:
        if not isinstance(self._counted(self.stack[-1]), dict):  # the state of an object
            raise TorchFileError("sets the state of an object to a value that is not a mapping")
        self.load_build()

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Inert:
        if not isinstance(storage, _Storage):
            raise TorchFileError("has a tensor without a storage")
        numbers = (offset, *self._counted(size), *self._counted(stride))
        if len(size) > _MAX_DIMENSIONS or any(
            type(n) is not int or not 0 <= n < 2**63 for n in numbers
        ):
            raise TorchFileError("has a tensor with an invalid shape, stride or offset")
        items = storage.bytes // storage.item_bytes
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and (last >= items or math.prod(size) > items):
            raise TorchFileError(
                f"cannot be used: a tensor declares the shape {'x'.join(map(str, size))[:60]}, but "
                f"its storage has {storage.bytes:,} bytes"
            )
        return _Inert()

    def _ordered_dict(self, items: Any = ()) -> _Dict:
        result = _Dict()
        for key, value in self._counted(items):
            result[key] = value
        return result

    def _set(self, items: Any = ()) -> _Inert:
        self._ordered_dict([(item, None) for item in self._counted(items)])
        return _Inert()

    def _size(self, items: Any = ()) -> _Inert:
        if not isinstance(self._counted(items), tuple):
            raise TorchFileError("has a torch.Size that is not of a tuple")
        return _Inert()

    def _value(self, *arguments: Any) -> _Inert:
        return _Inert()

    def _counted(self, items: Any) -> Any:
        """The items, which torch copies: they count as opcodes."""
        self._steps_left -= len(items)
        self._check_limits()
        return items


def _first_name(pickled: bytes) -> str:
    """The first class or function that a pickle of any protocol names; "" if none is found."""
    texts = [""]
    with contextlib.suppress(ValueError):  # the end of a damaged pickle
        for opcode, argument, _ in itertools.islice(pickletools.genops(pickled), 10_000):
            if opcode.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    return ""


def scan(path: Path, allow: Sequence[type] | None = ()) -> None:
    """Check that ``torch.load(path, weights_only=True)`` is safe and ends.

    Args:
        path: the file.
        allow: classes whose instances it may contain; None for all, if torch checks them.

    Raises:
        ForbiddenName: see there.
        TorchFileError: the file is damaged, is not a torch file, or has more than its size allows.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return _scan_legacy(file, path.stat().st_size, allow)
        _scan_archive(path, allow)
    except (TorchFileError, OSError):
        raise
    except Exception:  # a damaged file can raise anything in zipfile and pickle
        raise TorchFileError("is damaged or not a torch file") from None


class _SmallReads(io.FileIO):
    """A file for zipfile, which reads a central directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise TorchFileError(
                f"has a list of members of {size:,} bytes; {MAX_DIRECTORY:,} are allowed"
            )
        return super().read(size)


def archive_records(path: Path) -> dict[str, tuple[int, int]]:
    """Map the name of each member, without the top folder, to its offset and size in the file."""
    records = {}
    with _SmallReads(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise TorchFileError("has a compressed member, which torch.save never writes")
            file.seek(member.header_offset + 26)
            start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            records[member.filename.partition("/")[2]] = start, member.file_size
        if len(records) < len(archive.infolist()):
            raise TorchFileError("has two members of the same name")
    return records


def _torchs_offsets(path: Path) -> dict[str, int]:
    """The name and offset in the file of each member, as torch's own reader finds them."""
    reader: Any = torch._C.PyTorchFileReader(str(path))
    return {name: reader.get_record_offset(name) for name in reader.get_all_records()}


def _scan_archive(path: Path, allow: Sequence[type] | None) -> None:
    records, size = archive_records(path), path.stat().st_size
    if "data.pkl" not in records:
        raise TorchFileError("is not a torch file: it has no data.pkl")
    if "constants.pkl" in records:
        raise TorchFileError("is a TorchScript program, not data")
    if sum(length for _, length in records.values()) > size:
        raise TorchFileError("is damaged: its members are larger than the file")
    if _torchs_offsets(path) != {name: start for name, (start, _) in records.items()}:
        # two lists of members, or names that differ in case: torch would load what was not scanned
        raise TorchFileError("is damaged: Python and torch find different members in it")
    start, length = records["data.pkl"]
    with path.open("rb") as file:
        file.seek(start)
        pickled = io.BytesIO(file.read(min(length, MAX_PICKLE + 1)))
    _Unpickler(pickled, allow, lambda key: records[f"data/{key}"][1]).load()


def _scan_legacy(file: io.BufferedReader, size: int, allow: Sequence[type] | None) -> None:
    """Scan a file of torch before 1.6.

    It has five pickles (a magic number, a version, system information, the object, the keys of its
    storages), followed by the storages.
    """
    file.seek(0)
    block = file.read(tarfile.BLOCKSIZE)
    if _is_tar(block):
        raise TorchFileError(
            "is a tar archive of torch before 0.1.10, and reading one can run code; if you trust "
            "it, load it with an old torch and save it again with torch.save"
        )
    if block[:1] != pickle.PROTO:  # such as a text file, whose letters are opcodes of protocol 0
        raise TorchFileError("is not a torch file")
    file.seek(0)
    total = 0
    for expected in (0x1950A86A20F9469CFC6C, 1001, None, None, None):
        unpickler = _Unpickler(file, allow, lambda key: None)
        value = unpickler.load()
        if expected is not None and value != expected:
            raise TorchFileError("is damaged or not a torch file")
        total += sum(storage.bytes for storage in unpickler.storages.values())
    if not isinstance(value, list) or any(type(key) is not str for key in value):
        raise TorchFileError("is damaged: its list of storages is invalid")
    if total > size:
        raise TorchFileError(f"declares tensors of {total:,} bytes but has {size:,} bytes")


def _is_tar(block: bytes) -> bool:
    """Whether Python's tarfile, which old torch tries first, accepts this header."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
