"""Every reader rejects a file of a newer format with a one-line error."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from s3prl_ekd import __version__
from s3prl_ekd.demo.corpus import RECORD as CORPUS
from s3prl_ekd.demo.corpus import make_corpus
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.settings import HeadSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.downstream import resume as downstream_resume
from s3prl_ekd.downstream import run as downstream_run
from s3prl_ekd.errors import CheckpointError, EkdError
from s3prl_ekd.essence.units import Units, load_units, save_units
from s3prl_ekd.files import run_checkpoints as checkpoints
from s3prl_ekd.files.formats import CHECKPOINT_PARTS
from s3prl_ekd.hidden_states.store import Index, TargetBlock, read_index, write_index
from s3prl_ekd.pretrain import run as pretrain_run
from s3prl_ekd.pretrain import sweep as matrix
from s3prl_ekd.pretrain.checkpoints import CheckpointManager
from s3prl_ekd.student_file import LoadedStudent, contents, load_student, write_student
from s3prl_ekd.superb import results as records
from s3prl_ekd.teachers import load_upstream
from s3prl_ekd.teachers.stored import write_states

from .conftest import STUDENT
from .students import pruned_student


@pytest.fixture
def error_of():
    """A function that calls a reader and returns its error message about the version."""

    def call(read, *arguments, version=99, **options):
        with pytest.raises(EkdError) as error:
            read(*arguments, **options)
        message = str(error.value)
        assert "\n" not in message
        for number in (version, 1):  # the file's version and the supported one
            assert re.search(rf"\bversion\D+{number}\b", message)
        assert __version__ in message and "pip install ." in message
        return message

    return call


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return Student(StudentSettings(**STUDENT))


def test_only_copies_and_layerwise_heads_have_the_second_version(student):
    """Version 0.1 reads the files of all other students."""
    copy = pruned_student()
    specs = {"a": TargetSpec(2, (48,), ((0,), (2,)))}
    layerwise = PredictionHeads(48, specs, HeadSettings(kind="layerwise"))
    split = PredictionHeads(48, specs)
    assert contents(student, None, {}, {})["version"] == 1
    assert contents(student, split, specs, {})["version"] == 1
    assert contents(student, layerwise, specs, {})["version"] == 2
    assert contents(copy, None, {}, {})["version"] == 2
    assert set(contents(student, split, specs, {})["targets"]["a"]) == {"layers", "parts"}


def run(student, step=1, **parts):
    """A checkpoint that is valid for both a pretraining and a downstream run."""
    args = Namespace(upstream="ekd", expdir="x", expname="x", device="cpu", override=None)
    state = {"Args": args, "Config": {}, "Step": step, "Upstream_Config": {}, "Downstream": {}}
    return state | {"EKD": contents(student, None, {}, {"step": 1})} | parts


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_student_files(tmp_path, student, error_of, suffix):
    path = tmp_path / f"s.{suffix}"
    write_student(LoadedStudent(student, None, {}, {}), path)
    if suffix == "pt":
        torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)
    else:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        # a newer format may have different contents, so the version must be checked first
        save_file(tensors, path, metadata | {"version": "99", "contents": "[]"})
    for read in (load_student, lambda path: load_upstream(str(path), "teachers.a.model")):
        assert str(path) in error_of(read, path)


@pytest.mark.parametrize("part", CHECKPOINT_PARTS)
def test_checkpoints_of_runs(tmp_path, student, error_of, monkeypatch, part):
    path = tmp_path / "states-1.ckpt"
    state = run(student)
    torch.save(state | {part: {**state.get(part, {}), "version": 99}}, path)
    (tmp_path / "pretrain" / "ekd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    commands = {
        pretrain_run.prepare: ["-e", str(path)],
        downstream_run.prepare: ["-m", "evaluate", "-e", str(path)],
    }
    for prepare, argv in commands.items():
        message = error_of(prepare, argv)
        assert str(path) in message and part in message
    error_of(downstream_run.prepare, ["-m", "train", "-d", "asr", "-i", str(path)])
    error_of(load_student, path)


def test_a_newer_checkpoint_is_not_skipped_for_an_older_one(tmp_path, student, error_of):
    """A run resumed from step 1 would overwrite the newer checkpoint of step 2."""
    torch.save(run(student), tmp_path / "states-1.ckpt")
    torch.save(run(student, 2, EKD_Run={"version": 2}), tmp_path / "states-2.ckpt")
    error_of(checkpoints.newest_checkpoint, tmp_path, version=2)
    error_of(CheckpointManager(tmp_path, 5, "").prune, 1, version=2)
    assert (tmp_path / "states-2.ckpt").exists()


def test_a_downstream_checkpoint_without_a_version_can_be_read(tmp_path, student):
    state = downstream_resume.EpochPosition(None).state()
    assert state.pop("version") == 1
    torch.save(run(student, EKD_Resume=state), tmp_path / "states-1.ckpt")
    assert checkpoints.read_checkpoint(tmp_path / "states-1.ckpt")["EKD_Resume"]["batches"] == 0


def test_target_caches(tmp_path, error_of):
    write_index(tmp_path, Index("float16", (TargetBlock("a", 1, 2),), 0, {}, ()))
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99, "layout": None}))
    assert str(tmp_path) in error_of(read_index, tmp_path)


def test_stored_states(tmp_path, error_of):
    write_states(tmp_path, torch.zeros(720), torch.zeros(1, 2, 3))
    path = tmp_path / "stored_states.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99, "layers": None}))
    assert str(path) in error_of(load_upstream, str(tmp_path), "here")


def test_units(tmp_path, error_of):
    path = tmp_path / "u.safetensors"
    save_units(Units(torch.zeros(2, 3), "t", 1), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("version") == "1"
    save_file({"centroids": torch.zeros(2, 3)}, path, metadata)
    assert load_units(path).clusters == 2  # files of earlier versions have no version
    save_file({"centroids": torch.zeros(2, 3)}, path, metadata | {"version": "99"})
    assert str(path) in error_of(load_units, path)


@pytest.mark.parametrize("finished", [True, False])
def test_records_of_superb(tmp_path, error_of, finished):
    path = tmp_path / "superb.json"
    path.write_text(json.dumps({"format": 99, "finished": finished, "of": "a later version"}))
    for read in (records.read_record, records.read_finished_run):
        message = error_of(read, tmp_path)
        assert str(path) in message and "remove" not in message


def test_costs_and_sweeps(tmp_path, error_of):
    path = tmp_path / "cost.json"
    cost = records.Cost(1, 0, 2.0, {}, 3, "x")
    path.write_text(json.dumps(asdict(cost)))
    assert records.read_cost(path) == cost
    path.write_text(json.dumps(asdict(cost) | {"format": 99}))
    assert str(path) in error_of(records.read_cost, path)
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"format": 99}))
    assert str(path) in error_of(matrix._read, path)


def test_demo_corpora(tmp_path, error_of):
    """Otherwise the existing corpus would be replaced."""
    (tmp_path / CORPUS).write_text(json.dumps({"parameters": {"version": 99}, "checksum": ""}))
    assert str(tmp_path) in error_of(make_corpus, tmp_path)
    assert (tmp_path / CORPUS).exists()


def test_an_invalid_version(tmp_path, student):
    for version in ("1", None, 0, 1.0, True):
        torch.save(contents(student, None, {}, {}) | {"version": version}, tmp_path / "s.pt")
        with pytest.raises(CheckpointError, match=r"s\.pt") as error:
            load_student(tmp_path / "s.pt")
        assert "pip install" not in str(error.value)  # it is damaged, not newer
