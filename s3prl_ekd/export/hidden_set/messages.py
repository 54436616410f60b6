"""Messages between ``validate`` and the process that runs a package: JSON and tensors.

A message is one line of JSON, ``{"facts": {...}, "bytes": N}``, and N bytes in safetensors format.
The sender is not trusted: reading a message runs no code and allocates at most the limits below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

MAX_JSON = 1 << 20  # bytes of JSON in a message
MAX_NUMBERS = 1 << 28  # tensor elements in a message: 1 GiB of float32
MAX_BYTES = 8 * MAX_NUMBERS
MAX_TEXT = 500  # characters of a string
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
Message = tuple[dict[str, Any], list[Tensor]]  # facts, and tensors on the CPU
_DIMENSIONS = 16  # of a tensor
_DEPTH = 8  # of nested lists, tuples and dicts


class BadMessage(Exception):
    """No message came, or it is malformed or too large."""


@dataclass(frozen=True)
class OpaqueObject:
    """Placeholder for an object other than a list, tuple, dict or plain tensor."""

    name: str  # of its type


def type_name(value: Any) -> str:
    """The name of the type of ``value``; of a placeholder, that of the original object."""
    return value.name if isinstance(value, OpaqueObject) else type(value).__name__


def send(file: IO[bytes], facts: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    """Write a message.

    Args:
        facts: JSON-serialisable values.
        tensors: on any device; sent as CPU tensors without gradient or subclass.

    Raises:
        BadMessage: it is too large.
    """
    numbers = sum(tensor.numel() for tensor in tensors)
    if numbers > MAX_NUMBERS:
        raise BadMessage(f"{numbers:,} tensor elements exceed the limit of {MAX_NUMBERS:,}")
    copies = {  # safetensors accepts no tensors that share memory
        str(i): tensor.detach().as_subclass(Tensor).cpu().resolve_neg().contiguous().clone()
        for i, tensor in enumerate(tensors)
    }
    body = safetensors.torch.save(copies)
    head = json.dumps({"facts": facts, "bytes": len(body)}).encode() + b"\n"
    if len(head) > MAX_JSON:
        raise BadMessage(f"{len(head):,} bytes of JSON exceed the limit of {MAX_JSON:,}")
    file.write(head)
    file.write(body)
    file.flush()


def receive(file: IO[bytes]) -> Message:
    """Read a message.

    Raises:
        EOFError: the file ends.
        BadMessage: the message is malformed or too large.
    """
    head = file.readline(MAX_JSON)
    if not head:
        raise EOFError
    try:
        message = json.loads(head)
        facts, size = message["facts"], message["bytes"]
        if not isinstance(facts, dict) or type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadMessage("a message is malformed or too large") from None
    body = file.read(size)
    if len(body) < size:
        raise EOFError
    try:
        named = safetensors.torch.load(body)
        tensors = [named[str(i)] for i in range(len(named))]
    except Exception:  # safetensors and torch raise exceptions of many classes
        raise BadMessage("the tensors of a message are malformed") from None
    if sum(tensor.numel() for tensor in tensors) > MAX_NUMBERS or not all(map(_valid, tensors)):
        raise BadMessage("the tensors of a message are malformed or too large")
    return facts, tensors


def _valid(tensor: Tensor) -> bool:
    """Whether a received tensor has an expected type; a bool must be 0 or 1."""
    if tensor.dtype not in _DTYPES or tensor.dim() > _DIMENSIONS:
        return False
    return tensor.dtype != torch.bool or not (tensor.view(torch.uint8) > 1).any()


def describe(value: Any, tensors: list[Tensor], depth: int = _DEPTH) -> dict[str, Any]:
    """Describe a package's result as JSON; append its tensors to ``tensors``, each once."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype not in _DTYPES:
            return {"other": f"{type(value).__name__} of {value.dtype}"}
        index = next((i for i, tensor in enumerate(tensors) if tensor is value), len(tensors))
        if index == len(tensors):
            tensors.append(value)
        return {"tensor": index}
    if depth and isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [describe(item, tensors, depth - 1) for item in value]}
    if depth and isinstance(value, dict):
        items = {str(key): describe(item, tensors, depth - 1) for key, item in value.items()}
        return {"dict": items}
    return {"other": type(value).__name__}


def rebuild(described: Any, tensors: Sequence[Tensor]) -> Any:
    """Rebuild a result from its description by :func:`describe`, as received.

    Returns:
        Lists, tuples, dicts, tensors and :class:`OpaqueObject`, nested.

    Raises:
        BadMessage: the description is malformed.
    """
    match described:
        case {"tensor": int(index)} if 0 <= index < len(tensors):
            return tensors[index]
        case {"list": list(items)}:
            return [rebuild(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(rebuild(item, tensors) for item in items)
        case {"dict": dict(items)}:
            return {text(key): rebuild(item, tensors) for key, item in items.items()}
        case {"other": name}:
            return OpaqueObject(text(name))
    raise BadMessage("the description of a result is malformed")


def text(value: Any) -> str:
    """Reduce a string of a message to one short printable line. Raises BadMessage."""
    if not isinstance(value, str):
        raise BadMessage(f"a message has a {type(value).__name__}, expected a string")
    line = " ".join(value[: 4 * MAX_TEXT].split())
    return "".join(char if char.isprintable() else "?" for char in line[:MAX_TEXT])


def texts(value: Any) -> list[str]:
    """Apply :func:`text` to a list of a message. Raises BadMessage."""
    if not isinstance(value, list):
        raise BadMessage(f"a message has a {type(value).__name__}, expected a list of strings")
    return [text(item) for item in value]
