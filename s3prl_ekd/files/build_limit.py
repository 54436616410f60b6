"""A model built from a file's settings may not be much larger than the file's weights.

A file of a kilobyte can ask for a model of a terabyte, or of a million layers. Which settings do
that differs from model to model, so what is watched is what building does: tensors made, and their
size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CheckpointError

_TIMES = 8  # bytes allocated for a byte of the file: half precision, initialisation, copies
_SPARE_BYTES = 256 << 20
_SPARE_TENSORS = 4_000  # made in half a second; a model of 48 layers takes about 1500
_BYTES_OF_ONE = 1 << 18  # of the file, for each more
# ATen's ways to make a tensor out of nothing; the others start from one that is there.
_SHAPED = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty"}
_RANGES = {"arange", "range", "linspace", "logspace", "randperm"}


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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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

    def _make(self, count: int, kwargs: dict | None = None) -> None:
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
        super().__init__()
        self._path, self._held = path, held
        self._bytes, self._tensors = most, _SPARE_TENSORS + held // _BYTES_OF_ONE
