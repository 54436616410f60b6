"""predict.zip, compared with the layout of s3prl's submit.py, which is written here by hand."""

import os
import re
import zipfile

import pytest

from s3prl_ekd.cli import main

from .conftest import error_of
from .superb_runs import write_run

# The predict.zip of `submit.py --pr PR --sid SID --er_fold1 ... --er_fold5 ... --asr_no_lm ASR`:
# each member, and the task, fold and file of the run that is copied.
LAYOUT = {
    "predict/pr_public/predict.ark": ("pr", None, "test-hyp.ark"),
    "predict/sid_public/predict.txt": ("sid", None, "test_predict.txt"),
    "predict/er_fold1_public/predict.txt": ("er", "fold1", "test_fold1_predict.txt"),
    "predict/er_fold2_public/predict.txt": ("er", "fold2", "test_fold2_predict.txt"),
    "predict/er_fold3_public/predict.txt": ("er", "fold3", "test_fold3_predict.txt"),
    "predict/er_fold4_public/predict.txt": ("er", "fold4", "test_fold4_predict.txt"),
    "predict/er_fold5_public/predict.txt": ("er", "fold5", "test_fold5_predict.txt"),
    "predict/asr_public/predict.ark": ("asr", None, "test-clean-noLM-hyp.ark"),
}
FOLDERS = {f"{name.rsplit('/', 1)[0]}/" for name in LAYOUT} | {"predict/"}


def write_all(root, upstream="student", leave_out=(), **options):
    """Write a run for each member, with different predictions. Returns member -> file."""
    files = {}
    for member, (task, fold, file) in LAYOUT.items():
        if member.split("/")[1] not in leave_out:
            tag = f"{upstream}-{task}-{fold}-{options.get('seed')}-{options.get('lr')}"
            folder = write_run(root, upstream, task, {tag: ("é A", "x")}, fold=fold, **options)
            files[member] = folder / file
    return files


def pack(*argv):
    return main(["predict-zip", *map(str, argv)])


def test_the_archive_equals_that_of_submit(tmp_path):
    files = write_all(tmp_path / "superb")
    assert pack(tmp_path / "superb", "-o", tmp_path / "predict.zip") == 0
    with zipfile.ZipFile(tmp_path / "predict.zip") as archive:
        assert set(archive.namelist()) == set(LAYOUT) | FOLDERS
        assert len(archive.namelist()) == len(LAYOUT) + len(FOLDERS)
        for member, path in files.items():
            assert archive.read(member) == path.read_bytes()
        assert archive.testzip() is None


def test_the_same_predictions_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_all(tmp_path / name)
        pack(tmp_path / name, "-o", tmp_path / f"{name}.zip")
    one, two = ((tmp_path / f"{name}.zip").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_best_learning_rate_and_seed_on_dev(tmp_path):
    root = tmp_path / "superb"
    expected = {}
    for lr, seed, error, accuracy in (
        (0.001, 1, 20.0, 60.0),
        (0.001, 2, 19.0, 61.0),  # the best seed of the best learning rate
        (0.01, 1, 10.0, 70.0),
        (0.01, 2, 90.0, 10.0),
    ):
        for member, (task, fold, file) in LAYOUT.items():
            dev = error if task in ("pr", "asr") else accuracy
            pairs = {f"{member}-{lr}-{seed}": ("x", "x")}
            folder = write_run(root, "s", task, pairs, lr=lr, seed=seed, fold=fold, dev=dev)
            if (lr, seed) == (0.001, 2):
                expected[member] = (folder / file).read_bytes()
    pack(root, "-o", tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert {member: archive.read(member) for member in LAYOUT} == expected


def test_all_folds_are_from_one_seed(tmp_path):
    root = tmp_path / "superb"
    files = write_all(root, seed=1, leave_out=["er_fold1_public"], dev=50.0)
    write_run(root, "student", "er", {"one": ("x", "x")}, seed=1, fold="fold1", dev=50.0)
    for i in range(1, 6):  # seed 2 is better on fold 1 and worse on the mean
        dev = 90.0 if i == 1 else 39.0
        write_run(root, "student", "er", {"two": ("x", "x")}, seed=2, fold=f"fold{i}", dev=dev)
    pack(root, "-o", tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("predict/er_fold1_public/predict.txt") == b"one x\n"
        member = "predict/er_fold2_public/predict.txt"
        assert archive.read(member) == files[member].read_bytes()


def test_predictions_of_the_clean_test_set_are_packed(tmp_path):
    write_run(
        tmp_path / "r", "s", "pr", {"hum_snr5": {"a": ("noisy", "x")}, "clean": {"a": ("x", "x")}}
    )
    pack(tmp_path / "r", "-o", tmp_path / "p.zip", "--partial")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("predict/pr_public/predict.ark") == b"a x\n"


def test_missing_members_are_named(tmp_path, capsys):
    root, out = tmp_path / "superb", tmp_path / "p.zip"
    files = write_all(root, leave_out=["sid_public", "er_fold4_public"])
    assert re.search(
        r"student.* sid, er fold4\b.*--partial", error_of(capsys, "predict-zip", root, "-o", out)
    )
    assert not out.exists()
    assert pack(root, "-o", out, "--partial") == 0
    assert "sid, er fold4\n" in capsys.readouterr().out
    with zipfile.ZipFile(out) as archive:
        assert {n for n in archive.namelist() if not n.endswith("/")} == set(files)


def test_one_upstream_is_chosen(tmp_path, capsys):
    root, out = tmp_path / "superb", tmp_path / "p.zip"
    write_all(root)
    other = write_all(root, "other")
    assert "--upstream: other, student" in error_of(capsys, "predict-zip", root, "-o", out)
    error = error_of(capsys, "predict-zip", root, "-o", out, "--upstream", "othr")
    assert re.search(r"\bothr\b.*\bother\?.*other, student", error)
    pack(root, "-o", out, "--upstream", "other")
    with zipfile.ZipFile(out) as archive:
        assert all(archive.read(member) == path.read_bytes() for member, path in other.items())


def test_errors(tmp_path, capsys):
    root, out = tmp_path / "superb", tmp_path / "p.zip"
    files = write_all(root)
    out.write_text("not an archive")
    assert re.search(rf"{out}.*--force", error_of(capsys, "predict-zip", root, "-o", out))
    assert out.read_text() == "not an archive"
    pack(root, "-o", out, "--force")
    assert zipfile.is_zipfile(out)
    files["predict/sid_public/predict.txt"].write_text("")
    assert "test_predict.txt" in error_of(capsys, "predict-zip", root, "-o", tmp_path / "q.zip")
    files["predict/sid_public/predict.txt"].unlink()
    error = error_of(capsys, "predict-zip", root, "-o", tmp_path / "q.zip")
    assert re.search(r"test_predict\.txt.*No such file", error)
    assert not (tmp_path / "q.zip").exists()
    write_run(tmp_path / "cut", "s", "pr", {"a": ("x", "x")}, finished=False)
    assert str(tmp_path / "cut") in error_of(
        capsys, "predict-zip", tmp_path / "cut", "-o", tmp_path / "q.zip"
    )
    error = error_of(capsys, "predict-zip", root / "student" / "pr", "-o", tmp_path / "q.zip")
    assert re.search(r"student.* sid, er fold1, .*, asr\b", error)


def test_symlinks_out_of_a_run_are_not_packed(tmp_path, capsys):
    """Neither a file nor a folder that is one. Symlinks within the run's folder are followed."""
    root, out, secret = tmp_path / "superb", tmp_path / "p.zip", tmp_path / "secret"
    path = write_all(root)["predict/sid_public/predict.txt"]
    secret.mkdir()
    (secret / path.name).write_text("a token\n")
    path.rename(path.with_name("kept.txt"))
    path.symlink_to(secret / path.name)
    error = error_of(capsys, "predict-zip", root, "-o", out)
    assert str(path) in error and str(secret / path.name) in error
    path.unlink()
    path.with_name("second").symlink_to(path.with_name("first"))
    path.with_name("first").symlink_to(secret, target_is_directory=True)
    record = path.with_name("superb.json")
    record.write_text(record.read_text().replace('"clean": "."', '"clean": "second"'))
    error = error_of(capsys, "predict-zip", root, "-o", out)
    assert str(path.with_name("second")) in error and str(secret) in error
    assert not out.exists()
    record.write_text(record.read_text().replace('"clean": "second"', '"clean": "."'))
    path.symlink_to("kept.txt")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)  # DIR itself may be a symlink
    assert pack(tmp_path / "link", "-o", out) == 0
    with zipfile.ZipFile(out) as archive:
        expected = path.with_name("kept.txt").read_bytes()
        assert archive.read("predict/sid_public/predict.txt") == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_not_read(tmp_path, capsys):
    path = write_all(tmp_path / "superb")["predict/sid_public/predict.txt"]
    path.unlink()
    os.mkfifo(path)
    assert path.name in error_of(
        capsys, "predict-zip", tmp_path / "superb", "-o", tmp_path / "p.zip"
    )
