"""What the pickle of a torch file does, followed on stand-ins: nothing in it is carried out.

``torch.load(weights_only=True)`` of torch before 2.10 sets items of whatever the pickle names and
takes the size of a storage from the pickle (CVE-2026-24747); both write outside the memory of a
tensor. So each instruction is followed here first: a list, mapping, tensor or object is a
:class:`Kind`, a number or text itself, and only what ``torch.save`` writes is let through.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

MAX_INSTRUCTIONS = 500_000  # 5000 tensors take 130,000; about a second to follow
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
    """The file is not as ``torch.save`` writes it; the message continues "the file ..."."""


class Kind(Enum):
    """The stand-in for an object: ``{"a": 1}`` in the pickle is a MAPPING, without contents."""

    LIST = auto()
    MAPPING = auto()
    SET = auto()
    TENSOR = auto()
    OBJECT = auto()  # of a class that the caller may allow


class Name(str):
    """A class or function that the pickle names: ``module.name``."""


class Storage(NamedTuple):
    """A tensor's numbers: ``items`` of ``item_bytes`` bytes each."""

    items: int
    item_bytes: int

    @property
    def bytes(self) -> int:
        return self.items * self.item_bytes


@dataclass
class Storages:
    """The storages that a file's pickles name.

    Attributes:
        parts: of a storage's name: five in an archive, six in the format before torch 1.6.
        records: name -> bytes in the archive; None where sizes are not known beforehand.
        seen: what was named so far.
    """

    parts: int
    records: Mapping[str, int] | None = None
    seen: dict[Any, Storage] = field(default_factory=dict)

    def add(self, name: Any) -> Storage:
        """The storage that a ``BINPERSID`` instruction names. Raises TorchFileError."""
        if type(name) is not tuple or len(name) != self.parts or name[0] != "storage":
            raise TorchFileError("refers to something that is no tensor's storage")
        _, item, key, _, count = name[:5]
        # Types first: a tuple may hold another twice, that one another, and hashing it never ends.
        kinds = (type(item), type(count)) == (Name, int) and type(key) in (str, int)
        # Other letters torch may decode otherwise: into the name of another record.
        known = kinds and item in _ITEM_BYTES and str(key).isascii()
        if not known or count < 0 or name[5:] not in ((), (None,)):
            raise TorchFileError("has a storage of no known type or size")
        storage = Storage(count, _ITEM_BYTES[item])
        if self.records is not None and self.records.get(str(key)) != storage.bytes:
            found = self.records.get(str(key))
            raise TorchFileError(
                f"declares {storage.bytes:,} bytes for the storage {str(key)[:40]!r} and has "
                f"{'no such record' if found is None else f'{found:,}'}"
            )
        if self.seen.setdefault(key, storage) != storage:
            raise TorchFileError(f"declares the storage {str(key)[:40]!r} twice, differently")
        return storage

    @property
    def bytes(self) -> int:
        """Of all that were named."""
        return sum(storage.bytes for storage in self.seen.values())


def follow(stream: Any, storages: Storages) -> Generator[str, None, Any]:
    """Follow one pickle.

    Args:
        stream: what :func:`pickletools.genops` reads.
        storages: takes down the storages that it names.

    Yields:
        Each class or function that the pickle names, and at the end an instruction that
        ``torch.load(weights_only=True)`` refuses, if there is one.

    Returns:
        What the pickle holds, as a stand-in.

    Raises:
        TorchFileError: it is damaged, or does what no file of ``torch.save`` does.
    """
    machine: _Machine | None = _Machine(storages)
    unknown, texts = "", ["", ""]
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_INSTRUCTIONS:
                raise TorchFileError(f"has a pickle of more than {MAX_INSTRUCTIONS:,} instructions")
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                argument = Name(".".join(str(argument).split(" ", 1)))
                yield argument
            elif name == "STACK_GLOBAL" or name.startswith("EXT"):
                # torch.save never writes these. What they name is on the stack: mostly the last
                # two texts, but that is not known before it is run.
                yield f"{'.'.join(texts)[:80]} on the pickle's stack"
            elif isinstance(argument, str):
                texts = [texts[1], argument]
            if machine is None:
                continue
            step = _STEPS.get(name)
            if step is None:
                machine, unknown = None, name
            else:
                step(machine, argument)
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError, EOFError):
        raise TorchFileError("is damaged or no torch file") from None
    if machine is None:
        yield f"the pickle instruction {unknown}"
        return None
    return machine.result


class _Machine:
    def __init__(self, storages: Storages):
        self.storages = storages
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def make_tuple(self, count: int | None) -> None:
        if count is None:
            self.push(tuple(self.since_mark()))
        else:
            if len(self.stack) < count:
                raise IndexError
            items = tuple(self.stack[-count:])
            self.stack[-count:] = [items]

    def add_to_list(self, several: bool) -> None:
        self.since_mark() if several else self.stack.pop()
        if self.stack[-1] is not Kind.LIST:
            raise TorchFileError("appends to what is no list")

    def set_items(self, several: bool) -> None:
        if several:
            self.since_mark()
        else:
            del self.stack[-2:]
        if self.stack[-1] is not Kind.MAPPING:
            raise TorchFileError("sets items of what is no mapping")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def storage(self, _: Any) -> None:
        self.push(self.storages.add(self.stack.pop()))

    def build(self, _: Any) -> None:
        self.stack.pop()
        if self.stack[-1] not in (Kind.MAPPING, Kind.OBJECT):
            raise TorchFileError("changes the inside of what is no object")

    def make_object(self, _: Any) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not Name or self.stack[-1] in _NOT_CALLED:
            raise TorchFileError("makes an object of what is no class")
        self.stack[-1] = Kind.OBJECT

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if type(function) is not Name or function in _NOT_CALLED or type(arguments) is not tuple:
            raise TorchFileError("calls what is no function")
        make: Callable[..., Any] = _CALLS.get(function, _object)
        self.stack[-1] = make(*arguments)

    def stop(self, _: Any) -> None:
        self.result = self.stack.pop()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Kind:
    """A tensor whose numbers all lie in its storage."""
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise TorchFileError("has a tensor without a storage or a shape")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(each) is not int or each < 0 for each in numbers):
        raise TorchFileError("has a tensor whose shape is not made of whole numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.items:
        raise TorchFileError(
            f"cannot be used: a tensor declares the shape {'x'.join(map(str, size))[:60]}, for "
            f"which it has {storage.bytes:,} bytes"
        )
    return Kind.TENSOR


def _parameter(tensor: Any, *more: Any) -> Kind:
    if tensor is not Kind.TENSOR:
        raise TorchFileError("has a parameter that is no tensor")
    return Kind.TENSOR


def _object(*_: Any) -> Kind:
    return Kind.OBJECT


def _size(size: Any = ()) -> tuple[Any, ...]:
    if type(size) is not tuple:
        raise TorchFileError("has a size that is no tuple")
    return size


# What these give; anything else that is called gives an object.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": lambda *_: Kind.MAPPING,
    "collections.defaultdict": lambda *_: Kind.MAPPING,
    "builtins.set": lambda *_: Kind.SET,
    "__builtin__.set": lambda *_: Kind.SET,
}
# Storages are made by BINPERSID alone: torch.storage.UntypedStorage(10**12) would take that room.
_NOT_CALLED = _ITEM_BYTES.keys()
_PUSHED = {
    "EMPTY_LIST": Kind.LIST,
    "EMPTY_DICT": Kind.MAPPING,
    "EMPTY_SET": Kind.SET,
    "EMPTY_TUPLE": (),
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_CONSTANTS = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING".split()


def _pushes(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


# The instructions that torch.load(weights_only=True) knows.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
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
    **{name: _pushes(value) for name, value in _PUSHED.items()},
}
