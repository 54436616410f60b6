"""Student files: what goes in comes out, and nothing in a file is ever run."""

import os
import pickle
from argparse import Namespace

import pytest
import torch

from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.student_file import LoadedStudent, contents, load_student, write_student
from s3prl_ekd.safe_load import safe_load

TARGETS = {"a": TargetSpec(2, (48,)), "b": TargetSpec(3, (48, 48))}


@pytest.fixture
def loaded(student_settings):
    torch.manual_seed(0)
    student = Student(student_settings)
    heads = PredictionHeads(student.width, TARGETS)
    return LoadedStudent(student, heads, TARGETS, {"step": 7})


def test_a_round_trip(loaded, tmp_path):
    write_student(loaded, tmp_path / "new" / "s.pt")
    again = load_student(tmp_path / "new" / "s.pt")
    assert again.student.settings == loaded.student.settings
    assert again.targets == TARGETS and again.about == {"step": 7}
    assert not again.student.training and not again.heads.training
    for ours, theirs in ((loaded.student, again.student), (loaded.heads, again.heads)):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.pt"]


def test_it_is_plain_data(loaded, tmp_path):
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


def test_without_heads(loaded, tmp_path):
    write_student(loaded, tmp_path / "s.pt", keep_heads=False)
    again = load_student(tmp_path / "s.pt")
    assert again.heads is None and again.targets == {}


def test_a_failed_write_leaves_the_older_file(loaded, tmp_path, monkeypatch):
    path = tmp_path / "s.pt"
    path.write_bytes(b"older")

    def full(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
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


def test_code_is_refused_by_name(tmp_path):
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt|os)\.mkdir, which is code"):
        load_student(tmp_path / "evil.pt")


def test_classes_only_where_they_are_allowed(tmp_path):
    from s3prl_ekd.compat import checkpoint_globals

    torch.save({"Args": Namespace(seed=3)}, tmp_path / "n.pt")
    before = set(torch.serialization.get_safe_globals())
    assert safe_load(tmp_path / "n.pt", allow=checkpoint_globals())["Args"].seed == 3
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "is neither a student file"),
        ({"version": 99}, "has format version 99"),
        ({"settings": {"encoder_layers": -1}}, "is damaged: settings: encoder_layers is -1"),
        ({"settings": {"hidden": 1}}, "unknown key 'hidden'"),
        ({"settings": {"extractor_conv_feature_layers": "exit()"}}, "triples"),
        ({"settings": None}, "a mapping of settings is expected"),
        ({"student": {}}, "is damaged: Error"),
        ({"targets": {"a": {"layers": 2, "parts": ["x"]}}}, "a whole number is expected"),
        ({"about": 3}, "is damaged"),
    ],
)
def test_a_damaged_file(loaded, tmp_path, change, said):
    data = {**contents(loaded.student, loaded.heads, TARGETS, {}), **change}
    torch.save(data, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_student(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)


def test_a_truncated_file(loaded, tmp_path):
    write_student(loaded, tmp_path / "s.pt")
    whole = (tmp_path / "s.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "t.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged or no torch file"):
            load_student(tmp_path / "t.pt")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_student(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="it is a folder"):
        load_student(tmp_path)
