"""predict.zip: the layout of s3prl's submit.py, written here by hand."""

import os
import zipfile

import pytest

from s3prl_ekd.cli import main

from .superb_runs import write_run

# What `submit.py --pr PR --sid SID --er_fold1 ... --er_fold5 ... --asr_no_lm ASR` leaves: each
# member of its predict.zip, and the file of the run that it copies.
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
    """A run for each member, each with predictions of its own; member -> file."""
    files = {}
    for member, (task, fold, file) in LAYOUT.items():
        if member.split("/")[1] not in leave_out:
            tag = f"{upstream}-{task}-{fold}-{options.get('seed')}-{options.get('lr')}"
            folder = write_run(root, upstream, task, {tag: ("é A", "x")}, fold=fold, **options)
            files[member] = folder / file
    return files


def pack(*words):
    return main(["predictions", *map(str, words)])


def fails(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        pack(*words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    return error


def test_every_member_is_what_submit_makes(tmp_path):
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
    wanted = {}
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
                wanted[member] = (folder / file).read_bytes()
    pack(root, "-o", tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert {member: archive.read(member) for member in LAYOUT} == wanted


def test_folds_come_from_one_seed(tmp_path):
    root = tmp_path / "superb"
    files = write_all(root, seed=1, leave_out=["er_fold1_public"], dev=50.0)
    write_run(root, "student", "er", {"one": ("x", "x")}, seed=1, fold="fold1", dev=50.0)
    for i in range(1, 6):  # seed 2 is far better on fold 1 and a little worse on the mean
        dev = 90.0 if i == 1 else 39.0
        write_run(root, "student", "er", {"two": ("x", "x")}, seed=2, fold=f"fold{i}", dev=dev)
    pack(root, "-o", tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("predict/er_fold1_public/predict.txt") == b"one x\n"
        member = "predict/er_fold2_public/predict.txt"
        assert archive.read(member) == files[member].read_bytes()


def test_the_clean_test_set_and_never_a_noisy_one(tmp_path):
    write_run(
        tmp_path / "r", "s", "pr", {"hum_snr5": {"a": ("noisy", "x")}, "clean": {"a": ("x", "x")}}
    )
    pack(tmp_path / "r", "-o", tmp_path / "p.zip", "--partial")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("predict/pr_public/predict.ark") == b"a x\n"


def test_what_is_missing_is_named(tmp_path, capsys):
    root, out = tmp_path / "superb", tmp_path / "p.zip"
    files = write_all(root, leave_out=["sid_public", "er_fold4_public"])
    said = fails(capsys, root, "-o", out)
    assert "student lacks sid, er fold4;" in said and "--partial" in said
    assert not out.exists()
    assert pack(root, "-o", out, "--partial") == 0
    assert "not in it, and so not scored: sid, er fold4" in capsys.readouterr().out
    with zipfile.ZipFile(out) as archive:
        assert {n for n in archive.namelist() if not n.endswith("/")} == set(files)


def test_one_upstream_is_chosen(tmp_path, capsys):
    root, out = tmp_path / "superb", tmp_path / "p.zip"
    write_all(root)
    other = write_all(root, "other")
    assert "add --upstream: other, student" in fails(capsys, root, "-o", out)
    assert "no upstream othr here (did you mean other?)" in fails(
        capsys, root, "-o", out, "--upstream", "othr"
    )
    pack(root, "-o", out, "--upstream", "other")
    with zipfile.ZipFile(out) as archive:
        assert all(archive.read(member) == path.read_bytes() for member, path in other.items())


def test_mistakes(tmp_path, capsys):
    root, out = tmp_path / "superb", tmp_path / "p.zip"
    files = write_all(root)
    out.write_text("mine")
    assert "exists; add --force" in fails(capsys, root, "-o", out)
    assert out.read_text() == "mine"
    pack(root, "-o", out, "--force")
    assert zipfile.is_zipfile(out)
    files["predict/sid_public/predict.txt"].write_text("")
    assert "test_predict.txt is empty" in fails(capsys, root, "-o", tmp_path / "q.zip")
    files["predict/sid_public/predict.txt"].unlink()
    assert "cannot read the predictions" in fails(capsys, root, "-o", tmp_path / "q.zip")
    assert not (tmp_path / "q.zip").exists()
    write_run(tmp_path / "cut", "s", "pr", {"a": ("x", "x")}, finished=False)
    assert "no run is finished there" in fails(capsys, tmp_path / "cut", "-o", tmp_path / "q.zip")
    assert "lacks sid" in fails(capsys, root / "student" / "pr", "-o", tmp_path / "q.zip")


def test_links_out_of_a_run_are_not_packed(tmp_path, capsys):
    """Whether the file, or the folder that it lies in, leads there; links within are followed."""
    root, out, secret = tmp_path / "superb", tmp_path / "p.zip", tmp_path / "secret"
    path = write_all(root)["predict/sid_public/predict.txt"]
    secret.mkdir()
    (secret / path.name).write_text("a token\n")
    path.rename(path.with_name("kept.txt"))
    path.symlink_to(secret / path.name)
    said = fails(capsys, root, "-o", out)
    assert str(path) in said and str(secret / path.name) in said
    path.unlink()
    path.with_name("second").symlink_to(path.with_name("first"))
    path.with_name("first").symlink_to(secret, target_is_directory=True)
    record = path.with_name("superb.json")
    record.write_text(record.read_text().replace('"clean": "."', '"clean": "second"'))
    said = fails(capsys, root, "-o", out)
    assert str(path.with_name("second")) in said and str(secret) in said
    assert not out.exists()
    record.write_text(record.read_text().replace('"clean": "second"', '"clean": "."'))
    path.symlink_to("kept.txt")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)  # the user's own, as typed
    assert pack(tmp_path / "link", "-o", out) == 0
    with zipfile.ZipFile(out) as archive:
        kept = path.with_name("kept.txt").read_bytes()
        assert archive.read("predict/sid_public/predict.txt") == kept


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path, capsys):
    path = write_all(tmp_path / "superb")["predict/sid_public/predict.txt"]
    path.unlink()
    os.mkfifo(path)
    assert path.name in fails(capsys, tmp_path / "superb", "-o", tmp_path / "p.zip")
