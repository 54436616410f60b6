"""Torch files that exploit bugs of ``torch.load(weights_only=True)`` in some versions of torch.

The scan accepts what ``torch.save`` writes and refuses these files, with any version of torch.

CVE-2025-32434: code runs before torch 2.6. CVE-2026-24747: memory is overwritten before torch 2.10.
"""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import struct
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict

import pytest
import torch

from s3prl_ekd.compat import checkpoint_globals
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.hidden_set import sandbox as process
from s3prl_ekd.files import trust
from s3prl_ekd.files.torch_load import restrict_torch, safe_load
from s3prl_ekd.files.torch_scan import TorchFileError, scan

NEWEST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


# Handwritten pickles of protocol 2


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + sequence(*arguments) + b"R"


def storage(count=4, key="0", kind="FloatStorage", extra=b"") -> bytes:
    module, _, name = f"torch.{kind}".rpartition(".")
    kind = f"c{module}\n{name}\n".encode()
    return sequence(text("storage"), kind, text(key), text("cpu"), number(count), extra) + b"Q"


def tensor(data: bytes | None = None, size=(4,), stride=(1,), offset=0) -> bytes:
    shape = (sequence(*map(number, size)), sequence(*map(number, stride)))
    extra = b"\x89" + call("collections.OrderedDict")
    start = (data or storage(), number(offset))
    return call("torch._utils._rebuild_tensor_v2", *start, *shape, extra)


def mapping(*values: bytes) -> bytes:
    items = b"".join(text(f"key{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


# 60 nested tuples, each containing the previous one twice: a traversal never ends.
DOUBLED = b"Nq\x01" + b"h\x01\x86q\x01" * 60
SET_ITEM = text("a") + number(1) + b"s"
PICKLES = {
    "item_of_a_tensor": mapping(tensor() + number(0) + number(1) + b"s"),
    "items_of_a_tensor": mapping(tensor() + b"(" + number(0) + number(1) + b"u"),
    "item_of_a_storage": mapping(storage() + number(9999) + number(1) + b"s"),
    "item_of_a_list": mapping(b"]" + number(0) + number(1) + b"s"),
    "item_of_a_size": mapping(call("torch.Size", sequence(number(1))) + SET_ITEM),
    "item_of_a_set": mapping(call("builtins.set", b"]") + SET_ITEM),
    "item_of_a_class": mapping(b"ctorch\nFloatStorage\n" + SET_ITEM),
    "item_of_a_namespace": mapping(b"cargparse\nNamespace\n)\x81" + SET_ITEM),
    "item_of_a_kept_tensor": mapping(tensor() + b"q\x07", b"h\x07" + SET_ITEM),
    "append_to_a_tensor": mapping(tensor() + number(1) + b"a"),
    "inside_of_a_tensor": mapping(tensor() + sequence(storage(), number(0)) + b"b"),
    "large_storage": mapping(tensor(storage(10**6), size=(10**6,))),
    "small_storage": mapping(tensor(storage(1), size=(1,))),
    "other_type": mapping(tensor(storage(4, kind="DoubleStorage"))),
    "no_record": mapping(tensor(storage(4, key="1"))),
    "not_in_data": mapping(tensor(storage(3, key="../version", kind="ByteStorage"))),
    "two_sizes": mapping(tensor(), tensor(storage(16, kind="ByteStorage"))),
    "negative_storage": mapping(tensor(storage(-4))),
    "storage_of_a_size": mapping(tensor(call("torch.storage.UntypedStorage", number(10**12)))),
    "beyond_the_storage": mapping(tensor(size=(5,))),
    "far_offset": mapping(tensor(offset=2**62)),
    "wide_stride": mapping(tensor(size=(2, 2), stride=(2**40, 1))),
    "negative_stride": mapping(tensor(stride=(-1,))),
    "negative_size": mapping(tensor(size=(-4,))),
    "tensor_of_a_number": mapping(tensor(number(3))),
    "hashed_for_ever": mapping(
        sequence(text("storage"), DOUBLED, text("0"), text("cpu"), number(4)) + b"Q"
    ),
    "shown_for_ever": mapping(
        sequence(text("storage"), b"ctorch\nFloatStorage\n", DOUBLED, text("cpu"), number(4)) + b"Q"
    ),
    "stack_empty": b"\x80\x02ss.",
}


def archive(pickled: bytes, **members: bytes) -> bytes:
    """The bytes of a file as torch.save writes it, with one storage of 16 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", bytes(16))
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def legacy(*pickles: bytes, storages=b"") -> bytes:
    """The bytes of a file as torch wrote it before 1.6."""
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": 1})
    return b"".join([*(pickle.dumps(value, 2) for value in header), *pickles, storages])


def check_refused(path):
    """The reader rejects the file, with any version of torch."""
    with pytest.raises(TorchFileError):
        scan(path, (argparse.Namespace,))
    with pytest.raises(CheckpointError, match=path.name):
        safe_load(path, allow=(argparse.Namespace,))


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(tmp_path, kind):
    path = tmp_path / "bad.pt"
    path.write_bytes(archive(PICKLES[kind]))
    check_refused(path)


def test_many_copies_of_one_list(tmp_path):
    """A thousand sets of one list of a thousand numbers: time and memory are limited."""
    items = b"](" + b"".join(map(number, range(1000))) + b"eq\x07"
    sets = [call("builtins.set", b"h\x07")] * 2000
    path = tmp_path / "bad.pt"
    path.write_bytes(archive(mapping(items, *sets)))
    with pytest.raises(CheckpointError, match="1,000,000"):
        safe_load(path)


def test_storage_key_that_torch_decodes_differently(tmp_path):
    """torch decodes the key as UTF-8, pickletools as Latin-1: it names another record."""
    name = [text("storage"), b"ctorch\nFloatStorage\n", b"U\x02\xc3\xa9", text("cpu"), number(4)]
    path = tmp_path / "bad.pt"
    records = {"data/\u00e9": bytes(4), "data/\u00c3\u00a9": bytes(16)}
    path.write_bytes(archive(mapping(tensor(sequence(*name) + b"Q")), **records))
    check_refused(path)


def test_pickle_of_another_protocol(tmp_path):
    """torch rejects its opcodes, but it is safe for memory: it is loaded if trusted."""
    path = tmp_path / "bad.pt"
    path.write_bytes(archive(pickle.dumps({"a": [1, "x"]}, protocol=4)))
    with pytest.raises(CheckpointError, match="FRAME.*--trust-checkpoint"):
        safe_load(path)
    try:
        trust.read_option([trust.OPTION])
        assert safe_load(path) == {"a": [1, "x"]}
    finally:
        trust.read_option([])


def test_a_text_file_is_not_called_dangerous(tmp_path):
    path = tmp_path / "table.pt"
    path.write_text("path\tsplit\na.flac\ttrain\n")
    with pytest.raises(CheckpointError, match="not a torch file") as raised:
        safe_load(path)
    assert "trust" not in str(raised.value)


def test_valid_handwritten_pickle(tmp_path):
    path = tmp_path / "good.pt"
    path.write_bytes(archive(mapping(tensor(), call("collections.OrderedDict") + SET_ITEM)))
    data = safe_load(path)
    assert data["key0"].shape == (4,) and data["key1"] == {"a": 1}


@pytest.mark.parametrize("kind", ["item_of_a_storage", "item_of_a_tensor", "beyond_the_storage"])
def test_pickles_before_torch_1_6(tmp_path, kind):
    pickled = PICKLES[kind].replace(storage(), storage(extra=b"N"))
    path = tmp_path / "bad.pt"
    assert pickled != PICKLES[kind]
    path.write_bytes(legacy(pickled, pickle.dumps(["0"], 2), storages=bytes(24)))
    check_refused(path)


def test_storages_larger_than_the_file_before_torch_1_6(tmp_path):
    path = tmp_path / "bad.pt"
    large = storage(10**11, extra=b"N")
    path.write_bytes(legacy(mapping(tensor(large)), pickle.dumps(["0"], 2)))
    with pytest.raises(CheckpointError, match="400,000,000,000"):
        safe_load(path)


def tar(name: bytes) -> bytes:
    """A tar archive whose first member is ``name``, with the members that old torch wrote."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for member in (name.decode("latin-1"), "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(member)
            info.size = len(pickle.dumps(0, 2))
            file.addfile(info, io.BytesIO(pickle.dumps(0, 2)))
    return buffer.getvalue()


@pytest.mark.parametrize("name", [b"storages", b"N." * 9])
def test_tar_archive(tmp_path, name):
    path = tmp_path / "bad.pt"
    path.write_bytes(tar(name))
    with pytest.raises(CheckpointError, match="tar archive"):
        safe_load(path)


def test_tar_archive_that_starts_like_a_torch_file(tmp_path):
    """The name of its first member is five valid pickles; old torch would load the archive."""
    path = tmp_path / "bad.pt"
    whole = bytearray(tar(b"storages"))
    name = legacy(b"\x80\x02}.", b"\x80\x02].")
    assert len(name) < 100
    whole[: len(name)] = name
    whole[148:156] = b" " * 8
    whole[148:155] = f"{sum(whole[:512]):06o}\0".encode()
    path.write_bytes(bytes(whole))
    assert tarfile.is_tarfile(path)
    with pytest.raises(CheckpointError, match="tar archive"):
        safe_load(path)
    whole[155] ^= 0xFF  # not part of the checksum
    whole[150] ^= 0x01  # with a wrong checksum it is not a tar archive
    path.write_bytes(bytes(whole))
    assert not tarfile.is_tarfile(path)
    assert safe_load(path) == {}


def test_torchscript(tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(archive(mapping(), **{"constants.pkl": pickle.dumps((), 2)}))
    with pytest.raises(CheckpointError, match="TorchScript"):
        safe_load(path)
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    check_refused(path)


HIDDEN = {  # without a scan, torch would load the number, or hash the tuples for ever
    "exploit": PICKLES["item_of_a_tensor"],
    "number": mapping(number(7)),
    "hang": mapping(b"}" + DOUBLED + b"Ns"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_two_central_directories(tmp_path, kind):
    """Python locates the directory from the end record, torch by its offset: here they differ."""
    path = tmp_path / "bad.pt"
    pickled = HIDDEN[kind]
    bad, good = archive(pickled), archive(mapping().ljust(len(pickled)))
    end = good[-22:-6] + bad[-6:-2] + good[-2:]
    path.write_bytes(bad[:-22] + good[:-22] + end)
    with zipfile.ZipFile(path) as python:
        assert python.read("archive/data.pkl").strip() == mapping()
    check_refused(path)
    path.write_bytes(bad + good)  # one archive behind another
    check_refused(path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "name", ["other/data.pkl", "archive/data.pkl\0x", "archive/DATA.pkl", "ARCHIVE/data.pkl"]
)
def test_members_that_only_python_or_only_torch_finds(tmp_path, name, first):
    path = tmp_path / "bad.pt"
    buffer = io.BytesIO(b"" if first else archive(mapping()))
    with zipfile.ZipFile(buffer, "a") as file:
        member = zipfile.ZipInfo("x")
        member.filename = name
        file.writestr(member, mapping(number(7)))
        if first:
            file.writestr("archive/data.pkl", mapping())
            file.writestr("archive/version", b"3\n")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=path.name):
        safe_load(path)


def test_overlapping_members(tmp_path):
    """A hundred members for the same bytes: a file of 1 MB would load as 100 MB."""
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", mapping())
        file.writestr("archive/data/0", bytes(1 << 20))
        for i in range(1, 100):
            member = copy.copy(file.getinfo("archive/data/0"))
            member.filename = f"archive/data/{i}"
            file.filelist.append(member)
    with pytest.raises(CheckpointError, match="larger than the file"):
        safe_load(path)


LONG = b"(" + b"K\x01" * 100_000 + b"tq\x07"  # a tuple of 100,000 numbers, kept
WORK = {  # small files that would take minutes or a terabyte
    "sizes": LONG + call("torch.Size", b"h\x07") * 2000,
    "sizes_of_parts": LONG + (b"ctorch\nSize\nh\x07R" * 2000),
    "size_of_a_dict": b"}" + call("torch.Size", b"}"),
    "keys": LONG + b"}(" + b"h\x07N" * 2000 + b"u",
    "states": b"ccollections\nOrderedDict\n)R" + sequence(b"N", b"}") + b"b",
    "shape": tensor(size=[2**2000] * 1000, stride=[0] * 1000),
}


@pytest.mark.parametrize("kind", WORK)
def test_work_of_a_small_file_is_limited(tmp_path, kind):
    path = tmp_path / "bad.pt"
    path.write_bytes(archive(mapping(WORK[kind])))
    start = time.process_time()
    check_refused(path)
    assert time.process_time() - start < 10


def test_keys_of_storages_before_torch_1_6(tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(legacy(b"\x80\x02}.", b"\x80\x02](" + DOUBLED + b"e."))
    check_refused(path)


KEYS = {
    "nested_tuples": DOUBLED,
    "equal_hashes": number(2**64 * (2**61 - 1)),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_whose_hash_is_slow(tmp_path, kind):
    path = tmp_path / "bad.pt"
    for pickled in (b"}" + KEYS[kind] + b"Ns", call("builtins.set", b"](" + KEYS[kind] + b"e")):
        path.write_bytes(archive(mapping(pickled)))
        check_refused(path)
    path.write_bytes(archive(mapping(b"}" + sequence(number(1), text("a")) + b"Ns")))
    assert safe_load(path) == {"key0": {(1, "a"): None}}


DTYPES = "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 bool complex64".split()


@pytest.mark.parametrize("new", [True, False], ids=["archive", "before_1.6"])
def test_files_of_torch_save_are_accepted(tmp_path, new):
    """Views, parameters, empty tensors, all dtypes, arguments: the contents of checkpoints."""
    base = torch.arange(24.0)
    weights = OrderedDict(a=base[4:16].view(3, 4).T, b=base[:0], c=base[3])
    weights._metadata = {"": {"version": 1}}
    data = {
        "weights": weights,
        "types": [torch.zeros(3, dtype=getattr(torch, name)) for name in DTYPES],
        "parameter": torch.nn.Parameter(base),
        "plain": (None, True, 1, 2**60, -5, 0.5, "x", torch.Size([2, 3]), torch.device("cpu")),
        "more": {"dtype": torch.float16, "list": [[], {}, ()]},
        "Args": argparse.Namespace(a=1, b=[None]),
        "module": torch.nn.Linear(3, 3).state_dict(),
    }
    path = tmp_path / "good.pt"
    torch.save(data, path, _use_new_zipfile_serialization=new)
    loaded = safe_load(path, allow=checkpoint_globals())
    assert loaded["plain"] == data["plain"] and loaded["Args"] == data["Args"]
    for name, value in weights.items():
        assert torch.equal(loaded["weights"][name], value)
    assert [value.dtype for value in loaded["types"]] == [value.dtype for value in data["types"]]


@pytest.fixture
def torch_load(monkeypatch):
    """``torch.load`` as s3prl calls it, with a given version of torch."""

    def load_of(version):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch, "load", torch.load)
        restrict_torch()
        return torch.load

    yield load_of
    trust.read_option([])


@pytest.mark.parametrize("version", ["2.5.1+cu124", "2.9.0", "2.10.0"])
def test_old_torch_scans_the_files_that_s3prl_loads(tmp_path, torch_load, version):
    """Downloads of s3prl's hub, and pickles in the folders that it gives to transformers."""
    original, load = torch.load, torch_load(version)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(archive(mapping(tensor())))
    assert load(path, weights_only=True)["key0"].shape == (4,)
    path.write_bytes(archive(PICKLES["large_storage"]))
    if version == "2.10.0":
        assert load is original
        return
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*torch>=2.10"):
        load(path, weights_only=True)
    for value in (Counter("ab"), b"x", torch.eye(2).to_sparse()):
        torch.save({"a": value}, path)
        try:
            expected = original(path, weights_only=True).keys()
        except pickle.UnpicklingError:  # a class that an old torch does not know
            continue
        assert load(path, weights_only=True).keys() == expected
    restrict_torch()
    assert torch.load is load  # not wrapped twice
    trust.read_option([trust.OPTION])
    path.write_bytes(b"not scanned")
    with pytest.raises((IndexError, RuntimeError, pickle.UnpicklingError)):
        load(path, weights_only=True)


def test_package_is_scanned_before_its_process_starts(tmp_path, monkeypatch):
    (tmp_path / "expert.py").write_text("raise SystemExit")
    (tmp_path / "model.pt").write_bytes(archive(PICKLES["large_storage"]))
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    monkeypatch.setattr(process, "run_checks", lambda *_: pytest.fail("process started"))
    for check in (process.validate, process.package_cost):
        with pytest.raises(CheckpointError, match="model.pt"):
            check(tmp_path, {})


@pytest.mark.skipif(NEWEST, reason="this torch rejects it")
def test_old_torch_loads_the_rejected_files(tmp_path):
    """The files above are rejected for their exploit, not for another mistake."""
    path, load = tmp_path / "bad.pt", torch.load
    while hasattr(load, "__wrapped__"):  # another test has restricted it
        load = load.__wrapped__
    path.write_bytes(archive(PICKLES["item_of_a_tensor"]))
    assert load(path, weights_only=True)["key0"][0] == 1
    path.write_bytes(archive(PICKLES["large_storage"]))
    loaded = load(path, weights_only=True)["key0"]
    assert loaded.untyped_storage().nbytes() == 4 * 10**6  # the file has 16


def test_other_mapping_classes_need_trust(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"counts": defaultdict(list, a=[1])}, path)
    with pytest.raises(CheckpointError, match="collections.defaultdict"):
        safe_load(path)
    trust.read_option([trust.OPTION])
    try:
        assert safe_load(path)["counts"] == {"a": [1]}
    finally:
        trust.read_option([])
