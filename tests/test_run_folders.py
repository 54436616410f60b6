"""The command decides which folder a run writes to, never a file."""

import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import s3prl_ekd
from s3prl_ekd import launch
from s3prl_ekd.downstream.run import check_same_config, prepare
from s3prl_ekd.errors import CheckpointError, EkdError, SetupError
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.request import DownstreamRequest
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.superb import run as superb
from s3prl_ekd.superb.results import read_record, read_results
from s3prl_ekd.system.jobs import Jobs
from s3prl_ekd.system.lock import LOCK_FILE, FolderLock

from .conftest import command
from .corpora import write_noise
from .kill_and_resume import flat_values, unequal
from .students import random_student
from .superb_runs import write_run
from .superb_workspace import short_runs


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, without locks."""
    paths = (
        path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(LOCK_FILE)
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


# Pretraining


@pytest.fixture
def pretrain(copied_pretraining, pretrain_script):
    return functools.partial(pretrain_script, "-u", "ekd", "--device", "cpu")


LONGER = ("-o", "config.runner.total_steps=9")


def test_resuming_a_copied_run_writes_to_the_copy(pretrain, caplog):
    caplog.set_level(logging.INFO)
    original, copied = Path("result/pretrain/x"), Path("copy")
    before = contents(original)
    shutil.copytree(original, copied)
    code, _ = pretrain("-e", "copy/states-3.ckpt", *LONGER)
    assert code == 0 and re.search(rf"{original}\b.*\bcopy\b", caplog.text)
    assert contents(original) == before
    states = read_checkpoint(newest_checkpoint(copied))
    assert states["Step"] == 9 and states["Args"].expdir == "copy"


def test_p_names_the_folder_of_a_resumed_run(pretrain):
    original = Path("result/pretrain/x")
    before = contents(original)
    code, _ = pretrain("-e", str(original / "states-3.ckpt"), "-p", "elsewhere", *LONGER)
    assert code == 0 and read_checkpoint(newest_checkpoint("elsewhere"))["Step"] == 9
    assert contents(original) == before
    elsewhere = contents(Path("elsewhere"))
    code, output = pretrain("-e", str(original / "states-6.ckpt"), "-p", "elsewhere", *LONGER)
    assert code == 2 and re.search(r"(?m)^error: .*\belsewhere\b", output)
    assert contents(Path("elsewhere")) == elsewhere


def test_the_folder_in_a_checkpoint_is_not_made(pretrain):
    Path("work").mkdir()
    states = read_checkpoint("result/pretrain/x/states-6.ckpt")
    states["Args"].expdir, states["Args"].expname = os.path.abspath("foreign/folder"), "folder"
    torch.save(states, "work/states-6.ckpt")
    code, _ = pretrain("-e", "work/states-6.ckpt", *LONGER)
    assert code == 0 and not Path("foreign").exists()
    assert read_checkpoint(newest_checkpoint("work"))["Step"] == 9


# Downstream


NEW = (
    *("-m", "train", "-u", "fbank_no_cmvn", "-d", "voxceleb1"),
    *("-c", "downstream/voxceleb1/tiny.yaml"),
)
STEPS = ",,".join(
    f"config.runner.{key}={value}"
    for key, value in {"total_steps": 8, "log_step": 4, "eval_step": 4, "save_step": 4}.items()
)


def link_data(workspace: Path, folder: Path) -> None:
    for name in ("data", "audio", "downstream"):
        os.symlink(workspace / name, folder / name)


@pytest.fixture(scope="module")
def finished_downstream(superb_workspace, tmp_path_factory):
    """A folder with a run of SID in ``result/downstream/x``."""
    folder = tmp_path_factory.mktemp("downstream")
    link_data(superb_workspace, folder)
    command("run_downstream.py", *NEW, "--device", "cpu", "-n", "x", "-o", STEPS, cwd=folder)
    return folder


@pytest.fixture
def workspace(superb_workspace, finished_downstream, tmp_path, monkeypatch):
    link_data(superb_workspace, tmp_path)
    shutil.copytree(finished_downstream / "result", tmp_path / "result")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def downstream(workspace, monkeypatch):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["run_downstream.py", *argv, "--device", "cpu"])
        return launch.run_downstream()

    return run


EVALUATE = ("-m", "evaluate", "-t", "test")


def test_predictions_go_to_the_folder_of_the_checkpoint(downstream, workspace, caplog):
    caplog.set_level(logging.INFO)
    before = contents(workspace / "result")
    (workspace / "copy").mkdir()
    shutil.copy("result/downstream/x/states-8.ckpt", "copy/epoch=3.ckpt")
    assert downstream(*EVALUATE, "-e", "copy/epoch=3.ckpt") == 0
    assert (workspace / "copy/test_predict.txt").stat().st_size
    assert contents(workspace / "result") == before
    assert re.search(r"result/downstream/x\b.*\bcopy\b", caplog.text)


def test_results_of_superb_are_not_overwritten_by_hand(downstream, workspace, capsys):
    """`report` and `predict-zip` read the predictions in the folder of a run of superb."""
    run, best = "result/downstream/x", "result/downstream/x/states-8.ckpt"
    write_noise(workspace / "rain/0.wav", 20000)
    Path(run, "superb.json").write_text('{"seconds": 1.0}')  # trained
    before = contents(Path(run))
    longer = ("-m", "train", "-o", "config.runner.total_steps=12")
    for argv in (
        (*EVALUATE, "-e", best),
        (*EVALUATE, "-e", run),
        (*EVALUATE, "-e", best, "--noise", "rain", "--snr", "0"),
        (*EVALUATE, "-e", best, "-p", f"{run}/noisy/rain_snr0"),
        (*EVALUATE, "-e", best, "-o", f"args.expdir='{run}/states-8'"),
        (*longer, "-e", best),
        (*longer, "-p", run, "-a"),
    ):
        with pytest.raises(SystemExit):
            downstream(*argv)
        error = capsys.readouterr().err
        assert re.search(rf"^error: {workspace / run} .*superb.* -p FOLDER$", error, re.M), error
    assert contents(Path(run)) == before
    assert downstream(*EVALUATE, "-e", best, "-p", "elsewhere") == 0
    assert Path("elsewhere/test_predict.txt").stat().st_size and contents(Path(run)) == before
    Path(run, "superb.json").write_text('{"seconds": 0.0}')  # in training
    assert downstream("-m", "train", "-e", best) == 0


def test_folders_in_a_checkpoint_are_ignored(downstream, workspace):
    states = read_checkpoint("result/downstream/x/states-8.ckpt")
    for name in ("expdir", "cache_dir"):
        setattr(states["Args"], name, str(workspace / "foreign" / name))
    (workspace / "copy").mkdir()
    torch.save(states, "copy/states-8.ckpt")
    hub = torch.hub.get_dir()
    assert downstream(*EVALUATE, "-e", "copy/states-8.ckpt") == 0
    assert not (workspace / "foreign").exists() and torch.hub.get_dir() == hub
    assert downstream(*EVALUATE, "-e", "copy/states-8.ckpt", "-p", "named") == 0
    assert (workspace / "named/test_predict.txt").is_file()


@pytest.mark.parametrize("change", ["fold", "variant"])
def test_a_fold_must_be_a_name(downstream, workspace, change, capfd):
    """s3prl uses it in file names."""
    states = read_checkpoint("result/downstream/x/states-8.ckpt")
    states["Args"].downstream = "emotion"
    if change == "fold":
        states["Config"]["downstream_expert"]["datarc"]["test_fold"] = "/../../x"
    else:
        states["Args"].downstream_variant = "/../../x"
    torch.save(states, "evil.ckpt")
    with pytest.raises(SystemExit) as raised:
        downstream(*EVALUATE, "-e", "evil.ckpt")
    assert raised.value.code == 2 and "/../../x" in capfd.readouterr().err


def test_resuming_a_moved_training(downstream, workspace):
    Path("result/downstream/x").rename("moved")
    longer = "config.runner.total_steps=12"
    assert downstream("-m", "train", "-e", "moved/states-8.ckpt", "-o", longer) == 0
    assert (
        read_checkpoint("moved/states-12.ckpt")["Step"] == 12
        and not Path("result/downstream/x").exists()
    )


def test_a_checkpoint_that_is_a_symlink(downstream, workspace):
    """As made by DVC, git-annex or for scratch disks; the folder of the link counts."""
    Path("linked").mkdir()
    os.symlink(workspace / "result/downstream/x/states-8.ckpt", "linked/states-8.ckpt")
    longer = "config.runner.total_steps=12"
    assert downstream("-m", "train", "-e", "linked/states-8.ckpt", "-o", longer) == 0
    assert read_checkpoint("linked/states-12.ckpt")["Step"] == 12


def test_the_config_in_the_folder_gives_an_equal_run(downstream, workspace):
    """s3prl writes it, with ``-o`` applied."""
    (path,) = Path("result/downstream/x").glob("config_*.yaml")
    again = ("-m", "train", "-u", "fbank_no_cmvn", "-d", "voxceleb1", "-n", "y", "-c", str(path))
    assert downstream(*again) == 0
    states = [read_checkpoint(f"result/downstream/{name}/states-8.ckpt") for name in "xy"]
    assert states[0]["Config"] == states[1]["Config"]
    weights, others = (dict(flat_values(state["Downstream"])) for state in states)
    assert len(weights) > 2 and not unequal(weights, others)


def test_auto_resume_uses_the_overridden_folder(downstream, workspace, capfd):
    more = f"args.expdir='result/downstream/x',,{STEPS}"
    with pytest.raises(SystemExit) as raised:
        downstream(*NEW, "-n", "other", "-o", more)
    assert raised.value.code == 2
    assert re.search(r"result/downstream/x\b.*\s-a\b", capfd.readouterr().err)
    before = contents(workspace / "result/downstream/x")
    assert downstream(*NEW, "-n", "other", "-a", "-o", more) == 0
    assert not Path("result/downstream/other").exists()
    after = contents(workspace / "result/downstream/x")  # a finished run: no training
    assert after["states-8.ckpt"] == before["states-8.ckpt"] and not Path("other").exists()


CHECKPOINT = "result/downstream/x/states-8.ckpt"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("-u", "fbank"), ("-u fbank", "fbank_no_cmvn")),
        (("-d", "emotion"), ("-d emotion", "voxceleb1")),
        (("-v", "fold2"), ("-v fold2", "no -v")),
        (("-k", "student.pt"), ("-k student.pt", "no -k")),
        (("-g", "other.yaml"), ("-g other.yaml", "no -g")),
        (("-s", "last"), ("-s last", "-s hidden_states")),
        (("-l", "-1"), ("-l -1", "no -l")),
        (("-f",), ("-f", "no -f")),
        (("--upstream_feature_normalize",), ("no --upstream_feature_normalize",)),
        (("--upstream_ck=student.pt",), ("--upstream_ck:", "in full")),
        (("-c", "other.yaml"), ("-c other.yaml", "optimizer.lr", "1e-05")),
        (("-c", "downstream/voxceleb1/tiny.yaml"), ("runner.total_steps 8 ->",)),  # without -o
    ],
)
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_options_that_differ_from_the_checkpoint(
    downstream, workspace, capfd, mode, options, parts
):
    """s3prl ignores them: the results would be those of the checkpoint's upstream and recipe."""
    resume = ("-m", "train", "-n", "x", "-a")
    if mode == "evaluate":
        resume = (*EVALUATE, "-e", CHECKPOINT)
    recipe = yaml.safe_load(Path("downstream/voxceleb1/tiny.yaml").read_text())
    recipe["optimizer"]["lr"] = 1e-5
    Path("other.yaml").write_text(yaml.safe_dump(recipe))
    Path("student.pt").touch()
    before = contents(workspace / "result")
    with pytest.raises(SystemExit) as raised:
        downstream(*resume, *options)
    error = capfd.readouterr().err.splitlines()[-1]
    assert raised.value.code == 2 and CHECKPOINT in error
    assert all(part in error for part in parts), error
    assert contents(workspace / "result") == before


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_misspelled_override_of_a_checkpoint(downstream, workspace, capfd, mode):
    resume = ("-m", "train", "-n", "x", "-a")
    if mode == "evaluate":
        resume = (*EVALUATE, "-e", CHECKPOINT)
    with pytest.raises(SystemExit) as raised:
        downstream(*resume, "-o", "config.runner.totl_steps=12")
    assert raised.value.code == 2 and "did you mean total_steps" in capfd.readouterr().err


def test_resuming_with_another_number_of_processes(downstream, workspace, capfd):
    states = read_checkpoint(CHECKPOINT)
    states["WorldSize"] = 4  # by torchrun
    torch.save(states, "many.ckpt")
    with pytest.raises(SystemExit) as raised:
        downstream("-m", "train", "-e", "many.ckpt")
    error = capfd.readouterr().err.splitlines()[-1]
    assert raised.value.code == 2 and "torchrun --nproc_per_node 4" in error
    assert downstream(*EVALUATE, "-e", "many.ckpt") == 0


def test_a_layer_of_an_upstream_without_layers(downstream, workspace, capfd):
    """s3prl ignores the layer."""
    with pytest.raises(SystemExit) as raised:
        downstream(*NEW, "-n", "layers", "-l", "7", "-o", STEPS)
    assert raised.value.code == 2 and "-l 7: " in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("in_file", "same"), [({"frame_shift": None}, True), ({}, True),
                                               ({"frame_shift": 160}, False)])  # fmt: skip
def test_the_frame_shift_that_s3prl_sets(tmp_path, in_file, same):
    """Its recipe of SD writes it into the config."""

    def config(datarc):
        return {"downstream_expert": {"datarc": {"batch_size": 8, **datarc}}}

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(in_file)))
    request = DownstreamRequest(config=str(path), past_exp="states-1.ckpt")
    with nullcontext() if same else pytest.raises(CheckpointError, match="frame_shift 320 -> 160"):
        check_same_config(request, {"Config": config({"frame_shift": 320})})


def test_the_command_of_a_run_again_and_longer(downstream, workspace):
    longer = f"{STEPS},,config.runner.total_steps=12"
    again = (*NEW, "-s", "hidden_states", "-n", "x", "-a")
    assert downstream(*again, "-o", longer) == 0
    assert read_checkpoint("result/downstream/x/states-12.ckpt")["Step"] == 12
    assert downstream(*again, "-o", longer) == 0
    # a value of -o is used, so the option that it replaces is not compared
    prepare([*again, "-u", "fbank", "-o", f"{longer},,args.upstream='fbank'", "--device", "cpu"])


@pytest.fixture
def student_run(downstream, student_file):
    """A run on ``student.pt`` in ``result/downstream/y``, and its arguments."""
    shutil.copy(student_file, "student.pt")
    argv = ("-m", "train", "-u", "ekd_student", "-k", "student.pt", *NEW[4:], "-n", "y", "-o")
    assert downstream(*argv, STEPS) == 0
    return argv


def test_another_student_at_the_same_path(downstream, student_run, capfd, caplog):
    """A head and the hidden states of another student would give a wrong score."""
    checkpoint = "result/downstream/y/states-8.ckpt"
    evaluate = (*EVALUATE, "-e", checkpoint)
    assert downstream(*evaluate) == 0
    longer = f"{STEPS},,config.runner.total_steps=12"
    again = (*student_run, longer, "-a")
    os.rename("student.pt", "moved.pt")
    other = random_student(s3prl_ekd.load_student("moved.pt").student.settings, seed=9)
    write_student(LoadedStudent(other, None, {}, {}), Path("student.pt"))
    for argv in (evaluate, again):
        with pytest.raises(SystemExit) as raised:
            downstream(*argv)
        assert raised.value.code == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert f"{checkpoint}: the upstream -k student.pt has changed" in error
    assert not Path("result/downstream/y/states-12.ckpt").exists()
    moved = "args.upstream_ckpt='moved.pt'"
    assert downstream(*evaluate, "-o", moved) == 0 and "another upstream" not in caplog.text
    assert downstream(*evaluate, "-o", "args.upstream_ckpt='student.pt'") == 0
    assert "another upstream than student.pt" in caplog.text
    assert downstream(*student_run, f"{longer},,{moved}", "-a") == 0
    states = read_checkpoint("result/downstream/y/states-12.ckpt")
    assert states["EKD_Upstream"]["sha256"] == contents(Path())["moved.pt"]
    assert states["Args"].upstream_ckpt == "moved.pt"
    states["Args"].upstream_ckpt = "student.pt"
    states.pop("EKD_Upstream")  # of an earlier version
    torch.save(states, "old.ckpt")
    assert downstream(*EVALUATE, "-e", "old.ckpt") == 0


def test_i_with_e():
    with pytest.raises(SetupError, match="-i .*-e"):
        prepare([*EVALUATE, "-i", "a.ckpt", "-e", "b.ckpt"])


def test_two_trainings_in_one_folder(downstream, workspace, lock_holder, capfd):
    folder = workspace / "result/downstream/x"
    process, before = lock_holder(folder), contents(folder)
    with pytest.raises(SystemExit) as raised:
        downstream("-m", "train", "-e", str(folder / "states-8.ckpt"))
    assert raised.value.code == 2 and f"process {process.pid}" in capfd.readouterr().err
    assert contents(folder) == before
    # Testing in the same folder is allowed.
    assert downstream(*EVALUATE, "-e", str(folder / "states-8.ckpt")) == 0
    process = lock_holder(folder, f".test{LOCK_FILE}")
    with pytest.raises(SystemExit):
        downstream(*EVALUATE, "-e", str(folder / "states-8.ckpt"))
    assert f"process {process.pid}" in capfd.readouterr().err


# superb


def test_a_renamed_upstream_is_reported_under_its_new_name(workspace, monkeypatch):
    """The folder of upstream X is renamed to Y, X is run again, and then Y is tested with noise."""
    rain = workspace / "rain"
    rain.mkdir()
    shutil.copy("audio/ann0.wav", rain)

    def run(self, argv, log, environment, stdin):  # in this process, which is faster
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        assert launch.SCRIPTS[argv[0]]() == 0

    monkeypatch.setattr(Jobs, "run", run)
    out = workspace / "out/w/out"
    (first,) = short_runs(workspace, "out/w")
    first = replaced(first, "X")
    superb.run_plan([first])
    (out / "X").rename(out / "Y")
    superb.run_plan([first])  # again X
    before = contents(out / "X")
    (noisy,) = short_runs(workspace, "out/w", noise=[str(rain)], snr=[0.0])
    second = replaced(noisy, "Y")
    superb.run_plan([second])
    assert contents(out / "X") == before
    assert (second.folder / "noisy/rain_snr0/test_predict.txt").is_file()
    results = read_results([out])
    assert {(run.upstream, tuple(run.tested)) for run in results.runs} == {
        ("X", ("clean",)),
        ("Y", ("clean", "rain_snr0")),
    }


def replaced(run, name):
    import dataclasses

    return dataclasses.replace(run, upstream=dataclasses.replace(run.upstream, name=name))


@pytest.mark.parametrize(
    "entry", [{"dev": {"metric": "acc", "value": 1.0, "checkpoint": "../y/a.ckpt"}},
              {"tested": {"clean": "../y"}}, {"tested": {"clean": "/tmp"}}],
    ids=["checkpoint", "predictions", "absolute"],
)  # fmt: skip
def test_a_path_in_a_record_must_be_in_the_run_folder(tmp_path, entry):
    folder = write_run(tmp_path, "x", "sid", {"a": ("1", "1")})
    record = json.loads((folder / "superb.json").read_text())
    (folder / "superb.json").write_text(json.dumps(record | entry))
    with pytest.raises(EkdError, match="superb.json"):
        read_record(folder)


# Killed processes


def test_trainings_end_if_the_superb_command_is_killed(workspace):
    """So that the same command can take the lock again and resume."""
    argv = ["superb", "fbank_no_cmvn", "--tasks", "sid", "--recipes", "tiny", "-o", "out"]
    argv += ["--steps", "sid=4000"]
    parent = subprocess.Popen([sys.executable, "-m", "s3prl_ekd", *argv], stderr=subprocess.DEVNULL)
    lock = workspace / "out/fbank_no_cmvn/sid/lr0.003-seed1337" / LOCK_FILE
    child = None
    deadline = time.monotonic() + 120
    while child is None:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
        if lock.exists() and lock.read_text():
            child = json.loads(lock.read_text())["pid"]
    assert child != parent.pid
    with pytest.raises(SetupError, match=f"process {child} "):
        FolderLock(lock.parent).__enter__()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with FolderLock(lock.parent, wait=30):  # the training has ended
        pass
