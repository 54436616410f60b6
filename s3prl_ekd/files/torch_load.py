"""Read torch files as data: plain tensors and containers, never code.

``torch.save`` writes a zip archive of uncompressed members, of which ``data.pkl`` is a pickle and
the others are the tensors' numbers, or, before torch 1.6, several pickles with the numbers behind
them. A pickle is a program: it is read here as a list of instructions first, none carried out, and
loaded only if all of them are allowed.

A file of a kilobyte can also ask for a model of a terabyte. :func:`build_limit` counts the tensors
made while a model is built from a file's settings, and their size.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..compat.checkpoints import loader_holes, refuses_by_default
from ..errors import CheckpointError
from . import trust
from .text import check_data, check_regular, download_problem
from .torch_pickle import Storages, TorchFileError, follow

logger = logging.getLogger(__name__)

_TIMES = 8  # bytes allocated for a byte of the file: half precision, initialisation, copies
_SPARE_BYTES = 256 << 20
_SPARE_TENSORS = 4_000  # made in half a second; a model of 48 layers takes about 1500
_BYTES_OF_ONE = 1 << 18  # of the file, for each more
# ATen's ways to make a tensor out of nothing; the others start from one that is there.
_SHAPED = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty"}
_RANGES = {"arange", "range", "linspace", "logspace", "randperm"}

MAX_PICKLE = 4 << 20  # bytes; 5000 tensors take 1.3 million
MAX_MEMBERS = 65_536  # in the archive: one a tensor
MAX_CONTENTS = 8 << 20  # bytes of the archive's list of members
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles before torch 1.6
# The end of an archive, and before it where there are large numbers; see PKWARE's APPNOTE.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_LARGE_END = struct.Struct("<4sQ2H2L4Q")
_TYPES = (
    "BFloat16 Half Float Double ComplexFloat ComplexDouble Bool Byte Char Short Int Long".split()
)
# All that a file may name beside what the caller allows: tensors, their types, and containers.
ALLOWED = frozenset(
    [
        "collections.OrderedDict",
        "__builtin__.set",
        "builtins.set",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}Storage" for name in _TYPES),
        *(f"torch.{kind}{size}" for kind in ("float", "int", "uint") for size in (8, 16, 32, 64)),
        *(f"torch.{name}" for name in ("bool", "bfloat16", "complex64", "complex128")),
    ]
)


@contextlib.contextmanager
def build_limit(path: str | Path) -> Iterator[None]:
    """Within it, no more may be built than the file (or a folder's files) could have weights for.

    Raises:
        CheckpointError: more was asked for.
    """
    path = Path(path)
    files = path.glob("*.safetensors") if path.is_dir() else (path,)
    held = sum(file.stat().st_size for file in files)
    with _Watch(path, held, _TIMES * held + _SPARE_BYTES):
        yield


class _Counts:
    """Apart from the mode, whose subclasses would have torch's compiler imported: a second."""

    _path: Path
    _held: int  # bytes of the file
    _bytes: int  # that may still be made
    _tensors: int  # that may still be made

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _SHAPED and str(kwargs.get("device")) != "meta":
            sizes = args[1] if name == "new_empty" else args[0]
            self._make(math.prod(sizes), kwargs)
        elif name in _RANGES:
            self._make(max((abs(int(n)) for n in args if isinstance(n, (int, float))), default=0))
        elif name == "eye":
            rows, columns = (*args, *args)[:2]
            self._make(rows * columns, kwargs)
        elif name in ("repeat", "expand_copy"):
            self._make(math.prod(args[1]) * args[0].numel())
        return func(*args, **kwargs)

    def _make(self, count: int, kwargs: dict[str, Any] | None = None) -> None:
        dtype = (kwargs or {}).get("dtype")
        self._bytes -= count * (dtype.itemsize if dtype is not None else 4)
        self._tensors -= 1
        if self._bytes < 0 or self._tensors < 0:
            raise CheckpointError(
                f"{self._path} is damaged: it asks for a model far larger than the "
                f"{self._held:,} bytes that it has"
            )


class _Watch(_Counts, TorchDispatchMode):
    def __init__(self, path: Path, held: int, most: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self._path, self._held = path, held
        self._bytes, self._tensors = most, _SPARE_TENSORS + held // _BYTES_OF_ONE


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
    count: int
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


def _read(file: BinaryIO, kind: struct.Struct, at: int) -> tuple[Any, ...] | None:
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

    def __init__(self, stream: IO[bytes]):
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


def safe_load(
    path: str | Path, what: str = "checkpoint", allow: Sequence[type] = ()
) -> dict[str, Any]:
    """``torch.load`` with ``weights_only=True``, a list of what is allowed, and our own errors.

    What the file asks for is looked up before any of it is loaded. ``--trust-checkpoint`` (see
    :mod:`.trust`) is the only way past that list.

    Args:
        path: the file. Tensors stay on disk until used (memory-mapped) where the format allows.
        what: the noun for messages.
        allow: classes that the file may name beside :data:`ALLOWED`.

    Raises:
        CheckpointError: the file is missing, not the one that was to be downloaded, damaged, no
            mapping, asks for any other class or function, or declares more than it holds.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"cannot read the {what} {path}: there is no such file")
    check_regular(path, what, CheckpointError)
    if problem := download_problem(path):
        raise CheckpointError(f"the {what} {path} {problem}")
    try:
        asked = _first_refused(named_globals(path), allow)
        if asked is None:
            data = _load(path, allow)
        elif trust.trusted():
            logger.warning(
                "the %s %s asks for %s, and %s lets it run any code",
                what,
                path,
                asked,
                trust.OPTION,
            )
            data = torch.load(path, map_location="cpu", weights_only=False)
        else:
            raise CheckpointError(
                f"the {what} {path} asks for {asked}, which is code and not data; it is not "
                "loaded. Use a file of plain tensors, or, if you trust who made it as much as "
                f"yourself, add {trust.OPTION} to a command that reads runs or upstreams"
            )
    except CheckpointError:
        raise
    except TorchFileError as error:
        raise CheckpointError(f"the {what} {path} {error}") from None
    except OSError as error:
        reason = error.strerror or "it ends too early"
        raise CheckpointError(f"cannot read the {what} {path}: {reason}") from None
    except Exception as error:  # torch passes on whatever a damaged pickle makes Python raise
        logger.debug("%s: %r", path, error)
        raise CheckpointError(f"the {what} {path} is damaged or no torch file") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"the {what} {path} holds a {type(data).__name__}, not a mapping")
    if asked is None:
        _check_loaded(data, f"the {what} {path} cannot be used")
    return data


def scan_for_old_torch(path: str | os.PathLike[str]) -> None:
    """Refuse a file that ``torch.load(weights_only=True)`` of the installed torch does more with
    than read data. Classes that it names are torch's business.

    Raises:
        CheckpointError: torch has such holes, and the file is made for them or damaged.
    """
    if not loader_holes(torch.__version__):
        return
    try:
        for _ in named_globals(Path(path)):
            pass
    except TorchFileError as error:
        raise CheckpointError(
            f"the checkpoint {path} {error}; torch {torch.__version__} is not safe with such files "
            "(s3prl-ekd doctor says more): type pip install 'torch>=2.10', or, if you trust who "
            f"made it as much as yourself, add {trust.OPTION}"
        ) from None


def _first_refused(names: Iterable[str], allow: Sequence[type]) -> str | None:
    known = ALLOWED | {f"{kind.__module__}.{kind.__qualname__}" for kind in allow}
    return next((name for name in names if name not in known), None)


def _load(path: Path, allow: Sequence[type]) -> Any:
    # The context takes away at its end all that it was given: what is allowed already stays out.
    named = torch.serialization.get_safe_globals()
    new = [known for known in allow if known not in named]
    with torch.serialization.safe_globals([*new]):
        try:
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError:
            raise TorchFileError("is damaged or no torch file") from None


def _check_loaded(data: dict[str, Any], where: str) -> None:
    """Tensors that lie in the file as large as they say they are, and data that has an end."""
    check_data(data, lambda reason: CheckpointError(f"{where}: {reason}"))
    waiting: list[Any] = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise CheckpointError(f"{where}: a tensor in it is not a plain one")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{where}: a tensor declares the shape {_shape(value)}, for which the file has "
                    f"{value.untyped_storage().nbytes():,} bytes"
                )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def restrict_torch() -> None:
    """Have s3prl's own ``torch.load`` read data and nothing else, with any torch.

    torch 2.5 loads weights only where that is asked for, and before 2.10 a file can do harm even
    then: there each file is scanned first, as :func:`safe_load` does.
    """
    if not trust.trusted() and not refuses_by_default():
        os.environ[trust.STRICT] = "1"
    if loader_holes(torch.__version__) and not hasattr(torch.load, "_scans"):
        torch.load = _scanning(torch.load)


def _scanning(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load`` that scans a file which it is given by its path, unless it is trusted."""

    @functools.wraps(load)
    def scan_and_load(f: Any, *args: Any, **kwargs: Any) -> Any:
        if not trust.trusted() and isinstance(f, (str, os.PathLike)):
            scan_for_old_torch(f)
        return load(f, *args, **kwargs)

    scan_and_load._scans = True  # type: ignore[attr-defined]
    return scan_and_load
