"""Read a torch file as data: plain tensors and containers, never code."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..compat.checkpoints import loader_holes
from ..errors import CheckpointError
from . import trust
from .text import check_data, check_regular, download_problem
from .torch_load import TorchFileError, named_globals

logger = logging.getLogger(__name__)

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


def safe_load(path: str | Path, what: str = "checkpoint", allow: Sequence[type] = ()) -> dict:
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


def scan_for_old_torch(path: str | Path) -> None:
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
    with torch.serialization.safe_globals(new):
        try:
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError:
            raise TorchFileError("is damaged or no torch file") from None


def _check_loaded(data: dict, where: str) -> None:
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
