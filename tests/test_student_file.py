"""Student files: what goes in comes out, and nothing in a file is ever run."""

import json
import os
import pickle
import re
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from s3prl_ekd import student_file
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import CheckpointError, DataError
from s3prl_ekd.files.safetensors_file import MAX_HEADER, is_safetensors, write_safetensors
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.student_file import LoadedStudent, contents, load_student, write_student

TARGETS = {"a": TargetSpec(2, (48,)), "b": TargetSpec(3, (48, 48))}


@pytest.fixture
def loaded(student_settings):
    torch.manual_seed(0)
    student = Student(student_settings)
    heads = PredictionHeads(student.width, TARGETS)
    return LoadedStudent(student, heads, TARGETS, {"step": 7})


@pytest.fixture(params=["safetensors", "pt"])
def name(request):
    """A name of a student file, whose suffix says what is in it."""
    return f"s.{request.param}"


def test_a_round_trip(loaded, tmp_path, name):
    write_student(loaded, tmp_path / "new" / name)
    again = load_student(tmp_path / "new" / name)
    assert again.student.settings == loaded.student.settings
    assert again.targets == TARGETS and again.about == {"step": 7}
    assert not again.student.training and not again.heads.training
    for ours, theirs in ((loaded.student, again.student), (loaded.heads, again.heads)):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    assert is_safetensors(tmp_path / "new" / name) == name.endswith("safetensors")


def test_the_file_has_plain_data_only(loaded, tmp_path):
    write_student(loaded, tmp_path / "s.pt")
    data = torch.load(tmp_path / "s.pt", weights_only=True)  # no class allowed at all
    kinds = set()

    def visit(value):
        kinds.add(type(value))
        for item in value.values() if isinstance(value, dict) else ():
            visit(item)
        for item in value if isinstance(value, (list, tuple)) else ():
            visit(item)

    visit(data)
    assert kinds <= {dict, list, str, int, float, bool, type(None), torch.Tensor}


def test_without_heads(loaded, tmp_path, name):
    write_student(loaded, tmp_path / name, keep_heads=False)
    again = load_student(tmp_path / name)
    assert again.heads is None and again.targets == {}


def test_a_failed_write_leaves_the_older_file(loaded, tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"older")

    def full(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(student_file, "write_safetensors", lambda file, *_: full(None, file))
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*No space left on device"):
        write_student(loaded, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("protocol", ["torch", "legacy", "pickle"])
def test_code_is_not_run(loaded, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    data = {**contents(loaded.student, None, {}, {}), "about": Evil()}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps({"about": Evil()}))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(CheckpointError):
        load_student(path)
    assert not (tmp_path / "hacked").exists()


def test_the_message_names_the_code_in_the_file(tmp_path):
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt.*(posix|nt|os)\.mkdir"):
        load_student(tmp_path / "evil.pt")


def test_classes_load_only_if_they_are_allowed(tmp_path):
    from s3prl_ekd.compat import checkpoint_globals

    torch.save({"Args": Namespace(seed=3)}, tmp_path / "n.pt")
    before = set(torch.serialization.get_safe_globals())
    assert safe_load(tmp_path / "n.pt", allow=checkpoint_globals())["Args"].seed == 3
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"format": "other"}, "format, version, settings"),
        ({"version": 99}, "99"),
        ({"settings": {"encoder_layers": -1}}, "settings: encoder_layers.* -1"),
        ({"settings": {"hidden": 1}}, "settings: .*'hidden'"),
        ({"settings": {"extractor_conv_feature_layers": "exit()"}}, "settings: .*'exit\\(\\)'"),
        ({"settings": None}, "settings: .*None"),
        ({"student": {}}, "DistillerModel|Student"),
        ({"targets": {"a": {"layers": 2, "parts": ["x"]}}}, r"targets.a.parts\[0\]: .*'x'"),
        ({"about": 3}, "about: .*3"),
    ],
)
def test_a_damaged_file(loaded, tmp_path, change, parts):
    data = {**contents(loaded.student, loaded.heads, TARGETS, {}), **change}
    torch.save(data, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=f"bad.pt.*({parts})") as caught:
        load_student(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)


def test_a_truncated_file(loaded, tmp_path):
    write_student(loaded, tmp_path / "s.pt")
    whole = (tmp_path / "s.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "t.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="t.pt"):
            load_student(tmp_path / "t.pt")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="none.pt"):
        load_student(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_student(tmp_path)


# Safetensors


@pytest.fixture
def parts(loaded, tmp_path):
    """Metadata and tensors of a good file."""
    write_student(loaded, tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"], load(data)


def test_the_header_has_format_and_version(parts):
    metadata, tensors = parts
    assert metadata["format"] == "s3prl_ekd.student" and metadata["version"] == "1"
    data = json.loads(metadata["contents"])
    assert data["about"] == {"step": 7} and data["settings"]["encoder_layers"] == 2
    assert {key.partition(".")[0] for key in tensors} == {"student", "heads"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_the_same_student_is_the_same_bytes(parts, loaded, tmp_path):
    """By which superb knows it again: an export that is typed twice changes nothing."""
    write_student(loaded, tmp_path / "again.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == good
    head = list(json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")]))
    assert head[0] == "__metadata__" and head[1:] == [
        *(f"student.{key}" for key in loaded.student.state_dict()),
        *(f"heads.{key}" for key in loaded.heads.state_dict()),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions(parts, tmp_path, dtype):
    metadata, tensors = parts
    lower = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    save_file(lower, tmp_path / "s.safetensors", metadata)
    again = load_student(tmp_path / "s.safetensors").student.state_dict()
    for key, tensor in again.items():
        assert torch.equal(tensor, tensors[f"student.{key}"].to(dtype).float())


def test_weights_that_share_memory_or_are_views(loaded, tmp_path, name):
    first, second = loaded.student.backbone.encoder.layers[:2]
    first.fc1.weight = second.fc1.weight
    first.fc2.weight = torch.nn.Parameter(torch.randn(48, first.fc2.in_features, 2)[..., 0])
    loaded.student.half()
    write_student(loaded, tmp_path / name)
    again = load_student(tmp_path / name).student.state_dict()
    for key, tensor in loaded.student.state_dict().items():
        assert torch.equal(again[key], tensor.float())


def test_the_format_is_found_by_the_contents(loaded, tmp_path):
    """Not by the suffix, as downloads and links may have another one."""
    write_student(loaded, tmp_path / "s.safetensors")
    os.rename(tmp_path / "s.safetensors", tmp_path / "a.pt")
    assert load_student(tmp_path / "a.pt").about == {"step": 7}
    write_student(loaded, tmp_path / "s.pt")
    os.rename(tmp_path / "s.pt", tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="b.safetensors"):
        load_student(tmp_path / "b.safetensors")


def test_a_truncated_safetensors_file(loaded, tmp_path):
    write_student(loaded, tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    for size in (0, 3, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "t.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="t.safetensors"):
            load_student(tmp_path / "t.safetensors")


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def edited(parts, change=None, **contents):
    """A good file with other tensors or contents."""
    metadata, tensors = dict(parts[0]), dict(parts[1])
    if contents:
        metadata["contents"] = json.dumps(json.loads(metadata["contents"]) | contents)
    if change is not None:
        change(metadata, tensors)
    return save(tensors, metadata)


def changed(name, tensor):
    return lambda metadata, tensors: tensors.update({name: tensor})


def described(text):
    return lambda metadata, tensors: metadata.update(contents=text)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NORM = "student.backbone.encoder.layer_norm.weight"
HOSTILE = {
    "long_header": lambda parts: raw(b" " * (MAX_HEADER + 1)),
    "endless_header": lambda parts: raw({}, length=2**63),
    "nested_header": lambda parts: raw(b'{"a":' * 100_000),
    "no_json": lambda parts: raw(b"{" + b"\xff" * 20),
    "metadata_of_numbers": lambda parts: raw({"__metadata__": {"format": 1}, "a": ENTRY}, bytes(4)),
    "overlap": lambda parts: raw({"a": ENTRY, "b": ENTRY}, bytes(4)),
    "beyond_the_end": lambda parts: raw({"a": {**ENTRY, "data_offsets": [0, 2**40]}}, bytes(4)),
    "large_shape": lambda parts: raw({"a": {**ENTRY, "shape": [2**32, 2**32]}}, bytes(4)),
    "empty_large_shape": lambda parts: raw(
        {"a": {**ENTRY, "shape": [0, 2**63], "data_offsets": [0, 0]}}
    ),
    "no_metadata": lambda parts: save(parts[1]),
    "no_contents": lambda parts: edited(parts, lambda metadata, _: metadata.pop("contents")),
    "nested_contents": lambda parts: edited(parts, described('{"about":' + "[" * 100_000)),
    "no_object": lambda parts: edited(parts, described("[]")),
    "key_twice": lambda parts: edited(parts, described('{"about": {}, "about": {}}')),
    "not_finite": lambda parts: edited(parts, described('{"about": {"x": NaN}}')),
    "no_version": lambda parts: edited(parts, lambda metadata, _: metadata.pop("version")),
    "digits": lambda parts: edited(parts, lambda m, _: m.update(version="9" * 5000)),
    "no_settings": lambda parts: edited(parts, settings=None),
    "conv_code": lambda parts: edited(
        parts, settings={"extractor_conv_feature_layers": "[(4,4,4)] * exit()"}
    ),
    "wide": lambda parts: edited(parts, settings={"encoder_embed_dim": 4 * 10**9}),
    "no_student": lambda parts: edited(parts, lambda _, tensors: tensors.clear()),
    "no_heads": lambda parts: edited(
        parts, lambda _, t: [t.pop(key) for key in list(t) if key.startswith("heads")]
    ),
    "one_more": lambda parts: edited(parts, changed("student.x", torch.zeros(1))),
    "unknown_part": lambda parts: edited(parts, changed("teacher.x\nerror: y", torch.zeros(1))),
    "other_shape": lambda parts: edited(parts, changed(NORM, torch.zeros(7))),
    "whole_numbers": lambda parts: edited(parts, changed(NORM, torch.zeros(48, dtype=torch.int64))),
    "complex": lambda parts: edited(parts, changed(NORM, torch.zeros(48, dtype=torch.complex64))),
    "bytes": lambda parts: edited(parts, changed(NORM, torch.zeros(48, dtype=torch.uint8))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors(parts, tmp_path, kind):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(HOSTILE[kind](parts))
    assert NORM in parts[1]
    with pytest.raises(CheckpointError, match="evil.safetensors") as caught:
        load_student(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_only_floats_are_written_as_safetensors(tmp_path):
    tensors = {"a": torch.linspace(0, 1, 5, dtype=torch.float64)}
    with open(tmp_path / "x.safetensors", "wb") as file:
        write_safetensors(file, tensors, {"format": "x"})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensors["a"])
    with open(tmp_path / "y", "wb") as file, pytest.raises(DataError, match="int64"):
        write_safetensors(file, {"a": torch.arange(3)}, {})
