"""Scan the pickle of a torch file by abstract interpretation, without executing it.

``torch.load(weights_only=True)`` before torch 2.10 sets items of any object that the pickle names
and takes the size of a storage from the pickle (CVE-2026-24747); both can write outside a tensor's
memory. So each opcode is interpreted here first, on placeholders: a list, mapping, tensor or object
is represented by a :class:`Placeholder`, a number or string by itself. Only what ``torch.save``
writes is accepted.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

MAX_OPCODES = 500_000  # 5000 tensors take 130,000; the maximum takes about a second
_ITEM_BYTES = {
    **dict.fromkeys(("torch.BoolStorage", "torch.ByteStorage", "torch.CharStorage"), 1),
    **dict.fromkeys(("torch.ShortStorage", "torch.HalfStorage", "torch.BFloat16Storage"), 2),
    **dict.fromkeys(("torch.IntStorage", "torch.FloatStorage"), 4),
    **dict.fromkeys(("torch.LongStorage", "torch.DoubleStorage"), 8),
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
    "torch.storage.UntypedStorage": 1,
}


class TorchFileError(Exception):
    """A file that ``torch.save`` would not write; the message continues "the file ..."."""


class Placeholder(Enum):
    """Represents an object by its kind, without contents: ``{"a": 1}`` is a MAPPING."""

    LIST = auto()
    MAPPING = auto()
    SET = auto()
    TENSOR = auto()
    OBJECT = auto()  # of a class that the caller may allow


class GlobalName(str):
    """A class or function that the pickle names, as ``module.name``."""


class Storage(NamedTuple):
    """A storage of ``items`` numbers of ``item_bytes`` bytes each."""

    items: int
    item_bytes: int

    @property
    def bytes(self) -> int:
        return self.items * self.item_bytes


@dataclass
class StorageTable:
    """The storages that a file's pickles refer to.

    Attributes:
        parts: length of a storage's persistent id: 5 in an archive, 6 before torch 1.6.
        records: key -> bytes in the archive; None for files before torch 1.6.
        storages: key -> storage, of all references so far.
    """

    parts: int
    records: Mapping[str, int] | None = None
    storages: dict[Any, Storage] = field(default_factory=dict)

    def add(self, reference: Any) -> Storage:
        """The storage that a ``BINPERSID`` opcode refers to. Raises TorchFileError."""
        if (
            type(reference) is not tuple
            or len(reference) != self.parts
            or reference[0] != "storage"
        ):
            raise TorchFileError("has a persistent id that is not of a storage")
        _, storage_type, key, _, count = reference[:5]
        # Check types before hashing: hashing nested tuples can take exponential time.
        typed = (type(storage_type), type(count)) == (GlobalName, int) and type(key) in (str, int)
        # ASCII only: torch may decode other characters differently and read another record.
        valid = typed and storage_type in _ITEM_BYTES and str(key).isascii()
        if not valid or count < 0 or reference[5:] not in ((), (None,)):
            raise TorchFileError("has a storage of unknown type or size")
        storage = Storage(count, _ITEM_BYTES[storage_type])
        if self.records is not None and self.records.get(str(key)) != storage.bytes:
            size = self.records.get(str(key))
            raise TorchFileError(
                f"declares {storage.bytes:,} bytes for the storage {str(key)[:40]!r} but has "
                f"{'no such record' if size is None else f'{size:,}'}"
            )
        if self.storages.setdefault(key, storage) != storage:
            raise TorchFileError(f"declares the storage {str(key)[:40]!r} twice, differently")
        return storage

    @property
    def bytes(self) -> int:
        """Total size of the storages."""
        return sum(storage.bytes for storage in self.storages.values())


def scan_pickle(stream: Any, storages: StorageTable) -> Generator[str, None, Any]:
    """Interpret one pickle on placeholders.

    Args:
        stream: readable by :func:`pickletools.genops`.
        storages: the table to which referenced storages are added.

    Yields:
        Each class or function that the pickle names. At the end, the first opcode that
        ``torch.load(weights_only=True)`` does not support, if there is one.

    Returns:
        The pickle's result: a number, a string, a tuple or a :class:`Placeholder`.

    Raises:
        TorchFileError: the pickle is damaged, or does what ``torch.save`` never does.
    """
    machine: _Machine | None = _Machine(storages)
    unsupported, strings = "", ["", ""]
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise TorchFileError(f"has a pickle of more than {MAX_OPCODES:,} opcodes")
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                argument = GlobalName(".".join(str(argument).split(" ", 1)))
                yield argument
            elif name == "STACK_GLOBAL" or name.startswith("EXT"):
                # torch.save never writes these. The name is on the stack: usually the last two
                # strings, but only executing the pickle would show it.
                yield f"{'.'.join(strings)[:80]} on the pickle's stack"
            elif isinstance(argument, str):
                strings = [strings[1], argument]
            if machine is None:
                continue
            execute = _OPCODES.get(name)
            if execute is None:
                machine, unsupported = None, name
            else:
                execute(machine, argument)
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError, EOFError):
        raise TorchFileError("is damaged or not a torch file") from None
    if machine is None:
        yield f"the pickle opcode {unsupported}"
        return None
    return machine.result


class _Machine:
    """The pickle machine: a stack, the stacks saved by ``MARK``, and a memo."""

    def __init__(self, storages: StorageTable):
        self.storages = storages
        self.stack: list[Any] = []
        self.saved_stacks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.saved_stacks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.saved_stacks.pop()
        return items

    def make_tuple(self, count: int | None) -> None:
        if count is None:
            self.push(tuple(self.pop_mark()))
        else:
            if len(self.stack) < count:
                raise IndexError
            items = tuple(self.stack[-count:])
            self.stack[-count:] = [items]

    def add_to_list(self, several: bool) -> None:
        self.pop_mark() if several else self.stack.pop()
        if self.stack[-1] is not Placeholder.LIST:
            raise TorchFileError("appends to an object that is not a list")

    def set_items(self, several: bool) -> None:
        if several:
            self.pop_mark()
        else:
            del self.stack[-2:]
        if self.stack[-1] is not Placeholder.MAPPING:
            raise TorchFileError("sets items of an object that is not a mapping")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def storage(self, _: Any) -> None:
        self.push(self.storages.add(self.stack.pop()))

    def build(self, _: Any) -> None:
        self.stack.pop()
        if self.stack[-1] not in (Placeholder.MAPPING, Placeholder.OBJECT):
            raise TorchFileError("sets the state of a value that is not an object")

    def make_object(self, _: Any) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not GlobalName or self.stack[-1] in _NOT_CALLED:
            raise TorchFileError("creates an instance of a value that is not a class")
        self.stack[-1] = Placeholder.OBJECT

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        callable_name = type(function) is GlobalName and function not in _NOT_CALLED
        if not callable_name or type(arguments) is not tuple:
            raise TorchFileError("calls a value that is not a function")
        result: Callable[..., Any] = _CALLS.get(function, _object)
        self.stack[-1] = result(*arguments)

    def stop(self, _: Any) -> None:
        self.result = self.stack.pop()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Placeholder:
    """A tensor. Raises TorchFileError unless it lies within its storage."""
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise TorchFileError("has a tensor without a storage or a shape")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise TorchFileError("has a tensor with an invalid shape, stride or offset")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.items:
        raise TorchFileError(
            f"cannot be used: a tensor declares the shape {'x'.join(map(str, size))[:60]}, but its "
            f"storage has {storage.bytes:,} bytes"
        )
    return Placeholder.TENSOR


def _parameter(tensor: Any, *_: Any) -> Placeholder:
    if tensor is not Placeholder.TENSOR:
        raise TorchFileError("has a parameter that is not a tensor")
    return Placeholder.TENSOR


def _object(*_: Any) -> Placeholder:
    return Placeholder.OBJECT


def _size(size: Any = ()) -> tuple[Any, ...]:
    if type(size) is not tuple:
        raise TorchFileError("has a torch.Size that is not made from a tuple")
    return size


# function -> its result; a call of any other function results in an OBJECT.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": lambda *_: Placeholder.MAPPING,
    "collections.defaultdict": lambda *_: Placeholder.MAPPING,
    "builtins.set": lambda *_: Placeholder.SET,
    "__builtin__.set": lambda *_: Placeholder.SET,
}
# Only BINPERSID may create storages: UntypedStorage(10**12) would allocate a terabyte.
_NOT_CALLED = _ITEM_BYTES.keys()
_PUSHED = {
    "EMPTY_LIST": Placeholder.LIST,
    "EMPTY_DICT": Placeholder.MAPPING,
    "EMPTY_SET": Placeholder.SET,
    "EMPTY_TUPLE": (),
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_CONSTANTS = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING".split()


def _push_value(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


# The opcodes that torch.load(weights_only=True) supports.
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "GLOBAL": _Machine.push,
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.make_tuple(None),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.add_to_list(False),
    "APPENDS": lambda machine, _: machine.add_to_list(True),
    "SETITEM": lambda machine, _: machine.set_items(False),
    "SETITEMS": lambda machine, _: machine.set_items(True),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPERSID": _Machine.storage,
    "NEWOBJ": _Machine.make_object,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "STOP": _Machine.stop,
    **dict.fromkeys(_CONSTANTS, _Machine.push),
    **{name: _push_value(value) for name, value in _PUSHED.items()},
}
