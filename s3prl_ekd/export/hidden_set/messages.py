"""Messages between ``validate`` and the process that runs a package: JSON and tensors.

A message consists of two lengths of eight bytes, a JSON object and the data of its tensors. The
sender is not trusted: reading a message runs no code and allocates at most the limits below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

MAX_JSON = 1 << 20  # bytes of JSON in a message
MAX_NUMBERS = 1 << 28  # tensor elements in a message: 1 GiB of float32
MAX_TEXT = 500  # characters of a string
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_DEPTH = 8  # of nested lists, tuples and dicts


class BadMessage(Exception):
    """A message is malformed or too large."""


class OpaqueObject:
    """Placeholder for an object other than a list, tuple, dict or plain tensor.

    Attributes:
        name: the name of its type.
    """

    def __init__(self, name: str):
        self.name = name


def type_name(value: Any) -> str:
    """The name of the type of ``value``; of a placeholder, that of the original object."""
    return value.name if isinstance(value, OpaqueObject) else type(value).__name__


def send(file: IO[bytes], facts: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    """Write a message.

    Args:
        facts: JSON-serialisable values.
        tensors: on any device; sent as CPU tensors.

    Raises:
        BadMessage: it is too large.
    """
    numbers = sum(tensor.numel() for tensor in tensors)
    cpu_tensors = [_to_cpu(tensor) for tensor in tensors] if numbers <= MAX_NUMBERS else []
    head = json.dumps(
        {"facts": facts, "tensors": [_layout(tensor) for tensor in cpu_tensors]}
    ).encode()
    if len(head) > MAX_JSON or numbers > MAX_NUMBERS:
        raise BadMessage(
            f"{numbers:,} tensor elements and {len(head):,} bytes of JSON exceed the limits "
            f"({MAX_NUMBERS:,} and {MAX_JSON:,})"
        )
    body = sum(tensor.numel() * tensor.element_size() for tensor in cpu_tensors)
    file.write(len(head).to_bytes(8, "little") + body.to_bytes(8, "little") + head)
    for tensor in cpu_tensors:
        if tensor.numel():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    file.flush()


def receive(file: IO[bytes]) -> tuple[dict[str, Any], list[Tensor]]:
    """Read a message.

    Returns:
        The facts and the CPU tensors.

    Raises:
        EOFError: the file ends.
        BadMessage: the message is malformed or too large.
    """
    lengths = _read(file, 16)
    head, body = (int.from_bytes(part, "little") for part in (lengths[:8], lengths[8:]))
    if head > MAX_JSON or body > 8 * MAX_NUMBERS:
        raise BadMessage(
            f"a message has {head:,} bytes of JSON and {body:,} bytes of tensors; at most "
            f"{MAX_JSON:,} and {8 * MAX_NUMBERS:,} are allowed"
        )
    try:
        message = json.loads(_read(file, head))
        facts, layouts = message["facts"], message["tensors"]
        sizes = [(_DTYPES[dtype], _shape(shape)) for dtype, shape in layouts]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadMessage("a message is malformed") from None
    counts = [math.prod(shape) for _, shape in sizes]
    byte_counts = [count * dtype.itemsize for count, (dtype, _) in zip(counts, sizes, strict=True)]
    if not isinstance(facts, dict) or sum(byte_counts) != body or sum(counts) > MAX_NUMBERS:
        raise BadMessage("the tensors of a message do not match their shapes or are too large")
    tensors = []
    for (dtype, shape), length in zip(sizes, byte_counts, strict=True):
        data = _read(file, length)
        if dtype == torch.bool and data.translate(None, b"\0\1"):
            raise BadMessage("a bool tensor of a message has values other than 0 and 1")
        flat = torch.frombuffer(data, dtype=dtype) if length else torch.empty(0, dtype=dtype)
        tensors.append(flat.reshape(shape))
    return facts, tensors


def describe(value: Any, tensors: list[Tensor], depth: int = _DEPTH) -> dict[str, Any]:
    """Describe a package's result as JSON; append its tensors to ``tensors``, each once."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype not in _DTYPES.values():
            return {"other": f"{type(value).__name__} of {value.dtype}"}
        index = next((i for i, tensor in enumerate(tensors) if tensor is value), len(tensors))
        if index == len(tensors):
            tensors.append(value)
        return {"tensor": index, "device": str(value.device)}
    if depth and isinstance(value, (list, tuple)):
        container = "list" if isinstance(value, list) else "tuple"
        return {container: [describe(item, tensors, depth - 1) for item in value]}
    if depth and isinstance(value, dict):
        items = [[str(key), describe(item, tensors, depth - 1)] for key, item in value.items()]
        return {"dict": items}
    return {"other": type(value).__name__}


def rebuild(described: Any, tensors: Sequence[Tensor], devices: dict[int, str]) -> Any:
    """Rebuild a result from its description by :func:`describe`.

    Args:
        described: the description, as received.
        tensors: the tensors received with it.
        devices: filled with the original device of each tensor used, keyed by its ``id``.

    Returns:
        Lists, tuples, dicts, tensors and :class:`OpaqueObject`, nested.

    Raises:
        BadMessage: the description is malformed.
    """
    try:
        if "tensor" in described:
            index, device = described["tensor"], described["device"]
            if type(index) is not int or not 0 <= index < len(tensors):
                raise BadMessage("a message refers to a tensor that it does not contain")
            devices[id(tensors[index])] = text(device)
            return tensors[index]
        if "list" in described:
            return [rebuild(item, tensors, devices) for item in described["list"]]
        if "tuple" in described:
            return tuple(rebuild(item, tensors, devices) for item in described["tuple"])
        if "dict" in described:
            return {text(k): rebuild(item, tensors, devices) for k, item in described["dict"]}
        return OpaqueObject(text(described["other"]))
    except (TypeError, ValueError, KeyError, RecursionError):
        raise BadMessage("the description of a result is malformed") from None


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


def _to_cpu(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor without gradient or subclass."""
    return tensor.detach().as_subclass(Tensor).cpu().resolve_neg().contiguous()


def _layout(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _shape(shape: Any) -> list[int]:
    if not isinstance(shape, list) or len(shape) > 16:
        raise ValueError
    if any(type(size) is not int or not 0 <= size <= MAX_NUMBERS for size in shape):
        raise ValueError
    return shape


def _read(file: IO[bytes], count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        block = file.read(min(count - len(data), 1 << 24))
        if not block:
            raise EOFError
        data += block
    return data
