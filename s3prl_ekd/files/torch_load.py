"""Load untrusted torch files: tensors and containers, never code.

``torch.save`` writes a zip archive of uncompressed members: the pickle ``data.pkl``, and one
storage for each tensor. Before torch 1.6 it wrote several pickles followed by the storages. A
pickle is a program. Its opcodes are first scanned without executing any, and the file is loaded
only if all of them are allowed.

A small file can also have settings of a model that needs a terabyte. :func:`build_limit` limits
the number and size of the tensors allocated while a model is built from a file.
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

from ..compat.checkpoints import torch_load_cves, weights_only_by_default
from ..errors import CheckpointError
from . import trust
from .text import check_data, check_regular, download_problem
from .torch_pickle import StorageTable, TorchFileError, scan_pickle

logger = logging.getLogger(__name__)

# Limits on allocations while a model is built from a file of N bytes:
# _BYTES_PER_BYTE * N + _BASE_BYTES bytes, and _BASE_TENSORS + N / _BYTES_PER_TENSOR tensors.
_BYTES_PER_BYTE = 8  # half precision, initialisation, copies
_BASE_BYTES = 256 << 20
_BASE_TENSORS = 4_000  # allocated in half a second; a model of 48 layers takes about 1500
_BYTES_PER_TENSOR = 1 << 18
# ATen operators that allocate a tensor without an input tensor.
_SHAPED = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty"}
_RANGES = {"arange", "range", "linspace", "logspace", "randperm"}

MAX_PICKLE = 4 << 20  # bytes; 5000 tensors take 1.3 million
MAX_MEMBERS = 65_536  # in an archive; each storage is one
MAX_DIRECTORY = 8 << 20  # bytes of the archive's central directory
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles before torch 1.6
# Zip records at the end of an archive (PKWARE's APPNOTE): the end of central directory and, before
# it in a zip64 archive, the zip64 end of central directory and its locator.
_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_STORAGE_TYPES = (
    "BFloat16 Half Float Double ComplexFloat ComplexDouble Bool Byte Char Short Int Long".split()
)
# The globals that any pickle may name: tensors, dtypes, containers.
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
        *(f"torch.{name}Storage" for name in _STORAGE_TYPES),
        *(f"torch.{kind}{size}" for kind in ("float", "int", "uint") for size in (8, 16, 32, 64)),
        *(f"torch.{name}" for name in ("bool", "bfloat16", "complex64", "complex128")),
    ]
)


@contextlib.contextmanager
def build_limit(path: str | Path) -> Iterator[None]:
    """Within the block, limit tensor allocations by the size of a checkpoint.

    Args:
        path: the checkpoint, or a folder of safetensors files.

    Raises:
        CheckpointError: far more is allocated than the checkpoint's weights need.
    """
    path = Path(path)
    files = path.glob("*.safetensors") if path.is_dir() else (path,)
    with _AllocationLimit(path, sum(file.stat().st_size for file in files)):
        yield


class _AllocationCounter:
    """Counts allocations.

    Separate from the dispatch mode: a ``__torch_dispatch__`` defined in a subclass of the mode
    makes torch import its compiler, which takes a second.
    """

    _path: Path
    _file_bytes: int
    _bytes_left: int
    _tensors_left: int

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
            self._count(math.prod(sizes), kwargs)
        elif name in _RANGES:
            self._count(max((abs(int(n)) for n in args if isinstance(n, (int, float))), default=0))
        elif name == "eye":
            rows, columns = (*args, *args)[:2]
            self._count(rows * columns, kwargs)
        elif name in ("repeat", "expand_copy"):
            self._count(math.prod(args[1]) * args[0].numel())
        return func(*args, **kwargs)

    def _count(self, numbers: int, kwargs: dict[str, Any] | None = None) -> None:
        dtype = (kwargs or {}).get("dtype")
        self._bytes_left -= numbers * (dtype.itemsize if dtype is not None else 4)
        self._tensors_left -= 1
        if self._bytes_left < 0 or self._tensors_left < 0:
            raise CheckpointError(
                f"{self._path} is damaged: its settings describe a model far larger than its "
                f"{self._file_bytes:,} bytes"
            )


class _AllocationLimit(_AllocationCounter, TorchDispatchMode):
    def __init__(self, path: Path, file_bytes: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self._path, self._file_bytes = path, file_bytes
        self._bytes_left = _BYTES_PER_BYTE * file_bytes + _BASE_BYTES
        self._tensors_left = _BASE_TENSORS + file_bytes // _BYTES_PER_TENSOR


def named_globals(path: Path) -> Iterator[str]:
    """The classes and functions that a torch file names, as ``module.name``.

    Raises:
        TorchFileError: it is not a torch file, takes far more memory than its size, or exploits a
            bug of ``torch.load(weights_only=True)`` in some version (:mod:`.torch_pickle`).
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            yield from _scan_archive(path, file)
            return
        file.seek(0)
        yield from _scan_legacy(file, path.stat().st_size)


def _scan_legacy(file: BinaryIO, size: int) -> Iterator[str]:
    """Scan a file of torch before 1.6.

    It has five pickles (a magic number, a version, system information, the object, the keys of its
    storages), followed by the storages.
    """
    if _is_tar(file.read(tarfile.BLOCKSIZE)):
        raise TorchFileError(
            "is a tar archive of torch before 0.1.10, and reading one can run code; if you trust "
            "it, load it with an old torch and save it again with torch.save"
        )
    file.seek(0)
    limited, storages = _Limited(file), StorageTable(parts=6)
    for expected in (_MAGIC, _PROTOCOL, None, None, None):
        result = yield from scan_pickle(limited, storages)
        if expected is not None and result != expected:
            raise TorchFileError("is damaged or not a torch file")
    if storages.bytes > size:
        raise TorchFileError(f"declares tensors of {storages.bytes:,} bytes but has {size:,} bytes")


def _is_tar(block: bytes) -> bool:
    """Whether Python's tarfile, which old torch tries first, accepts this header."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _scan_archive(path: Path, file: BinaryIO) -> Iterator[str]:
    size = path.stat().st_size
    count = _check_directory(file, size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != count:
                raise TorchFileError(
                    f"is damaged: its central directory declares {count} members but has "
                    f"{len(members)}"
                )
            records = _check_members(members, size)
            if "data.pkl" not in records:
                raise TorchFileError("is not a torch file: it has no data.pkl")
            if "constants.pkl" in records:
                raise TorchFileError("is a TorchScript program, not data")
            member = records["data.pkl"]
            if member.file_size > MAX_PICKLE:
                raise TorchFileError(
                    f"has a pickle of {member.file_size:,} bytes; {MAX_PICKLE:,} are allowed"
                )
            sizes = {
                name.removeprefix("data/"): record.file_size
                for name, record in records.items()
                if name.startswith("data/")
            }
            with archive.open(member) as stream:
                yield from scan_pickle(_Limited(stream), StorageTable(parts=5, records=sizes))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        raise TorchFileError("is damaged or not a torch file") from None


def _check_directory(file: BinaryIO, size: int) -> int:
    """The number of members in the archive, after checks of its central directory.

    Its size is limited, since opening an archive reads all of it. Python locates the directory
    backwards from the end record, torch by the offset in the end record. Both must be the same
    place: otherwise one directory could be scanned here and another one loaded.
    """
    end = size - _END.size
    fields = _read_record(file, _END, end)
    if fields is None or fields[0] != b"PK\x05\x06" or fields[-1]:  # length of a comment
        raise TorchFileError("is damaged or not a torch file")
    count: int
    count, length, start = fields[4:7]
    locator = _read_record(file, _ZIP64_LOCATOR, end - _ZIP64_LOCATOR.size)
    if locator is not None and locator[0] == b"PK\x06\x07":
        end -= _ZIP64_LOCATOR.size + _ZIP64_END.size
        fields = _read_record(file, _ZIP64_END, end)
        if fields is None or fields[0] != b"PK\x06\x06" or locator[2] != end:
            raise TorchFileError("is damaged or not a torch file")
        count, length, start = fields[7:10]
    if length > MAX_DIRECTORY:
        raise TorchFileError(
            f"has a central directory of {length:,} bytes; {MAX_DIRECTORY:,} are allowed"
        )
    if start + length != end:
        raise TorchFileError("is damaged: the offset of its central directory is wrong")
    return count


def _read_record(file: BinaryIO, record: struct.Struct, offset: int) -> tuple[Any, ...] | None:
    if offset < 0:
        return None
    file.seek(offset)
    data = file.read(record.size)
    return record.unpack(data) if len(data) == record.size else None


def _check_members(members: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, without the archive's top folder, after checks."""
    if len(members) > MAX_MEMBERS:
        raise TorchFileError(f"has {len(members):,} members; {MAX_MEMBERS:,} are allowed")
    # orig_filename is the name in the file; filename may differ (a NUL byte, an extra field).
    names = [member.orig_filename for member in members]
    if len({name.lower() for name in names}) < len(names):  # torch ignores case
        raise TorchFileError("has two members of the same name")
    if len({name.partition("/")[0] for name in names}) > 1 or any("\0" in name for name in names):
        raise TorchFileError("is not a torch file: its members are not in one folder")
    for member in members:
        if member.flag_bits & 1:
            raise TorchFileError("is encrypted")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise TorchFileError(
                f"has a compressed member ({member.filename[:60]!r}), which torch.save never writes"
            )
    if sum(member.file_size for member in members) > size:
        raise TorchFileError("is damaged: its members are larger than the file")
    return {name.partition("/")[2]: member for name, member in zip(names, members, strict=True)}


class _Limited:
    """A stream from which at most :data:`MAX_PICKLE` bytes can be read."""

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
    path: str | Path, noun: str = "checkpoint", allow: Sequence[type] = ()
) -> dict[str, Any]:
    """Load a torch file with ``weights_only=True`` after scanning its pickle.

    Only the classes in :data:`ALLOWED` and ``allow`` may be named in the pickle, except with
    ``--trust-checkpoint`` (see :mod:`.trust`).

    Args:
        path: the file. Tensors are memory-mapped where the format allows.
        noun: what the file is, for error messages.
        allow: further classes that the pickle may name.

    Raises:
        CheckpointError: the file is missing, damaged or a failed download, is not a dict, names any
            other class or function, or declares tensors larger than the file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"cannot read the {noun} {path}: no such file")
    check_regular(path, noun, CheckpointError)
    if problem := download_problem(path):
        raise CheckpointError(f"the {noun} {path} {problem}")
    try:
        forbidden = _first_forbidden(named_globals(path), allow)
        if forbidden is None:
            data = _load(path, allow)
        elif trust.trusted():
            logger.warning(
                "the %s %s names %s; %s allows it to run any code",
                noun,
                path,
                forbidden,
                trust.OPTION,
            )
            data = torch.load(path, map_location="cpu", weights_only=False)
        else:
            raise CheckpointError(
                f"cannot load the {noun} {path}: its pickle names {forbidden}, which can run code. "
                "Use a file of tensors only, or, if you trust its author with your account, add "
                f"{trust.OPTION} (for commands that load runs or upstreams)"
            )
    except CheckpointError:
        raise
    except TorchFileError as error:
        raise CheckpointError(f"the {noun} {path} {error}") from None
    except OSError as error:
        reason = error.strerror or "unexpected end of file"
        raise CheckpointError(f"cannot read the {noun} {path}: {reason}") from None
    except Exception as error:  # a damaged pickle can raise anything
        logger.debug("%s: %r", path, error)
        raise CheckpointError(f"the {noun} {path} is damaged or not a torch file") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"the {noun} {path} must contain a dict, got a {type(data).__name__}")
    if forbidden is None:
        _check_loaded(data, f"the {noun} {path} cannot be used")
    return data


def scan_for_old_torch(path: str | os.PathLike[str]) -> None:
    """Reject a file that exploits a bug of the installed torch's ``weights_only=True``.

    torch itself checks the classes that the pickle names.

    Raises:
        CheckpointError: this torch has such bugs, and the file exploits them or is damaged.
    """
    if not torch_load_cves(torch.__version__):
        return
    try:
        for _ in named_globals(Path(path)):
            pass
    except TorchFileError as error:
        raise CheckpointError(
            f"the checkpoint {path} {error}; torch {torch.__version__} cannot load such files "
            "safely (see s3prl-ekd doctor): type pip install 'torch>=2.10', or, if you trust its "
            f"author with your account, add {trust.OPTION}"
        ) from None


def _first_forbidden(names: Iterable[str], allow: Sequence[type]) -> str | None:
    allowed = ALLOWED | {f"{cls.__module__}.{cls.__qualname__}" for cls in allow}
    return next((name for name in names if name not in allowed), None)


def _load(path: Path, allow: Sequence[type]) -> Any:
    # safe_globals removes all its classes on exit, so leave out those that are allowed already.
    present = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([cls for cls in allow if cls not in present]):
        try:
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError:
            raise TorchFileError("is damaged or not a torch file") from None


def _check_loaded(data: dict[str, Any], message: str) -> None:
    """Raise CheckpointError for data that takes too long to traverse, or an invalid tensor."""
    check_data(data, lambda reason: CheckpointError(f"{message}: {reason}"))
    queue: list[Any] = [data]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple)):
            queue += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise CheckpointError(
                    f"{message}: it has a tensor that is not dense, on the CPU and unquantized"
                )
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{message}: a tensor declares the shape {_shape(value)}, but its storage has "
                    f"{value.untyped_storage().nbytes():,} bytes"
                )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def restrict_torch() -> None:
    """Make s3prl's own calls of ``torch.load`` safe, with any version of torch.

    torch 2.5 has ``weights_only=False`` as its default; an environment variable changes it. Before
    torch 2.10 a file can overwrite memory even with ``weights_only=True``; with these versions each
    file is scanned first, as in :func:`safe_load`.
    """
    if not trust.trusted() and not weights_only_by_default():
        os.environ[trust.STRICT] = "1"
    if torch_load_cves(torch.__version__) and not hasattr(torch.load, "_scans"):
        torch.load = _scanning(torch.load)


def _scanning(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``torch.load`` to scan files given by path, unless checkpoints are trusted."""

    @functools.wraps(load)
    def scan_and_load(f: Any, *args: Any, **kwargs: Any) -> Any:
        if not trust.trusted() and isinstance(f, (str, os.PathLike)):
            scan_for_old_torch(f)
        return load(f, *args, **kwargs)

    scan_and_load._scans = True  # type: ignore[attr-defined]
    return scan_and_load
