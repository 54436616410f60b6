"""Load untrusted torch files: tensors and containers, never code.

A file is scanned (:mod:`.torch_scan`) and then loaded with ``torch.load(weights_only=True)``,
unless checkpoints are trusted (:mod:`.trust`).

A small file can also have settings of a model that needs a terabyte. :func:`build_limit` limits
the number and size of the tensors allocated while a model is built from a file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..compat.checkpoints import torch_load_cves, weights_only_by_default
from ..errors import CheckpointError
from . import trust
from .text import check_data, check_regular, download_problem
from .torch_scan import ForbiddenName, TorchFileError, scan

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


@contextlib.contextmanager
def build_limit(path: str | Path | Sequence[Path]) -> Iterator[None]:
    """Within the block, limit tensor allocations by the size of a checkpoint.

    Args:
        path: the checkpoint, or its files, which are in one folder.

    Raises:
        CheckpointError: far more is allocated than the checkpoint's weights need.
    """
    files = [Path(path)] if isinstance(path, (str, Path)) else path
    name = files[0] if len(files) == 1 else files[0].parent
    with _AllocationLimit(name, sum(file.stat().st_size for file in files)):
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


def safe_load(
    path: str | Path, noun: str = "checkpoint", allow: Sequence[type] = ()
) -> dict[str, Any]:
    """Load a torch file that contains a dict, on the CPU.

    Args:
        path: the file. Tensors are memory-mapped where the format allows.
        noun: what the file is, for error messages.
        allow: classes whose instances it may contain.

    Raises:
        CheckpointError: the file is missing, damaged or a failed download, is not a dict, names any
            other class or function and is not trusted, or declares tensors larger than the file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"cannot read the {noun} {path}: no such file")
    check_regular(path, noun, CheckpointError)
    if problem := download_problem(path):
        raise CheckpointError(f"the {noun} {path} {problem}")
    forbidden = None
    try:
        scan(path, allow)
    except ForbiddenName as error:
        if not trust.trusted():
            raise _refused(noun, path, error) from error  # the cause tells fairseq's files
        logger.warning("the %s %s %s; %s lets it run code", noun, path, error, trust.OPTION)
        forbidden = error
    except TorchFileError as error:
        raise _refused(noun, path, error) from None
    except OSError as error:
        reason = error.strerror or "unexpected end of file"
        raise CheckpointError(f"cannot read the {noun} {path}: {reason}") from None
    try:
        data = _load(path, allow, weights_only=forbidden is None)
    except Exception as error:  # a damaged file can raise anything
        logger.debug("%s: %r", path, error)
        raise CheckpointError(f"the {noun} {path} is damaged or not a torch file") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"the {noun} {path} must contain a dict, got a {type(data).__name__}")
    if forbidden is None:
        check_data(
            data, lambda reason: CheckpointError(f"the {noun} {path} cannot be used: {reason}")
        )
    return data


def _refused(noun: str, path: Path, error: TorchFileError) -> CheckpointError:
    hint = (
        "; use a file of tensors only, or, if you trust its author with your account, add "
        f"{trust.OPTION} (for commands that load runs or upstreams)"
    )
    return CheckpointError(
        f"the {noun} {path} {error}{hint if isinstance(error, ForbiddenName) else ''}"
    )


def _load(path: Path, allow: Sequence[type], weights_only: bool) -> Any:
    # safe_globals removes all its classes on exit, so leave out those that are allowed already.
    present = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([cls for cls in allow if cls not in present]):
        mmap = weights_only and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)


def scan_for_old_torch(path: str | os.PathLike[str]) -> None:
    """Reject a file that exploits a bug of the installed torch's ``weights_only=True``.

    torch itself checks the classes that the pickle names.

    Raises:
        CheckpointError: this torch has such bugs, and the file exploits them or is damaged.
    """
    if torch_load_cves(torch.__version__):
        try:
            scan(Path(path), allow=None)
        except TorchFileError as error:
            raise CheckpointError(
                f"the checkpoint {path} {error}; torch {torch.__version__} cannot load such files "
                "safely (see s3prl-ekd doctor): type pip install 'torch>=2.10', or, if you trust "
                f"its author with your account, add {trust.OPTION}"
            ) from None


def restrict_torch() -> None:
    """Make s3prl's own calls of ``torch.load`` safe, with any version of torch.

    torch 2.5 has ``weights_only=False`` as its default; an environment variable changes it. Before
    torch 2.10 a file can overwrite memory even with ``weights_only=True``; with these versions each
    file is scanned first, as in :func:`safe_load`.
    """
    if not trust.trusted() and not weights_only_by_default():
        os.environ[trust.STRICT] = "1"
    if torch_load_cves(torch.__version__) and not hasattr(torch.load, "_scans"):
        load = torch.load

        @functools.wraps(load)
        def scan_and_load(f: Any, *args: Any, **kwargs: Any) -> Any:
            if not trust.trusted() and isinstance(f, (str, os.PathLike)):
                scan_for_old_torch(f)
            return load(f, *args, **kwargs)

        scan_and_load._scans = True  # type: ignore[attr-defined]
        torch.load = scan_and_load
