"""Read a torch file as data: tensors and containers, never code.

``torch.save`` writes a zip archive of uncompressed members: the pickle ``data.pkl``, and one
storage for each tensor. Before torch 1.6 it wrote several pickles followed by the storages.

A pickle is a program. ``torch.load(weights_only=True)`` runs a restricted one, but can run any code
before torch 2.6 (CVE-2025-32434) and overwrite memory before 2.10 (CVE-2026-24747). This reader is
smaller and the same with any torch: the opcodes that ``torch.save`` writes, applied to lists, dicts
and the functions in :data:`_KNOWN`. Each tensor must lie within its storage, and each storage
within the file.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Opcodes, and items copied by them; 5000 tensors take 150,000, the maximum about a second.
MAX_STEPS = 500_000
_SIZED = (str, list, tuple, dict, set)
MAX_PICKLE = 4 << 20  # bytes; 5000 tensors take 1.3 million
MAX_DIRECTORY = 8 << 20  # bytes of an archive's central directory, at about 80 a tensor
_BYTE_ORDER = sys.byteorder.encode()
# Before torch 1.6, a file begins with two pickles: a magic number and the version 1001.
_LEGACY_HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)


class TorchFileError(Exception):
    """A file that ``torch.save`` would not write; the message continues "the file ..."."""


class ForbiddenName(TorchFileError):
    """The pickle names a class, function or opcode that is not allowed."""


class _Class(NamedTuple):
    """A class whose instances the pickle may contain; itself not callable."""

    cls: type


def read_torch_file(path: Path, allow: Sequence[type] = ()) -> Any:
    """Read a torch file; the tensors of an archive are memory-mapped.

    Args:
        path: the file.
        allow: classes whose instances it may contain.

    Raises:
        ForbiddenName: see there.
        TorchFileError: the file is damaged, is not a torch file, or has more than its size allows.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return _read_legacy(file, path.stat().st_size, allow)
        return _read_archive(path, allow)
    except (TorchFileError, OSError):
        raise
    except Exception:  # a damaged file can raise anything in zipfile, pickletools and torch
        raise TorchFileError("is damaged or not a torch file") from None


class _SmallReads(io.FileIO):
    """A file for zipfile, which reads a central directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise TorchFileError(f"needs a read of {size:,} bytes; {MAX_DIRECTORY:,} are allowed")
        return super().read(size)


def archive_records(path: Path) -> dict[str, tuple[int, int]]:
    """Map the name of each member, without the top folder, to its offset and size in the file."""
    records = {}
    with _SmallReads(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise TorchFileError("has a compressed member, which torch.save never writes")
            file.seek(member.header_offset)
            header = file.read(30)  # with the lengths of the name and of an extra field after it
            lengths = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            start = member.header_offset + len(header) + sum(lengths)
            records[member.filename.partition("/")[2]] = start, member.file_size
        if len(records) < len(archive.infolist()):
            raise TorchFileError("has two members of the same name")
    return records


def _read_archive(path: Path, allow: Sequence[type]) -> Any:
    records = archive_records(path)
    if "data.pkl" not in records:
        raise TorchFileError("is not a torch file: it has no data.pkl")
    if "constants.pkl" in records:
        raise TorchFileError("is a TorchScript program, not data")
    whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def member(name: str) -> torch.UntypedStorage:
        start, size = records[name]
        if start + size > whole.nbytes():
            raise TorchFileError("is damaged: its members are larger than the file")
        return whole[start : start + size]  # type: ignore[no-any-return]

    def storage(key: str, size: int) -> torch.UntypedStorage:
        _, record_size = records.get(f"data/{key}", (0, "no such record"))
        if record_size != size:
            raise TorchFileError(
                f"declares {size:,} bytes for the storage {key[:40]!r} but has {record_size}"
            )
        return member(f"data/{key}")

    if "byteorder" in records and _memory(member("byteorder")).tobytes() != _BYTE_ORDER:
        raise TorchFileError("has numbers in another byte order than this machine's")
    if records["data.pkl"][1] > MAX_PICKLE:
        raise TorchFileError(
            f"has a pickle of {records['data.pkl'][1]:,} bytes; {MAX_PICKLE:,} are allowed"
        )
    return _run_pickle(_memory(member("data.pkl")).tobytes(), _Storages(storage), allow)


def _read_legacy(file: io.BufferedReader, size: int, allow: Sequence[type]) -> Any:
    """Read a file of torch before 1.6.

    After the header it has three pickles (system information, the object, the keys of its
    storages), and then the number of items and the items of each storage.
    """
    file.seek(0)
    if _is_tar(file.read(tarfile.BLOCKSIZE)):
        raise TorchFileError(
            "is a tar archive of torch before 0.1.10, and reading one can run code; if you trust "
            "it, load it with an old torch and save it again with torch.save"
        )
    file.seek(0)
    if file.read(len(_LEGACY_HEADER)) != _LEGACY_HEADER:
        raise TorchFileError("is damaged or not a torch file")
    total = 0

    def storage(key: str, storage_size: int) -> torch.UntypedStorage:
        nonlocal total
        total += storage_size
        if total > size:
            raise TorchFileError(f"declares tensors of {total:,} bytes but has {size:,} bytes")
        return torch.UntypedStorage(storage_size)

    storages = _Storages(storage)
    _, data, keys = (_run_pickle(file, storages, allow) for _ in range(3))
    if {*keys} != storages.by_key.keys():
        raise TorchFileError("is damaged: its list of storages is not complete")
    for key in keys:
        untyped = storages.by_key[key]._untyped_storage
        items = int.from_bytes(file.read(8), "little")
        complete = file.readinto(_memory(untyped)) == untyped.nbytes()
        if not complete or items * storages.by_key[key].dtype.itemsize != untyped.nbytes():
            raise TorchFileError("is damaged: a storage is not complete")
    return data


def _memory(storage: torch.UntypedStorage) -> Any:
    """The bytes of a storage, as a numpy array."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _is_tar(block: bytes) -> bool:
    """Whether Python's tarfile, which old torch tries first, accepts this header."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Storages:
    """The storages that a file's pickle refers to; ``load`` gives the memory of a key and size."""

    def __init__(self, load: Callable[[str, int], torch.UntypedStorage]):
        self._load = load
        self.by_key: dict[str, torch.TypedStorage] = {}

    def get(self, reference: Any) -> torch.TypedStorage:
        """The storage of a persistent id: ("storage", type, key, device, items)."""
        kind, dtype, key, _, items, *view = reference
        if (
            (type(kind), type(dtype), type(key), type(items)) != (str, torch.dtype, str, int)
            or (kind, view) not in (("storage", []), ("storage", [None]))
            or items < 0
            or not key.isascii()  # torch may decode other characters differently
        ):
            raise TorchFileError("has a storage of unknown type or size")
        size = items * dtype.itemsize
        if key not in self.by_key:
            self.by_key[key] = torch.TypedStorage(
                wrap_storage=self._load(key, size), dtype=dtype, _internal=True
            )
        storage = self.by_key[key]
        if (storage.dtype, storage._untyped_storage.nbytes()) != (dtype, size):
            raise TorchFileError(f"declares the storage {key[:40]!r} twice, differently")
        return storage


def _run_pickle(
    stream: bytes | io.BufferedReader, storages: _Storages, allow: Sequence[type]
) -> Any:
    """Run the program of a pickle; see the docstring of the module."""
    classes = {f"{cls.__module__}.{cls.__qualname__}": _Class(cls) for cls in allow}
    known = {**_KNOWN, **classes}
    stack: list[Any] = []
    stacks: list[list[Any]] = []  # those below a MARK
    memo: dict[Any, Any] = {}
    steps = 0
    for opcode, argument, _ in pickletools.genops(stream):
        steps += 1
        if steps > MAX_STEPS:
            raise TorchFileError(f"has a pickle of more than {MAX_STEPS:,} steps")
        match opcode.name:
            case "PROTO":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                empty = {"TUPLE": tuple, "LIST": list, "DICT": dict, "SET": set}
                stack.append(empty[opcode.name.removeprefix("EMPTY_")]())
            case "MARK":
                stacks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, stacks.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                _add_items(stack[-1], [item])
            case "APPENDS":
                items, stack = stack, stacks.pop()
                _add_items(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [(key, value)])
            case "SETITEMS":
                items, stack = stack, stacks.pop()
                _set_items(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(storages.get(stack.pop()))
            case "GLOBAL":
                name = str(argument).replace(" ", ".", 1)
                if name not in known:
                    raise ForbiddenName(f"names {name[:200]}")
                stack.append(known[name])
            case "REDUCE":
                function, arguments = stack.pop(-2), stack.pop()
                steps += sum(len(item) for item in arguments if isinstance(item, _SIZED))
                stack.append(function(*arguments) if steps <= MAX_STEPS else None)
            case "NEWOBJ":
                stack.pop()  # the arguments, which the allowed classes do not have
                cls = stack.pop().cls
                stack.append(cls.__new__(cls))
            case "BUILD":
                state = stack.pop()
                if type(stack[-1]) not in (OrderedDict, *allow) or type(state) is not dict:
                    raise TorchFileError("sets the state of a value that is not an object")
                steps += len(state)
                stack[-1].__dict__.update(state)
            case "STOP":
                return stack.pop()
            case other:
                raise ForbiddenName(f"has the pickle opcode {other}")


def _add_items(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise TorchFileError("appends to an object that is not a list")
    target += items


def _set_items(target: Any, items: Iterable[tuple[Any, Any]]) -> None:
    if type(target) not in (dict, OrderedDict):
        raise TorchFileError("sets items of an object that is not a mapping")
    for key, value in items:
        target[_key(key)] = value


def _key(key: Any) -> Any:
    """A key, if its hash is quick: that of nested tuples or equal hashes can take for ever."""
    for part in key if type(key) is tuple else (key,):
        plain = type(part) in (str, bool, float, type(None), torch.dtype)
        if not plain and not (type(part) is int and abs(part) < 2**64):
            raise TorchFileError("has a mapping or set with a key that is not text or a number")
    return key


def _tensor(
    storage: torch.TypedStorage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
) -> torch.Tensor:
    """A tensor, if it lies within its storage; hooks are code and are left out."""
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise TorchFileError("has a tensor with an invalid shape, stride or offset")
    bytes_ = storage._untyped_storage.nbytes()
    items = bytes_ // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset > items or (0 not in size and (last >= items or math.prod(size) > items)):
        raise TorchFileError(
            f"cannot be used: a tensor declares the shape {'x'.join(map(str, size))[:60]}, but its "
            f"storage has {bytes_:,} bytes"
        )
    return torch._utils._rebuild_tensor_v2(  # type: ignore[no-any-return]
        storage, offset, size, stride, requires_grad, OrderedDict()
    )


def _parameter(data: Any, requires_grad: bool, hooks: Any) -> torch.nn.Parameter:
    if type(data) is not torch.Tensor:
        raise TorchFileError("has a parameter that is not a tensor")
    return torch.nn.Parameter(data, requires_grad)


_STORAGE_TYPES = {
    "BFloat16": torch.bfloat16,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
}
# What any pickle may name. A type of storage is represented by its dtype: it must not be called,
# since UntypedStorage(10**12) would allocate a terabyte.
_KNOWN: Mapping[str, Any] = {
    "collections.OrderedDict": lambda items=(): OrderedDict((_key(k), v) for k, v in items),
    "builtins.set": lambda items=(): {_key(item) for item in items},
    "__builtin__.set": lambda items=(): {_key(item) for item in items},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGE_TYPES.items()},
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
